#!/usr/bin/env bash
# SIGKILL at random moments over training, faq/prepare, evaluation and similar questions, and what the restarts come to.
#   bash tests/kills.sh [KILLS] [SEED]      40 kills with seed 0 unless said otherwise
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

PYTHON=$(ensure_python "$HERE" "$HERE/requirements-dev.txt") || exit 2
exec "$PYTHON" "$HERE/tests/kills.py" "${1:-40}" "${2:-0}"
