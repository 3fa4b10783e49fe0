#!/usr/bin/env bash
# Check that a chat model's checkpoint works here: tokenizer, model, training, saving, generation.
#   bash tests/check_checkpoint.sh FOLDER [--mode glm3] [--dtype fp32] [--processes 2] [--work FOLDER] [--no_training]
# Prints a table; exits 0 when every row is ok. The .py files of the folder are run: read them before.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"
PATH="$(dirname -- "$PYTHON"):$PATH" exec "$PYTHON" "$HERE/tests/check_checkpoint.py" "$@"
