#!/usr/bin/env bash
# Fine-tune a chat model with DeepSpeed.
#
#   bash chat_main.sh                        train as the settings below say
#   bash chat_main.sh --demo                 a tiny model on this machine, from nothing to a result
#   bash chat_main.sh --train_type all ...   any setting as a flag
#   bash chat_main.sh --help                 every setting
#
# A setting can be edited here, set in the environment (TRAIN_TYPE=all bash chat_main.sh) or given as a flag; the flag wins.
# shellcheck source=llmops/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/llmops/environment.sh" || exit # first: it names Windows line endings
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

# --- settings: what ----------------------------------------------------------------------------------------------------
SCENARIO="${SCENARIO:-general}"                  # what the data is: general: conversations; faq: questions with intents
CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-}" # GPUs to use, such as 0,1 or UUIDs; empty: all, or the CPU without any; -1: the CPU
MOUNT_PATH="${MOUNT_PATH:-$HERE/mnt}"            # folder with the base model, datasets/ and output_path/
MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-}"     # folder of the base model; empty: MOUNT_PATH/Llama-2-13b-chat-hf
MODE="${MODE:-auto}"                             # chat format; auto: the checkpoint's own template, else its family's; or glm glm2 glm3 baichuan2_13b qwen1.5 llama2
TRAIN_FILE="${TRAIN_FILE:-}"                     # conversations to learn: a file, several with commas, a pattern or a saved dataset; empty: MOUNT_PATH/datasets/train.jsonl
TEST_FILE="${TEST_FILE:-}"                       # held-out conversations; empty: test.jsonl beside the first training file, else a part of the training data
LEARN="${LEARN:-all}"                            # which answers are learned: all, or last: those after the last question
ENABLE_THINKING="${ENABLE_THINKING:-}"           # what a thinking model's chat template is told: true or false; empty or auto: nothing
OUTPUT_PATH="${OUTPUT_PATH:-}"                   # where the model, checkpoints, log.txt and pictures go; empty: MOUNT_PATH/output_path
# --- settings: how -----------------------------------------------------------------------------------------------------
TRAIN_TYPE="${TRAIN_TYPE:-lora}"                               # lora: a small adapter; all: every weight
LORA_MODULE_NAME="${LORA_MODULE_NAME:-}"                       # layers that get LoRA, such as gate_proj,down_proj,up_proj; empty: attention and MLP of the family
LORA_DIM="${LORA_DIM:-}"                                       # LoRA rank; empty: 16, faq 8
LORA_ALPHA="${LORA_ALPHA:-}"                                   # LoRA scaling numerator (scale = alpha / rank); empty: 32, faq 16
LORA_DROPOUT="${LORA_DROPOUT:-0.05}"                           # dropout before the LoRA layers
PER_DEVICE_TRAIN_BATCH_SIZE="${PER_DEVICE_TRAIN_BATCH_SIZE:-}" # conversations per device and accumulation step; empty: 4, faq 16
GRADIENT_ACCUMULATION_STEPS="${GRADIENT_ACCUMULATION_STEPS:-}" # accumulation steps per optimizer step; empty: 4, faq 1
MICRO_BATCH_TOKENS="${MICRO_BATCH_TOKENS:-0}"                  # tokens that go through a device at once; 0: on a GPU what fits, on a CPU 2048
PER_DEVICE_EVAL_BATCH_SIZE="${PER_DEVICE_EVAL_BATCH_SIZE:-}"   # conversations per device while evaluating; empty: 8, faq 32
MAX_SEQ_LEN="${MAX_SEQ_LEN:-}"                                 # longest conversation in tokens; longer ones are cut, in faq they are errors; empty: 1024, faq 2048
LEARNING_RATE="${LEARNING_RATE:-0}"                            # peak learning rate; 0: 1e-4 for lora, 1e-5 for all, twice that for faq
NUM_TRAIN_EPOCHS="${NUM_TRAIN_EPOCHS:-0}"                      # passes over the training data; 0: 3, and for small data as many as make 40 steps
MAX_STEPS="${MAX_STEPS:--1}"                                   # stop after this many optimizer steps; -1: by epochs
ZERO_STAGE="${ZERO_STAGE:-2}"                                  # DeepSpeed ZeRO: 2, 3 or 3_offload
DS_FILE="${DS_FILE:-}"                                         # your own DeepSpeed JSON instead of train/ds_zero*.json
DTYPE="${DTYPE:-auto}"                                         # number format: auto (bf16 where the GPU computes it, else fp32), bf16, fp16 (with loss scaling), fp32
CPU_KERNELS="${CPU_KERNELS:-auto}"                             # float32 products on a CPU: auto takes oneDNN's where they are as exact as torch's and faster; default: torch's
GRADIENT_CHECKPOINTING="${GRADIENT_CHECKPOINTING:-auto}"       # layers recomputed in the backward pass: auto (as few as memory asks for), true (all), false, or N: one in N
PACKING="${PACKING:-true}"                                     # no padding, shared prompt beginnings stored once; false: plain padded batches
MAX_GRAD_NORM="${MAX_GRAD_NORM:-1}"                            # gradient clipping; 0: none
LR_SCHEDULER_TYPE="${LR_SCHEDULER_TYPE:-cosine}"               # cosine, linear or constant (also constant_with_warmup), each after the warmup
WARMUP_RATIO="${WARMUP_RATIO:-}"                               # share of the steps that warms up; empty: 0.03, faq 0.1
WEIGHT_DECAY="${WEIGHT_DECAY:-0}"                              # AdamW weight decay
NEFTUNE_NOISE_ALPHA="${NEFTUNE_NOISE_ALPHA:-0}"                # NEFTune noise (Jain et al. 2023); 0: none; uses padded batches
EARLY_STOPPING_PATIENCE="${EARLY_STOPPING_PATIENCE:-0}"        # stop after this many evaluations without a better one; 0: never
# --- settings: evaluation, checkpoints, logging ------------------------------------------------------------------------
EVAL_RATIO="${EVAL_RATIO:-0.1}"                          # share of the training data that is held out when there is no test file
EVAL_STEPS="${EVAL_STEPS:-0}"                            # evaluate and save every N steps too; 0: at every epoch only
SAVE_TOTAL_LIMIT="${SAVE_TOTAL_LIMIT:-2}"                # newest checkpoints that are kept; the best one is always kept as well
METRIC_FOR_BEST="${METRIC_FOR_BEST:-loss}"               # what makes an evaluation the best: its loss, or accuracy: answers that are right to their end
LOAD_BEST_MODEL_AT_END="${LOAD_BEST_MODEL_AT_END:-true}" # output_path gets the weights of the best evaluation; false: the last ones
REPLAY_RATIO="${REPLAY_RATIO:-0}"                        # share of every step's conversations that are general ones, against forgetting
REPLAY_FILE="${REPLAY_FILE:-}"                           # general conversations to learn again; empty: train/replay.jsonl
RETENTION_FILE="${RETENTION_FILE:-}"                     # general conversations that measure forgetting; empty: train/retention.jsonl
LOGGING_STEPS="${LOGGING_STEPS:-1}"                      # optimizer steps between two lines of log.txt
TENSORBOARD="${TENSORBOARD:-true}"                       # serve TensorBoard while training runs
TENSORBOARD_HOST="${TENSORBOARD_HOST:-127.0.0.1}"        # address that TensorBoard listens on; 0.0.0.0: all, without a login
TENSORBOARD_PORT="${TENSORBOARD_PORT:-6006}"             # port of TensorBoard
CONSOLE="${CONSOLE:-false}"                              # serve the console over MOUNT_PATH while training runs
CONSOLE_HOST="${CONSOLE_HOST:-127.0.0.1}"                # address that the console listens on; 0.0.0.0: all, with its token
CONSOLE_PORT="${CONSOLE_PORT:-5000}"                     # port of the console
REPORT_TO="${REPORT_TO:-}"                               # trackers that get every logged line as well, with commas: swanlab, mlflow, trackio, wandb
MERGE_LORA="${MERGE_LORA:-false}"                        # also write output_path/merged: base model and adapter in one
# --- settings: behaviour -----------------------------------------------------------------------------------------------
DRY_RUN="${DRY_RUN:-false}"                             # check the data, show what is learned, estimate memory and time, train nothing
SKIP_BAD_LINES="${SKIP_BAD_LINES:-false}"               # drop and count bad lines instead of stopping
ALLOW_SPECIAL_TOKENS="${ALLOW_SPECIAL_TOKENS:-false}"   # texts of control tokens in the data become these tokens; false: they are text
RESUME="${RESUME:-true}"                                # continue an interrupted run; false: refuse to touch it
OVERWRITE_OUTPUT_PATH="${OVERWRITE_OUTPUT_PATH:-false}" # delete an earlier run in output_path and start again
TRUST_REMOTE_CODE="${TRUST_REMOTE_CODE:-false}"         # run Python code that the checkpoint's folder ships
SEED="${SEED:-42}"                                      # random seed
# --- settings: processes and machines ----------------------------------------------------------------------------------
NUM_PROCESSES="${NUM_PROCESSES:-}" # processes on each machine; empty: one per GPU or slot, or one on the CPU
HOSTFILE="${HOSTFILE:-}"           # several machines: DeepSpeed's hostfile
INCLUDE_HOSTS="${INCLUDE_HOSTS:-}" # only these machines of it, or these slots: worker-1@worker-2:0,1
EXCLUDE_HOSTS="${EXCLUDE_HOSTS:-}" # not these, in the same form
MASTER_ADDR="${MASTER_ADDR:-}"     # address of the first machine; empty: found over ssh, or its name
MASTER_PORT="${MASTER_PORT:-}"     # its port; empty: a free one, or 29500 with a hostfile
NO_SSH="${NO_SSH:-false}"          # start by hand on every machine instead of over ssh
NODE_RANK="${NODE_RANK:-0}"        # with --no_ssh: which machine this is, from 0
# --- end of settings ---------------------------------------------------------------------------------------------------

