#!/usr/bin/env bash
# SIGTERM and SIGKILL at random moments of a training job, and what the platform knows of it each time.
#   bash tests/job_kills.sh [KILLS] [SEED]      20 kills with seed 0 unless said otherwise; about 20 s each
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

PYTHON=$(ensure_python "$HERE" "$HERE/requirements-dev.txt") || exit 2
exec "$PYTHON" "$HERE/tests/job_kills.py" "${1:-20}" "${2:-0}"
