#!/usr/bin/env bash
# Harm every kind of file that a user gives, by the thousand, and see that each command says so in one sentence.
#   bash tests/fuzz.sh [COUNT] [SEED] [--only light|heavy] [--subject TEXT] [--first N] [--case N] [--accepted]
# Prints what went wrong, each with the command that shows it again, and a table by input; exits 1 when anything did.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

PYTHON=$(ensure_python "$HERE" "$HERE/requirements-dev.txt") || exit 2
exec "$PYTHON" "$HERE/tests/fuzz/run.py" "$@"
