#!/usr/bin/env bash
# The console in a real browser over 1,000 runs, one of them with 10,000 steps: how soon a page is painted, how soon its
# numbers are there, and the longest time in which it did not answer while it was used.
#   bash bench/console.sh [options of bench/console.py]
# Needs Chromium, and the packages of requirements-dev.txt.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

PYTHON=$(ensure_python "$HERE" "$HERE/requirements-dev.txt") || exit 2
exec "$PYTHON" "$HERE/bench/console.py" "$@"
