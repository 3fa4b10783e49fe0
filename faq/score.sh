#!/usr/bin/env bash
# How good predictions are: accuracy, macro F1, 不符合, the most confused pairs; one JSON object and a picture.
#
#   bash faq/score.sh                                       of mnt/output_path/predictions.jsonl
#   bash faq/score.sh --predictions a.jsonl --unconstrained b.jsonl
#
# A setting can be edited here, set in the environment or given as a flag.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# --- settings ----------------------------------------------------------------------------------------------------------
MOUNT_PATH="${MOUNT_PATH:-$HERE/mnt}" # folder with output_path/
PREDICTIONS="${PREDICTIONS:-}"        # output of predict.sh; empty: MOUNT_PATH/output_path/predictions.jsonl
UNCONSTRAINED="${UNCONSTRAINED:-}"    # the same with --constrain false, to compare
INTENTS_FILE="${INTENTS_FILE:-}"      # intents.json of prepare.sh; empty: beside PREDICTIONS
PICTURE="${PICTURE:-}"                # PNG of the confusions; empty: beside PREDICTIONS
# --- end of settings ---------------------------------------------------------------------------------------------------

# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"
read_settings "${BASH_SOURCE[0]}" "$@"
: "${PREDICTIONS:=$MOUNT_PATH/output_path/predictions.jsonl}"
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
files=("$PREDICTIONS")
[ -z "$UNCONSTRAINED" ] || files+=("$UNCONSTRAINED")
mapfile -d '' -t settings < <(setting_flags MOUNT_PATH PREDICTIONS UNCONSTRAINED)
exec "$PYTHON" "$HERE/faq/score.py" "${files[@]}" ${settings[@]+"${settings[@]}"}
