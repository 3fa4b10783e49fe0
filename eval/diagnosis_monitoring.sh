#!/usr/bin/env bash
# What a training log tells: overfitting, underfitting, catastrophic forgetting, each High, Medium or Low.
#
#   bash eval/diagnosis_monitoring.sh                                  the log of mnt/output_path
#   bash eval/diagnosis_monitoring.sh mnt/output_path/log.txt --explain
#   bash eval/diagnosis_monitoring.sh --log_path trainer_state.json --plot risks.png
#   bash eval/diagnosis_monitoring.sh mnt/output_path/log.txt --watch
#
# Prints {"code": 0, "msg": "Monitoring Report", "data": {"current_risks": {...}, "recommendations": {...}}}. A setting
# can be edited here, set in the environment or given as a flag; the log's path may also come first, without a flag.
# shellcheck source=llmops/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../llmops/environment.sh" || exit # first: it names Windows line endings
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# --- settings ----------------------------------------------------------------------------------------------------------
MOUNT_PATH="${MOUNT_PATH:-$HERE/mnt}"     # folder with output_path/
LOG_PATH="${LOG_PATH:-}"                  # a log, a folder that holds one, or - for stdin; empty: MOUNT_PATH/output_path
EXPLAIN="${EXPLAIN:-false}"               # tell on stderr what was seen: the numbers against the thresholds
PLOT="${PLOT:-}"                          # PNG of the curves with the findings marked; empty: none
DETAILS="${DETAILS:-}"                    # JSON file for reasons, numbers and missing evidence; empty: none
WATCH="${WATCH:-false}"                   # follow a running training; a new JSON line whenever a risk changes
WATCH_INTERVAL="${WATCH_INTERVAL:-1}"     # seconds between two looks
WATCH_UNTIL_IDLE="${WATCH_UNTIL_IDLE:-0}" # end when the log has not grown for so many seconds; 0: never
GL_HIGH="${GL_HIGH:-}"                    # thresholds, empty: the default that diagnosis_monitoring.py --help tells:
GL_MEDIUM="${GL_MEDIUM:-}"                # generalisation loss in percent
GL_SLIGHT="${GL_SLIGHT:-}"                # the same, when it lasts for twice the patience
FLOOR="${FLOOR:-}"                        # smallest late rise or fall that counts, share of the loss at the start
PATIENCE="${PATIENCE:-}"                  # evaluations since the best one for a rise to count as lasting
MIN_DELTA="${MIN_DELTA:-}"                # an evaluation is better when lower by this share
PQ="${PQ:-}"                              # generalisation loss / training progress
GAP="${GAP:-}"                            # share of a rise that must be a wider gap to the training loss
GAIN_HIGH="${GAIN_HIGH:-}"                # share of the loss that training took away
GAIN_MEDIUM="${GAIN_MEDIUM:-}"            # the same, for Medium
GAIN_ENOUGH="${GAIN_ENOUGH:-}"            # from this share on only RECENT tells
RECENT="${RECENT:-}"                      # fall of the evaluation loss in the last quarter of the run, share
LATE_HIGH="${LATE_HIGH:-}"                # share of the fall that came in the second half of the learning
LATE_MEDIUM="${LATE_MEDIUM:-}"            # the same, for Medium
HIGH_LOSS="${HIGH_LOSS:-}"                # all losses that end over this are too high, nats per token
RETENTION_HIGH="${RETENTION_HIGH:-}"      # rise of retention_loss over its first value, nats per token
RETENTION_MEDIUM="${RETENTION_MEDIUM:-}"  # the same, for Medium
RETENTION_FACTOR="${RETENTION_FACTOR:-}"  # smallest factor of retention_loss that counts
SPIKE="${SPIKE:-}"                        # without retention_loss: lasting sudden rise of the loss, factor
MIN_EVALUATIONS="${MIN_EVALUATIONS:-}"    # evaluations needed to judge overfitting
MIN_POINTS="${MIN_POINTS:-}"              # losses needed to judge underfitting
# --- end of settings ---------------------------------------------------------------------------------------------------

if [ $# -gt 0 ] && { [ "$1" = - ] || [[ $1 != -* ]]; }; then set -- --log_path "$@"; fi
arguments=()
while [ $# -gt 0 ]; do # a switch may stand alone: --explain is --explain true
    arguments+=("$1")
    if [[ $1 == --explain || $1 == --watch ]] && [[ $# -eq 1 || $2 == --* ]]; then arguments+=(true); fi
    shift
done
read_settings "${BASH_SOURCE[0]}" ${arguments[@]+"${arguments[@]}"}
mapfile -d '' -t settings < <(setting_flags MOUNT_PATH LOG_PATH)
if [ -n "$PLOT" ]; then # everything else needs no package
    PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
else
    PYTHON=$(project_python "$HERE") || exit 2
fi
exec "$PYTHON" "$HERE/eval/diagnosis_monitoring.py" "${LOG_PATH:-$MOUNT_PATH/output_path}" "${settings[@]}"
