#!/usr/bin/env bash
# The model server and the console on one port.
#
#   bash serve/serve.sh                                 the console over mnt/, and mnt/output_path for OpenAI's clients
#   bash serve/serve.sh --mount_path mnt_demo           the same over another folder
#   bash serve/serve.sh --model_name_or_path none       the console alone
#
# The token that it asks for is printed at the start, unless it is yours. SIGTERM lets running answers end.
# A setting can be edited here, set in the environment or given as a flag.
# shellcheck source=llmops/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../llmops/environment.sh" || exit # first: it names Windows line endings
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# --- settings ----------------------------------------------------------------------------------------------------------
CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-}" # the GPU to use; empty: the first, or the CPU without any
MOUNT_PATH="${MOUNT_PATH:-$HERE/mnt}"            # folder with datasets/ and output_path/, which the console shows
MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-}"     # adapter, merged or whole model; empty: that of MOUNT_PATH; none
HOST="${SERVE_HOST:-127.0.0.1}"                  # address to listen on; 0.0.0.0: all (variable: SERVE_HOST)
PORT="${SERVE_PORT:-5000}"                       # 0: any that is free (variable: SERVE_PORT)
AUTH="${AUTH:-true}"                             # ask for the token; false: on the loopback address alone
TOKEN="${LLMOPS_TOKEN:-}"                        # empty: a random one, which is printed (variable: LLMOPS_TOKEN)
TOKEN_FILE="${TOKEN_FILE:-}"                     # or the file with it, which is made where it is not there
ALLOWED_HOSTS="${ALLOWED_HOSTS:-}"               # names under which the server is reached, beside localhost: a,b
MAX_BODY_MB="${MAX_BODY_MB:-8}"                  # largest request
MAX_CONNECTIONS="${MAX_CONNECTIONS:-1024}"       # connections at once
MAX_ROWS="${MAX_ROWS:-64}"                       # answers that are written at once
MAX_QUEUE="${MAX_QUEUE:-256}"                    # requests that wait for a place; more are refused with 429
MAX_TOKENS="${MAX_TOKENS:-4096}"                 # longest answer that may be asked for
REQUEST_SECONDS="${REQUEST_SECONDS:-600}"        # longest time of a request
PREFIX_CACHE_MB="${PREFIX_CACHE_MB:-1024}"       # memory for beginnings of prompts, of all models together; 0: none are kept
MODE="${MODE:-}"                                 # chat format; empty: as the model was trained, or auto
DTYPE="${DTYPE:-auto}"                           # auto (bf16 where the GPU has it), bf16, fp16, fp32
CPU_KERNELS="${CPU_KERNELS:-auto}"               # float32 products on a CPU: auto (the faster exact ones), default
TRUST_REMOTE_CODE="${TRUST_REMOTE_CODE:-false}"  # run Python code that the checkpoint's folder ships
BASE_TOO="${BASE_TOO:-true}"                     # beside an adapter its base model; false: merged, which is faster
INTENTS_FILE="${INTENTS_FILE:-}"                 # intents.json of faq/prepare.sh; empty: the one in the model's folder
EMBEDDING_MODEL="${EMBEDDING_MODEL:-}"           # what finds candidates, if it was moved; with JOIN_FILE score.sh's
JOIN_FILE="${JOIN_FILE:-}"                       # train.jsonl: the classifier of score.sh --join answers with the model
FEEDBACK_FILE="${FEEDBACK_FILE:-}"               # corrections of intents; empty: MOUNT_PATH/datasets/feedback.jsonl
# --- end of settings ---------------------------------------------------------------------------------------------------

read_settings "${BASH_SOURCE[0]}" "$@"
trained=$MOUNT_PATH/output_path
if [ -z "$MODEL_NAME_OR_PATH" ] && { [ -f "$trained/adapter_config.json" ] || [ -f "$trained/config.json" ]; }; then
    MODEL_NAME_OR_PATH=$trained
fi
export LLMOPS_TOKEN="$TOKEN" # not as a flag, which every user of the machine can see
: "$HOST" "$PORT"            # read by name; in the environment HOST and PORT may mean something else
mapfile -d '' -t settings < <(setting_flags CUDA_VISIBLE_DEVICES TOKEN)
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
has_gpu || tune_cpu
if [ -n "$CUDA_VISIBLE_DEVICES" ]; then export CUDA_VISIBLE_DEVICES; else unset CUDA_VISIBLE_DEVICES; fi
exec "$PYTHON" "$HERE/serve/serve.py" "${settings[@]}"
