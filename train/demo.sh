#!/usr/bin/env bash
# The embedded example: chat_main.sh --demo. A tiny model and data are made, then everything is the way of a 13B model.
#   demo.sh MOUNT_PATH NUM_PROCESSES TRAIN_TYPE ZERO_STAGE
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

folder=$(demo_folder "$1" "$HERE")
has_gpu || tune_cpu
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
"$PYTHON" "$HERE/train/demo.py" prepare "$folder"
forget_settings "$HERE/chat_main.sh"
forward bash "$HERE/chat_main.sh" --mount_path "$folder" --model_name_or_path "$folder/tiny-chat-model" \
    --train_file "$folder/datasets/train.jsonl" --test_file "" \
    --output_path "$folder/output_path" --overwrite_output_path false \
    --num_processes "$2" --train_type "$3" --zero_stage "$4" \
    --lora_dim 32 --lora_alpha 64 --lora_dropout 0 --per_device_train_batch_size 12 --gradient_accumulation_steps 1 \
    --learning_rate 4e-3 --num_train_epochs 10 --max_seq_len 256 --gradient_checkpointing false --warmup_ratio 0.05
"$PYTHON" "$HERE/train/demo.py" report "$folder"
