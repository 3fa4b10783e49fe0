#!/usr/bin/env bash
# The model server under the load of many clients, and `transformers serve` beside it: tokens/s, p50, p95, memory.
#   bash bench/serve.sh --model FOLDER [options of bench/serve.py]
# PEER_PYTHON: a Python that has transformers[serving]; without it ours is measured alone.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
has_gpu || tune_cpu
exec "$PYTHON" "$HERE/bench/serve.py" --peer_python "${PEER_PYTHON:-}" "$@"
