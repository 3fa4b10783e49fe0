#!/usr/bin/env bash
# How well a model answers a data set of conversations: Acc, F1, BLEU, Rouge.
#
#   bash eval/model_performance_evaluation.sh --model_name_or_path mnt/output_path --dataset_path mnt/datasets/test.jsonl
#   bash eval/model_performance_evaluation.sh --evaluation_metrics Acc,F1,BLEU,Rouge --limit 200
#
# Prints {"code": 0, "msg": "Success", "data": {"evaluation_results": {...}}}. A setting can be edited here, set in the
# environment or given as a flag. With several GPUs: NUM_PROCESSES=4 bash eval/model_performance_evaluation.sh
# shellcheck source=llmops/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../llmops/environment.sh" || exit # first: it names Windows line endings
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# --- settings ----------------------------------------------------------------------------------------------------------
MOUNT_PATH="${MOUNT_PATH:-$HERE/mnt}"                # folder with output_path/ and datasets/
MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-}"         # whole model, merged model or adapter; empty: MOUNT_PATH/output_path
ADAPTER="${ADAPTER:-}"                               # an adapter's folder, put on the model
DATASET_PATH="${DATASET_PATH:-}"                     # jsonl of conversations; empty: MOUNT_PATH/datasets/test.jsonl
EVALUATION_METRICS="${EVALUATION_METRICS:-Rouge}"    # some of Acc, F1, BLEU, Rouge: "Acc,Rouge" or a JSON list
MAX_SEQ_LEN="${MAX_SEQ_LEN:-auto}"                   # prompt and answer together; auto: what the data needs and the model can
MAX_NEW_TOKENS="${MAX_NEW_TOKENS:-256}"              # longest answer; those that run into it are counted
PER_DEVICE_BATCH_SIZE="${PER_DEVICE_BATCH_SIZE:-10}" # prompts per pass; halved when memory runs out
GPU_ID="${GPU_ID:-0}"                                # number of the GPU; -1: CPU; without any GPU 0 is the CPU too
NUM_PROCESSES="${NUM_PROCESSES:-}"                   # processes that share the samples, one GPU each; empty: one, or the hostfile's slots
HOSTFILE="${HOSTFILE:-}"                             # several machines: the hostfile of chat_main.sh
INCLUDE_HOSTS="${INCLUDE_HOSTS:-}"                   # only these machines of it, or these slots: worker-1@worker-2:0,1
EXCLUDE_HOSTS="${EXCLUDE_HOSTS:-}"                   # not these, in the same form
MASTER_ADDR="${MASTER_ADDR:-}"                       # address of the first machine; empty: found over ssh, or its name
MASTER_PORT="${MASTER_PORT:-}"                       # its port; empty: a free one, or 29500 with a hostfile
NO_SSH="${NO_SSH:-false}"                            # start by hand on every machine instead of over ssh
NODE_RANK="${NODE_RANK:-0}"                          # with NO_SSH: which machine this is, from 0
OUTPUT_PATH="${OUTPUT_PATH:-}"                       # for eval_results.json and the answers; empty: MOUNT_PATH/eval_output/model_performance
LIMIT="${LIMIT:-0}"                                  # evaluate so many samples; 0: all
SEED="${SEED:-0}"                                    # of the draw and the bootstrap
MODE="${MODE:-auto}"                                 # chat format; auto: the checkpoint's own
CHAT_TEMPLATE="${CHAT_TEMPLATE:-true}"               # false: ask in plain text
ENABLE_THINKING="${ENABLE_THINKING:-auto}"           # what a thinking model's chat template is told: true, false; auto: as in its training
REUSE_PREFIX="${REUSE_PREFIX:-true}"                 # compute what prompts share once
DTYPE="${DTYPE:-auto}"                               # auto (bf16 where the GPU has it), bf16, fp16, fp32
CPU_KERNELS="${CPU_KERNELS:-auto}"                   # float32 products on a CPU: auto (the faster exact ones), default
TRUST_REMOTE_CODE="${TRUST_REMOTE_CODE:-false}"      # run Python code that the checkpoint's folder ships
# --- end of settings ---------------------------------------------------------------------------------------------------

hand_to_platform evaluate "$@"
read_settings "${BASH_SOURCE[0]}" "$@"
: "${MODEL_NAME_OR_PATH:=$MOUNT_PATH/output_path}"
: "${DATASET_PATH:=$MOUNT_PATH/datasets/test.jsonl}"
: "${OUTPUT_PATH:=$MOUNT_PATH/eval_output/model_performance}"
mapfile -d '' -t settings < <(setting_flags MOUNT_PATH "${LAUNCHER_SETTINGS[@]}")
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
has_gpu || tune_cpu
start_processes "$PYTHON" "$HERE/eval/model_performance_evaluation.py" "${settings[@]}"
