#!/usr/bin/env bash
# FAQ data to training data: reads questions with intents, writes train.jsonl, test.jsonl and intents.json.
#
#   bash faq/prepare.sh --data_file my_faq.jsonl              into mnt/datasets
#   bash faq/prepare.sh --data_file a.csv --test_data_file b.csv
#   bash faq/prepare.sh --data_file 'a.csv,more/*.jsonl'     several files, of any shapes
#
# Prints what it made as one JSON object. A setting can be edited here, set in the environment or given as a flag.
# shellcheck source=llmops/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../llmops/environment.sh" || exit # first: it names Windows line endings
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# --- settings ----------------------------------------------------------------------------------------------------------
MOUNT_PATH="${MOUNT_PATH:-$HERE/mnt}"           # folder with datasets/
DATA_FILE="${DATA_FILE:-}"                      # questions with intents: a file, several with commas, or a pattern
TEST_DATA_FILE="${TEST_DATA_FILE:-}"            # questions to test with, named likewise; empty: a part of DATA_FILE
OUTPUT_DIR="${OUTPUT_DIR:-}"                    # empty: MOUNT_PATH/datasets
MODE="${MODE:-auto}"                            # prompt wording: a file of llmops/formats/templates
MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-}"    # base model; if given, the prompts' length is checked with it
MAX_SEQ_LEN="${MAX_SEQ_LEN:-2048}"              # longest prompt and answer in tokens
INSTRUCTION="${INSTRUCTION:-}"                  # instead of the template's instruction
TEST_RATIO="${TEST_RATIO:-0.1}"                 # share of each intent's questions that is held out
VALIDATION_RATIO="${VALIDATION_RATIO:-0.0}"     # share of the rest to choose the best checkpoint by
OUT_OF_SCOPE_RATIO="${OUT_OF_SCOPE_RATIO:-0.1}" # questions added whose intent is left out of the list
VARIANTS="${VARIANTS:-2}"                       # how many such lists
CANDIDATES="${CANDIDATES:-all}"                 # list all intents, or only the K most similar to each question
EMBEDDING_MODEL="${EMBEDDING_MODEL:-}"          # sentence embedding model that finds them; empty: character n-grams
CANDIDATE_EXAMPLES="${CANDIDATE_EXAMPLES:-0}"   # with CANDIDATES=K: show each with N of its most similar questions
CANDIDATE_ORDER="${CANDIDATE_ORDER:-}"          # empty: similarity with examples, number without; random: for score.sh --join
PROMPT_LANGUAGE="${PROMPT_LANGUAGE:-auto}"      # zh or en; auto: Chinese where the data has Chinese characters
SKIP_BAD_LINES="${SKIP_BAD_LINES:-false}"       # drop and count bad records instead of stopping
OVERWRITE="${OVERWRITE:-false}"                 # replace files in OUTPUT_DIR that this command did not write
TRUST_REMOTE_CODE="${TRUST_REMOTE_CODE:-false}" # run Python code that the checkpoint's folder ships
SEED="${SEED:-42}"                              # random seed of the split and of the variants
# --- end of settings ---------------------------------------------------------------------------------------------------

read_settings "${BASH_SOURCE[0]}" "$@"
: "${OUTPUT_DIR:=$MOUNT_PATH/datasets}"
[ -n "$DATA_FILE" ] || die "--data_file is missing; pass the file with your questions and intents"

if [ -n "$MODEL_NAME_OR_PATH" ] || [ "$CANDIDATES" != all ]; then # a tokenizer or numpy is needed
    PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
    has_gpu || tune_cpu
else
    PYTHON=$(project_python "$HERE") || exit 2
fi
[ "$CANDIDATES" != all ] || CANDIDATE_EXAMPLES=0 CANDIDATE_ORDER="" EMBEDDING_MODEL="" # run_all.sh's is for its score, too
mapfile -d '' -t settings < <(setting_flags MOUNT_PATH)
exec "$PYTHON" "$HERE/faq/prepare.py" "${settings[@]}"
