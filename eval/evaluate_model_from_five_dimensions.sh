#!/usr/bin/env bash
# A chat model in five dimensions: inference, reading, Chinese, following instructions, knowledge of many subjects.
#
#   bash eval/evaluate_model_from_five_dimensions.sh --model_name_or_path mnt/output_path
#   bash eval/evaluate_model_from_five_dimensions.sh --dimensions '["inference_ability"]' \
#       --additional_parameters '{"max_seq_len": 1024, "num_fewshot": 5}'
#
# Prints {"evaluation_results": {...}, "diagnosis": {...}}. A setting can be edited here, set in the environment or given
# as a flag. The benchmarks' own files go into MOUNT_PATH/datasets/eval (eval/README.md); without them small samples serve.
# shellcheck source=llmops/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../llmops/environment.sh" || exit # first: it names Windows line endings
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# --- settings ----------------------------------------------------------------------------------------------------------
MOUNT_PATH="${MOUNT_PATH:-$HERE/mnt}"              # folder with output_path/ and datasets/eval/
MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-}"       # whole model, merged model or adapter; empty: MOUNT_PATH/output_path
DIMENSIONS="${DIMENSIONS:-}"                       # JSON list; empty: all five
ADDITIONAL_PARAMETERS="${ADDITIONAL_PARAMETERS:-}" # JSON object with max_seq_len and so on; the .py's --help has them all
EXPORT_OFFICIAL="${EXPORT_OFFICIAL:-false}"        # true: the answers as CMRC2018's script and CLUE want them, too
OUTPUT_PATH="${OUTPUT_PATH:-}"                     # for eval_results.json, answers, chart; empty: MOUNT_PATH/eval_output/five_dimensions
NUM_PROCESSES="${NUM_PROCESSES:-}"                 # processes that share the samples, one GPU each; empty: one, or the hostfile's slots
HOSTFILE="${HOSTFILE:-}"                           # several machines: the hostfile of chat_main.sh
INCLUDE_HOSTS="${INCLUDE_HOSTS:-}"                 # only these machines of it, or these slots: worker-1@worker-2:0,1
EXCLUDE_HOSTS="${EXCLUDE_HOSTS:-}"                 # not these, in the same form
MASTER_ADDR="${MASTER_ADDR:-}"                     # address of the first machine; empty: found over ssh, or its name
MASTER_PORT="${MASTER_PORT:-}"                     # its port; empty: a free one, or 29500 with a hostfile
NO_SSH="${NO_SSH:-false}"                          # start by hand on every machine instead of over ssh
NODE_RANK="${NODE_RANK:-0}"                        # with NO_SSH: which machine this is, from 0
# --- end of settings ---------------------------------------------------------------------------------------------------

hand_to_platform five "$@"
read_settings "${BASH_SOURCE[0]}" "$@"
: "${MODEL_NAME_OR_PATH:=$MOUNT_PATH/output_path}"
: "${OUTPUT_PATH:=$MOUNT_PATH/eval_output/five_dimensions}"
export MOUNT_PATH
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
has_gpu || tune_cpu
start_processes "$PYTHON" "$HERE/eval/evaluate_model_from_five_dimensions.py" --output_path "$OUTPUT_PATH" \
    --export_official "$EXPORT_OFFICIAL" \
    "$MODEL_NAME_OR_PATH" "$DIMENSIONS" "$ADDITIONAL_PARAMETERS"
