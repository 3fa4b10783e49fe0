#!/usr/bin/env bash
# How good predictions are: accuracy, macro F1, 不符合, the most confused pairs; simple classifiers on the same questions;
# how much can be automated at which precision; training questions to look at. One JSON object and two pictures.
#
#   bash faq/score.sh                                       of mnt/output_path/predictions.jsonl
#   bash faq/score.sh --predictions a.jsonl --unconstrained b.jsonl
#   bash faq/score.sh --embedding_model mnt/all-MiniLM-L6-v2 --precision 0.95 --keep_threshold true
#
# A setting can be edited here, set in the environment or given as a flag.
# shellcheck source=llmops/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../llmops/environment.sh" || exit # first: it names Windows line endings
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# --- settings ----------------------------------------------------------------------------------------------------------
MOUNT_PATH="${MOUNT_PATH:-$HERE/mnt}"  # folder with output_path/
PREDICTIONS="${PREDICTIONS:-}"         # output of predict.sh; empty: MOUNT_PATH/output_path/predictions.jsonl
UNCONSTRAINED="${UNCONSTRAINED:-}"     # the same with --constrain false, to compare
UNTUNED_FILE="${UNTUNED_FILE:-}"       # the same of the base model (--model_name_or_path ... --intents_file ...), as a baseline
INTENTS_FILE="${INTENTS_FILE:-}"       # intents.json of prepare.sh; empty: beside PREDICTIONS
PICTURE="${PICTURE:-}"                 # PNG of the confusions; empty: beside PREDICTIONS
TRAIN_FILE="${TRAIN_FILE:-}"           # what the model learned from; empty: MOUNT_PATH/datasets/train.jsonl if it is there
EMBEDDING_MODEL="${EMBEDDING_MODEL:-}" # folder of a sentence embedding model for the baselines; empty: n-grams
PRECISION="${PRECISION:-}"             # how often an automated answer should be right; empty: 0.95
AUTOMATE="${AUTOMATE:-}"               # instead: the share of questions to automate
KEEP_THRESHOLD="${KEEP_THRESHOLD:-}"   # true: write the threshold into intents.json, for predict.sh
JOIN="${JOIN:-}"                       # true: keep that of model and linear classifier together
SUSPECTS_FILE="${SUSPECTS_FILE:-}"     # write training questions that are probably mislabelled there
# --- end of settings ---------------------------------------------------------------------------------------------------

read_settings "${BASH_SOURCE[0]}" "$@"
: "${PREDICTIONS:=$MOUNT_PATH/output_path/predictions.jsonl}"
standard=$MOUNT_PATH/datasets/train.jsonl
if [ -z "$TRAIN_FILE" ] && [ -f "$standard" ] && [ "$PREDICTIONS" -ot "$standard" ]; then
    log "$standard is newer than the predictions: no baselines (--train_file names the data that they belong to)"
elif [ -z "$TRAIN_FILE" ] && [ -f "$standard" ]; then
    TRAIN_FILE=$standard
fi
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
files=("$PREDICTIONS")
[ -z "$UNCONSTRAINED" ] || files+=("$UNCONSTRAINED")
mapfile -d '' -t settings < <(setting_flags MOUNT_PATH PREDICTIONS UNCONSTRAINED)
exec "$PYTHON" "$HERE/faq/score.py" "${files[@]}" ${settings[@]+"${settings[@]}"}