DEMO=false
read_settings "${BASH_SOURCE[0]}" "$@"
if [ -n "$CUDA_VISIBLE_DEVICES" ]; then export CUDA_VISIBLE_DEVICES; else unset CUDA_VISIBLE_DEVICES; fi # to CUDA empty is none

case $SCENARIO in
general) demo=$HERE/train/demo.sh ;;
faq) demo=$HERE/faq/demo.sh ;;
*) die "SCENARIO is '$SCENARIO', expected general or faq" ;;
esac
[ "$DEMO" = false ] || exec bash "$demo" "$MOUNT_PATH" "$NUM_PROCESSES" "$TRAIN_TYPE" "$ZERO_STAGE"

: "${MODEL_NAME_OR_PATH:=$MOUNT_PATH/Llama-2-13b-chat-hf}" "${TRAIN_FILE:=$MOUNT_PATH/datasets/train.jsonl}"
: "${OUTPUT_PATH:=$MOUNT_PATH/output_path}"

# 1. check settings, paths and data before anything is installed or loaded; questions with intents become conversations
checker=$(project_python "$HERE") || exit 2
check_launch "$checker"
if [ "$SCENARIO" = faq ]; then
    status=0
    beside=$(PYTHONPATH=$HERE "$checker" -P -m llmops.intents.questions "$TRAIN_FILE") || status=$?
    if [ "$status" -ne 3 ]; then # 3: no questions
        [ "$status" -eq 0 ] || exit "$status"
        [ "$NO_SSH" != true ] || die "$TRAIN_FILE holds questions with intents; with --no_ssh prepare them first: bash faq/prepare.sh"
        [ -n "$TEST_FILE" ] || TEST_FILE=$beside
        prepared=${OUTPUT_PATH%/}_faq
        log "$TRAIN_FILE holds questions with intents: faq/prepare.sh makes conversations of them in $prepared"
        bash "$HERE/faq/prepare.sh" --data_file "$TRAIN_FILE" --test_data_file "$TEST_FILE" --output_dir "$prepared" \
            --mode "$MODE" --skip_bad_lines "$SKIP_BAD_LINES" --seed "$SEED" --test_ratio "$EVAL_RATIO" \
            --model_name_or_path "" >&2
        TRAIN_FILE=$prepared/train.jsonl TEST_FILE=$prepared/test.jsonl
    fi
fi
mapfile -d '' -t settings < <(setting_flags CUDA_VISIBLE_DEVICES "${LAUNCHER_SETTINGS[@]}")
status=0
"$checker" "$HERE/train/finetune.py" "${settings[@]}" --check || status=$?
[ "$status" -ne 10 ] || exit 0 # the run is finished
[ "$status" -eq 0 ] || exit "$status"

# 2. the environment, and the processes
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"
launcher_flags
if ! has_gpu; then tune_cpu; fi
if [ "$DRY_RUN" = true ]; then # by the processes that there would be, and with the surroundings that they would have
    exec "$PYTHON" "$HERE/llmops/launcher/launch.py" --alone "${LAUNCH[@]}" "$HERE/train/finetune.py" "${settings[@]}"
fi

# 3. train
command=("$PYTHON" "$HERE/llmops/launcher/launch.py" "${LAUNCH[@]}" "$HERE/train/finetune.py")
log "+ $(printf '%q ' "${command[@]}")... (all settings: $OUTPUT_PATH/finetune_config.json)"
exec "${command[@]}" "${settings[@]}"
