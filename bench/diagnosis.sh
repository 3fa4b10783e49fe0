#!/usr/bin/env bash
# Judge eval/diagnosis_monitoring on labelled logs of real trainings: precision and recall per risk, and a naive rule's.
#   bash bench/diagnosis.sh [options of bench/diagnosis.py]
# Trains 80 tiny models (about 20 minutes on 2 CPU threads); a second start goes on where the first one stopped.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
has_gpu || tune_cpu
exec "$PYTHON" "$HERE/bench/diagnosis.py" --work "$HERE/bench/.work/diagnosis" "$@"
