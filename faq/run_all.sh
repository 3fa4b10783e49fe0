#!/usr/bin/env bash
# From questions with intents to a scored model: prepare, train, predict with and without constraint, score.
#
#   bash faq/run_all.sh --data_file my_faq.jsonl --model_name_or_path mnt/Qwen1.5-7B-Chat --mode qwen1.5
#   bash faq/run_all.sh --data_file my_faq.jsonl -- --train_type all     flags of chat_main.sh follow --
#
# Prints score.sh's JSON object. A setting can be edited here, set in the environment or given as a flag.
# shellcheck source=llmops/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../llmops/environment.sh" || exit # first: it names Windows line endings
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# --- settings ----------------------------------------------------------------------------------------------------------
CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-}" # GPUs to use, such as 0,1; empty: all, or the CPU without any
MOUNT_PATH="${MOUNT_PATH:-$HERE/mnt}"            # folder with the base model, datasets/ and output_path/
DATA_FILE="${DATA_FILE:-}"                       # questions with intents: a file, several with commas, or a pattern
TEST_DATA_FILE="${TEST_DATA_FILE:-}"             # questions to test with, named likewise; empty: a part of DATA_FILE
MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-}"     # base model; empty: MOUNT_PATH/Llama-2-13b-chat-hf
OUTPUT_PATH="${OUTPUT_PATH:-}"                   # empty: MOUNT_PATH/output_path
MODE="${MODE:-auto}"                             # auto glm glm2 glm3 baichuan2_13b qwen1.5 llama2: llmops/formats/templates
MAX_SEQ_LEN="${MAX_SEQ_LEN:-2048}"               # longest prompt and answer in tokens
TEST_RATIO="${TEST_RATIO:-0.1}"                  # share of each intent's questions that is held out
VALIDATION_RATIO="${VALIDATION_RATIO:-0.0}"      # share of the rest to choose the best checkpoint by
OUT_OF_SCOPE_RATIO="${OUT_OF_SCOPE_RATIO:-0.1}"  # questions added whose intent is left out of the list
CANDIDATES="${CANDIDATES:-all}"                  # list all intents, or only the K most similar to each question
CANDIDATE_EXAMPLES="${CANDIDATE_EXAMPLES:-0}"    # with CANDIDATES=K: show each with N of its most similar questions
CANDIDATE_ORDER="${CANDIDATE_ORDER:-}"           # empty: similarity with examples, number without; random: for score.sh --join
ORDERS="${ORDERS:-0}"                            # with CANDIDATE_ORDER=random: ask in N orders, join the answers
EMBEDDING_MODEL="${EMBEDDING_MODEL:-}"           # sentence embedding model: finds candidates, score's baselines use it
UNTUNED="${UNTUNED:-true}"                       # let the base model answer, too: what training added
SKIP_BAD_LINES="${SKIP_BAD_LINES:-false}"        # drop and count bad records instead of stopping
OVERWRITE="${OVERWRITE:-false}"                  # replace files in MOUNT_PATH/datasets that prepare did not write
TRUST_REMOTE_CODE="${TRUST_REMOTE_CODE:-false}"  # run Python code that the checkpoint's folder ships
# --- end of settings ---------------------------------------------------------------------------------------------------

REST=()
read_settings "${BASH_SOURCE[0]}" "$@"
: "${MODEL_NAME_OR_PATH:=$MOUNT_PATH/Llama-2-13b-chat-hf}"
: "${OUTPUT_PATH:=$MOUNT_PATH/output_path}"

log "1. prepare"
bash "$HERE/faq/prepare.sh" --data_file "$DATA_FILE" --test_data_file "$TEST_DATA_FILE" --mount_path "$MOUNT_PATH" \
    --model_name_or_path "$MODEL_NAME_OR_PATH" --mode "$MODE" --test_ratio "$TEST_RATIO" \
    --validation_ratio "$VALIDATION_RATIO" \
    --output_dir "$MOUNT_PATH/datasets" --max_seq_len "$MAX_SEQ_LEN" \
    --out_of_scope_ratio "$OUT_OF_SCOPE_RATIO" --candidates "$CANDIDATES" --embedding_model "$EMBEDDING_MODEL" \
    --candidate_examples "$CANDIDATE_EXAMPLES" --candidate_order "$CANDIDATE_ORDER" --skip_bad_lines "$SKIP_BAD_LINES" \
    --overwrite "$OVERWRITE" --trust_remote_code "$TRUST_REMOTE_CODE" >&2
log "2. train"
judge=()
[[ ! $VALIDATION_RATIO =~ [1-9] ]] || judge=(--test_file "$MOUNT_PATH/datasets/validation.jsonl")
# its error may name flags that this command does not have
trap 'log "run_all.sh: flags of chat_main.sh follow --, as in faq/run_all.sh ... -- --overwrite_output_path true"' ERR
forward bash "$HERE/chat_main.sh" --scenario faq --mount_path "$MOUNT_PATH" --model_name_or_path "$MODEL_NAME_OR_PATH" \
    --mode "$MODE" --output_path "$OUTPUT_PATH" --max_seq_len "$MAX_SEQ_LEN" \
    --cuda_visible_devices "$CUDA_VISIBLE_DEVICES" --trust_remote_code "$TRUST_REMOTE_CODE" \
    --skip_bad_lines "$SKIP_BAD_LINES" ${judge[@]+"${judge[@]}"} ${REST[@]+"${REST[@]}"} >&2
trap - ERR
log "3. predict"
forward bash "$HERE/faq/predict.sh" --model_name_or_path "$OUTPUT_PATH" --embedding_model "" \
    --intents_file "" --input_file "$MOUNT_PATH/datasets/test.jsonl" --constrain true --use_threshold false --join_file "" \
    --orders "$ORDERS" \
    --output_file "$OUTPUT_PATH/predictions.jsonl" --unconstrained_file "$OUTPUT_PATH/predictions_unconstrained.jsonl" \
    --mode "$MODE" --cuda_visible_devices "$CUDA_VISIBLE_DEVICES" --trust_remote_code "$TRUST_REMOTE_CODE"
untuned=
if [ "$UNTUNED" = true ]; then
    log "the base model answers the same questions"
    untuned=$OUTPUT_PATH/predictions_untuned.jsonl
    forward bash "$HERE/faq/predict.sh" --model_name_or_path "$MODEL_NAME_OR_PATH" --embedding_model "" \
        --intents_file "$OUTPUT_PATH/intents.json" --input_file "$MOUNT_PATH/datasets/test.jsonl" \
        --output_file "$untuned" --unconstrained_file "" --constrain true --use_threshold false --join_file "" \
        --orders "$ORDERS" --mode "$MODE" \
        --cuda_visible_devices "$CUDA_VISIBLE_DEVICES" --trust_remote_code "$TRUST_REMOTE_CODE"
fi
log "4. score"
exec bash "$HERE/faq/score.sh" --predictions "$OUTPUT_PATH/predictions.jsonl" \
    --unconstrained "$OUTPUT_PATH/predictions_unconstrained.jsonl" --train_file "$MOUNT_PATH/datasets/train.jsonl" \
    --embedding_model "$EMBEDDING_MODEL" --untuned_file "$untuned"
