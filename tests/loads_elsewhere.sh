#!/usr/bin/env bash
# Load saved folders with the transformers and PEFT of 2024 and of today: same ids, same greedy tokens? A table.
#   bash tests/loads_elsewhere.sh FOLDER...    folders with a whole model or an adapter (its base must load there, too)
# PEER_PYTHON: a Python with those packages; without it an environment is made in bench/.work.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

[ "$#" -gt 0 ] || die "name the folders that are to be loaded: bash tests/loads_elsewhere.sh mnt/output_path"
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
if [ -z "${PEER_PYTHON:-}" ]; then
    PEER_PYTHON=$HERE/bench/.work/2024/bin/python
    [ -x "$PEER_PYTHON" ] || "$PYTHON" -m venv "$HERE/bench/.work/2024"
    "$PEER_PYTHON" -m pip install --quiet --requirement "$HERE/bench/peers/requirements-2024.txt" >&2
fi
exec "$PYTHON" "$HERE/tests/loads_elsewhere.py" "$PYTHON" "$PEER_PYTHON" "$@"
