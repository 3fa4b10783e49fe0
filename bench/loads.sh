#!/usr/bin/env bash
# What a training saves (an adapter, a merged model, a whole model), opened by the software of 2024 and of today: a table.
#   bash bench/loads.sh [CHECKPOINT...]    small models made on the spot, and these
# WORK: folder for all that is made; PEER_PYTHON: as tests/loads_elsewhere.sh has it.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

WORK=${WORK:-$HERE/bench/.work/loads}
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
has_gpu || tune_cpu
export OMP_NUM_THREADS=1 # sums in one order, so that equal is equal
made=$("$PYTHON" "$HERE/bench/loads.py" --work "$WORK" "$@")
mapfile -t folders <<<"$made"
exec bash "$HERE/tests/loads_elsewhere.sh" "${folders[@]}"
