#!/usr/bin/env bash
# One job of a scheduler, or of the platform that these commands come from: training, evaluation or similar questions.
#
#   TRAIN_FILE=train.jsonl BASE_MODEL_PATH=models/Qwen OUTPUT_DIR=out bash job/run.sh       train, out becomes a whole model
#   MODEL_PATH=out DATASET_PATH=test.jsonl EVALUATION_METRICS=Rouge bash job/run.sh         evaluate
#   bash job/run.sh --notify_url https://example.org/hook -- --lora_dim 8                   flags of the command follow --
#
# Tells how it ended: to the platform (API_URL), to a webhook (NOTIFY_URL), by its exit code, and on stdout in one JSON
# object. Started again, it goes on. AUTH and NOTIFY_TOKEN, which are secret, are read from the environment alone, and so is
# every setting of the command. docs/jobs.md has Slurm, Kubernetes, compose and the platform.
# shellcheck source=llmops/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../llmops/environment.sh" || exit # first: it names Windows line endings
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# --- settings: the job ------------------------------------------------------------------------------------------------
TASK="${TASK:-}"                        # train, evaluate, five or similar; empty: by which variables are set
JOB_ID="${JOB_ID:-}"                    # the job's name; empty: DATA_TASK_JOB_ID, SLURM_JOB_ID
MOUNT_PATH="${MOUNT_PATH:-$HERE/mnt}"   # folder with the base model, datasets/ and output_path/
WORK_DIR="${WORK_DIR:-}"                # what the job keeps; empty: OUTPUT_DIR/job, without it MOUNT_PATH/jobs/JOB_ID
FETCH="${FETCH:-auto}"                  # auto: data by its http(s) address; true: models by hub id, too; false: nothing
LOG_STYLE="${LOG_STYLE:-auto}"          # plain, or platform: progress as the platform reads it; auto: by API_URL
API_URL="${API_URL:-}"                  # the platform's address for the end of the job: PUT, with AUTH and TENANT_ID
TENANT_ID="${TENANT_ID:-}"              # whose job it is, for the platform
NOTIFY_URL="${NOTIFY_URL:-}"            # a webhook: POST at the start and at the end; NOTIFY_TOKEN is its bearer token
NOTIFY_SECONDS="${NOTIFY_SECONDS:-900}" # how long to try again when an end is not taken
GPUS_PER_NODE="${GPUS_PER_NODE:-}"      # processes, one per GPU; 0: the CPU; empty: as the command chooses
# --- settings: training -----------------------------------------------------------------------------------------------
SCENARIO="${SCENARIO:-}"                 # general or faq
BASE_MODEL_PATH="${BASE_MODEL_PATH:-}"   # folder of the base model, or its hub id; empty: MODEL_NAME_OR_PATH
BASE_MODEL_NAME="${BASE_MODEL_NAME:-}"   # taken where BASE_MODEL_PATH is empty
TRAIN_FILE="${TRAIN_FILE:-}"             # path or http(s) address of what is learned
EVAL_FILE="${EVAL_FILE:-}"               # path or http(s) address of what is held out; empty: a part is
OUTPUT_DIR="${OUTPUT_DIR:-}"             # becomes a whole model, the run is in OUTPUT_DIR/run; empty: OUTPUT_PATH, as is
USE_LORA="${USE_LORA:-}"                 # true: LoRA with ZeRO 2; false: every weight with ZeRO 3; empty: TRAIN_TYPE
MODEL_MAX_LENGTH="${MODEL_MAX_LENGTH:-}" # longest conversation in tokens
# --- settings: evaluations and similar questions -----------------------------------------------------------------------
MODEL_PATH="${MODEL_PATH:-}"                       # folder of the model, or its hub id
DATASET_PATH="${DATASET_PATH:-}"                   # path or http(s) address of the data
EVALUATION_METRICS="${EVALUATION_METRICS:-}"       # some of Acc, F1, BLEU, Rouge; five: the five dimensions
MAX_SEQ_LEN="${MAX_SEQ_LEN:-}"                     # longest answer in tokens; in a training as MODEL_MAX_LENGTH
PER_DEVICE_BATCH_SIZE="${PER_DEVICE_BATCH_SIZE:-}" # prompts at once
DATASET_TYPE="${DATASET_TYPE:-}"                   # faq, the only kind
DATASET_ANALYZE_MODEL="${DATASET_ANALYZE_MODEL:-}" # similar questions: the embedding model's folder or hub id
# --- end of settings ---------------------------------------------------------------------------------------------------

case ${1:-} in -h | --help)
    print_usage "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
# wrong settings are the Python program's to find: it can tell those who wait for this job
export TASK JOB_ID MOUNT_PATH WORK_DIR FETCH LOG_STYLE API_URL TENANT_ID NOTIFY_URL NOTIFY_SECONDS GPUS_PER_NODE \
    SCENARIO BASE_MODEL_PATH BASE_MODEL_NAME TRAIN_FILE EVAL_FILE OUTPUT_DIR USE_LORA MODEL_MAX_LENGTH \
    MODEL_PATH DATASET_PATH EVALUATION_METRICS MAX_SEQ_LEN PER_DEVICE_BATCH_SIZE DATASET_TYPE DATASET_ANALYZE_MODEL
PYTHON=$(project_python "$HERE") || exit 2
exec "$PYTHON" "$HERE/job/run.py" "$@"
