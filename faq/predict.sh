#!/usr/bin/env bash
# The intents of questions, by a model that chat_main.sh trained in the faq scenario.
#
#   bash faq/predict.sh --question 怎么改密码
#   bash faq/predict.sh --input_file mnt/datasets/test.jsonl --output_file mnt/output_path/predictions.jsonl
#
# Prints one JSON object per question. A setting can be edited here, set in the environment or given as a flag.
# shellcheck source=llmops/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../llmops/environment.sh" || exit # first: it names Windows line endings
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# --- settings ----------------------------------------------------------------------------------------------------------
CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-}" # the GPU to use; empty: the first, or the CPU without any
MOUNT_PATH="${MOUNT_PATH:-$HERE/mnt}"            # folder with output_path/
MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-}"     # adapter, merged or whole model; empty: MOUNT_PATH/output_path
INTENTS_FILE="${INTENTS_FILE:-}"                 # intents.json of prepare.sh; empty: the one in the model's folder
INPUT_FILE="${INPUT_FILE:-}"                     # questions: test.jsonl, or JSON or csv as prepare.sh reads it
QUESTION="${QUESTION:-}"                         # one question, instead of a file
OUTPUT_FILE="${OUTPUT_FILE:-}"                   # empty: stdout
UNCONSTRAINED_FILE="${UNCONSTRAINED_FILE:-}"     # answer without CONSTRAIN, too, and write that there, to compare
JOIN_FILE="${JOIN_FILE:-}"                       # join the model with a linear classifier on these: score.sh --join
EMBEDDING_MODEL="${EMBEDDING_MODEL:-}"           # what finds candidates, if it was moved; with --join_file score.sh's
MODE="${MODE:-}"                                 # chat format; empty: the mode of prepare.sh
CONSTRAIN="${CONSTRAIN:-true}"                   # answer known intents only; false: whatever the model says
USE_THRESHOLD="${USE_THRESHOLD:-true}"           # hold to the threshold and the joining that score.sh kept
ORDERS="${ORDERS:-0}"                            # random-order candidates: ask in N orders, join the answers; 0: as score.sh kept
REUSE_PREFIX="${REUSE_PREFIX:-true}"             # compute what all prompts share once
BATCH_SIZE="${BATCH_SIZE:-0}"                    # questions per pass; 0: as the mode's template says
MAX_NEW_TOKENS="${MAX_NEW_TOKENS:-0}"            # length limit without constraint; 0: as the template says
DTYPE="${DTYPE:-auto}"                           # auto (bf16 where the GPU has it), bf16, fp16, fp32
CPU_KERNELS="${CPU_KERNELS:-auto}"               # float32 products on a CPU: auto (the faster exact ones), default
TRUST_REMOTE_CODE="${TRUST_REMOTE_CODE:-false}"  # run Python code that the checkpoint's folder ships
NUM_PROCESSES="${NUM_PROCESSES:-}"               # processes that share the questions, one GPU each; empty: one, or the hostfile's slots
HOSTFILE="${HOSTFILE:-}"                         # several machines: the hostfile of chat_main.sh
INCLUDE_HOSTS="${INCLUDE_HOSTS:-}"               # only these machines of it, or these slots: worker-1@worker-2:0,1
EXCLUDE_HOSTS="${EXCLUDE_HOSTS:-}"               # not these, in the same form
MASTER_ADDR="${MASTER_ADDR:-}"                   # address of the first machine; empty: found over ssh, or its name
MASTER_PORT="${MASTER_PORT:-}"                   # its port; empty: a free one, or 29500 with a hostfile
NO_SSH="${NO_SSH:-false}"                        # start by hand on every machine instead of over ssh
NODE_RANK="${NODE_RANK:-0}"                      # with NO_SSH: which machine this is, from 0
# --- end of settings ---------------------------------------------------------------------------------------------------

read_settings "${BASH_SOURCE[0]}" "$@"
: "${MODEL_NAME_OR_PATH:=$MOUNT_PATH/output_path}"
mapfile -d '' -t settings < <(setting_flags CUDA_VISIBLE_DEVICES MOUNT_PATH "${LAUNCHER_SETTINGS[@]}")
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
has_gpu || tune_cpu
if [ -n "$CUDA_VISIBLE_DEVICES" ]; then export CUDA_VISIBLE_DEVICES; else unset CUDA_VISIBLE_DEVICES; fi
start_processes "$PYTHON" "$HERE/faq/predict.py" "${settings[@]}"
