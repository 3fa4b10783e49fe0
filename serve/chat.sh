#!/usr/bin/env bash
# Talk to a model in the terminal.
#
#   bash serve/chat.sh                              a conversation with mnt/output_path
#   bash serve/chat.sh --compare true               the base model of an adapter answers, too
#   bash serve/chat.sh --question 图书馆几点开门    one question, its answer on stdout
#
# In a conversation every line is a question, an empty one begins a new conversation, Ctrl-D ends. A model of the faq
# scenario names the intent of each question. A setting can be edited here, set in the environment or given as a flag.
# shellcheck source=llmops/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../llmops/environment.sh" || exit # first: it names Windows line endings
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# --- settings ----------------------------------------------------------------------------------------------------------
CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-}" # the GPU to use; empty: the first, or the CPU without any
MOUNT_PATH="${MOUNT_PATH:-$HERE/mnt}"            # folder with output_path/
MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-}"     # adapter, merged or whole model; empty: MOUNT_PATH/output_path
QUESTION="${QUESTION:-}"                         # one question; empty: a conversation, a question a line
COMPARE="${COMPARE:-false}"                      # let an adapter's base model answer, too
SYSTEM="${SYSTEM:-}"                             # system message; empty: the chat template's own, if it has one
MAX_NEW_TOKENS="${MAX_NEW_TOKENS:-512}"          # longest answer
TEMPERATURE="${TEMPERATURE:-0}"                  # 0: always the likeliest token
TOP_P="${TOP_P:-1}"                              # choose among the likeliest tokens with this share
SEED="${SEED:-0}"                                # of the choice
MODE="${MODE:-}"                                 # chat format; empty: as the model was trained, or auto
DTYPE="${DTYPE:-auto}"                           # auto (bf16 where the GPU has it), bf16, fp16, fp32
CPU_KERNELS="${CPU_KERNELS:-auto}"               # float32 products on a CPU: auto (the faster exact ones), default
INTENTS_FILE="${INTENTS_FILE:-}"                 # intents.json of faq/prepare.sh; empty: the one in the model's folder
EMBEDDING_MODEL="${EMBEDDING_MODEL:-}"           # what finds candidates, if it was moved; with JOIN_FILE score.sh's
JOIN_FILE="${JOIN_FILE:-}"                       # train.jsonl: the classifier of score.sh --join answers with the model
TRUST_REMOTE_CODE="${TRUST_REMOTE_CODE:-false}"  # run Python code that the checkpoint's folder ships
# --- end of settings ---------------------------------------------------------------------------------------------------

read_settings "${BASH_SOURCE[0]}" "$@"
: "${MODEL_NAME_OR_PATH:=$MOUNT_PATH/output_path}"
mapfile -d '' -t settings < <(setting_flags CUDA_VISIBLE_DEVICES MOUNT_PATH)
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
has_gpu || tune_cpu
if [ -n "$CUDA_VISIBLE_DEVICES" ]; then export CUDA_VISIBLE_DEVICES; else unset CUDA_VISIBLE_DEVICES; fi
exec "$PYTHON" "$HERE/serve/chat.py" "${settings[@]}"
