#!/usr/bin/env bash
# The embedded FAQ example: SCENARIO=faq chat_main.sh --demo. A tiny model is made, then everything is the usual way.
#   demo.sh MOUNT_PATH NUM_PROCESSES TRAIN_TYPE ZERO_STAGE    (TRAIN_TYPE is all: the tiny model knows nothing before)
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

folder=$(demo_folder "$1" "$HERE")/faq
has_gpu || tune_cpu
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
"$PYTHON" "$HERE/faq/demo.py" prepare "$folder"
forget_settings "$HERE/chat_main.sh" "$HERE"/faq/{run_all,prepare,predict,score}.sh
forward bash "$HERE/faq/run_all.sh" --mount_path "$folder" --data_file "$folder/faq.jsonl" --test_data_file "" \
    --output_path "$folder/output_path" --model_name_or_path "$folder/tiny-chat-model" \
    --test_ratio 0.2 --max_seq_len 1024 --untuned false -- \
    --train_file "$folder/datasets/train.jsonl" --test_file "" \
    --overwrite_output_path false --num_processes "$2" --train_type all --zero_stage "$4" \
    --per_device_train_batch_size 32 --learning_rate 1e-3 --num_train_epochs 12 --gradient_checkpointing false \
    --tensorboard false >"$folder/scores.json"
"$PYTHON" "$HERE/faq/demo.py" report "$folder"
