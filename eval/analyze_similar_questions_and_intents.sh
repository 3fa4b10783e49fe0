#!/usr/bin/env bash
# Which questions of FAQ data are alike and have different intents: mislabelled, or two names for one intent.
#
#   bash eval/analyze_similar_questions_and_intents.sh          our small sample, by wording, on any machine
#   bash eval/analyze_similar_questions_and_intents.sh --data_file_path mnt/datasets/combine_data.json \
#       --model_path mnt/sbert-base-chinese-nli --report mnt/similar.html --plot mnt/similar.png
#
# Prints {"code": 0, "msg": "Success", "data": {"mismatched_intents": [...], "similar_intents": [...]}}. A setting can be
# edited here, set in the environment or given as a flag.
# shellcheck source=llmops/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../llmops/environment.sh" || exit # first: it names Windows line endings
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# --- settings ----------------------------------------------------------------------------------------------------------
DATA_FILE_PATH="${DATA_FILE_PATH:-}"                               # JSON array, JSON lines or csv; empty: our sample
MODEL_PATH="${MODEL_PATH:-}"                                       # embedding model's folder; empty: builtin:ngram (wording only)
SIMILARITY_THRESHOLD="${SIMILARITY_THRESHOLD:-0.91}"               # questions this similar are compared by intent
INTENT_SIMILARITY_THRESHOLD="${INTENT_SIMILARITY_THRESHOLD:-0.86}" # intents this similar probably mean the same
OUTPUT_FILE="${OUTPUT_FILE:-}"                                     # write what is printed into this file, too; empty: none
REPORT="${REPORT:-}"                                               # FILE.html, a page for people; empty: none
PLOT="${PLOT:-}"                                                   # FILE.png, heat map of confused intents; empty: none
CACHE_DIR="${CACHE_DIR:-}"                                         # for computed vectors; empty: ~/.cache/llmops/embeddings
GPU_ID="${GPU_ID:-0}"                                              # number of the GPU; -1: CPU; without any GPU 0 is too
NUM_PROCESSES="${NUM_PROCESSES:-}"                                 # processes that share the texts, one GPU each; empty: one, or the hostfile's slots
HOSTFILE="${HOSTFILE:-}"                                           # several machines, which share the cache: the hostfile of chat_main.sh
INCLUDE_HOSTS="${INCLUDE_HOSTS:-}"                                 # only these machines of it, or these slots: worker-1@worker-2:0,1
EXCLUDE_HOSTS="${EXCLUDE_HOSTS:-}"                                 # not these, in the same form
MASTER_ADDR="${MASTER_ADDR:-}"                                     # address of the first machine; empty: found over ssh, or its name
MASTER_PORT="${MASTER_PORT:-}"                                     # its port; empty: a free one, or 29500 with a hostfile
NO_SSH="${NO_SSH:-false}"                                          # start by hand on every machine instead of over ssh
NODE_RANK="${NODE_RANK:-0}"                                        # with NO_SSH: which machine this is, from 0
DTYPE="${DTYPE:-fp32}"                                             # of the model's weights: fp32, bf16, fp16
CPU_KERNELS="${CPU_KERNELS:-auto}"                                 # float32 products on a CPU: auto (the faster exact ones), default
MAX_PAIRS="${MAX_PAIRS:-10000000}"                                 # more pairs than this are an error
SKIP_BAD_LINES="${SKIP_BAD_LINES:-false}"                          # drop and count bad lines instead of stopping
TRUST_REMOTE_CODE="${TRUST_REMOTE_CODE:-false}"                    # run Python code that the model's folder ships
# --- end of settings ---------------------------------------------------------------------------------------------------

hand_to_platform similar "$@"
read_settings "${BASH_SOURCE[0]}" "$@"
: "${DATA_FILE_PATH:=$HERE/eval/eval_datasets/faq_similar/combine_data.json}"
: "${MODEL_PATH:=builtin:ngram}"
mapfile -d '' -t settings < <(setting_flags "${LAUNCHER_SETTINGS[@]}")
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
has_gpu || tune_cpu
start_processes "$PYTHON" "$HERE/eval/analyze_similar_questions_and_intents.py" "${settings[@]}"
