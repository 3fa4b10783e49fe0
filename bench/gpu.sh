#!/usr/bin/env bash
# What this machine's GPU makes of the toolkit: numerics, whole runs, MFU, memory, kernels, prediction. About 25 minutes.
#   bash bench/gpu.sh [--minutes N] [--parts NAME,...] [--output FOLDER] [--work FOLDER] [--tiny]
# --tiny runs everything at its smallest, also without a GPU. No network is used and DeepSpeed compiles nothing.
# PYTHON: the interpreter with torch (default: the project's own, else python3); WHEELS: folder with the packages that it
# lacks (deepspeed, peft, ...), which then go into an environment in the work folder.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

PACKAGES=(accelerate datasets deepspeed matplotlib numpy peft psutil safetensors tensorboard tokenizers transformers)
missing() {
    "$1" - "${PACKAGES[@]}" <<'PYTHON'
import importlib.util, sys
print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])
PYTHON
}

WORK=$HERE/bench/.work/gpu
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    ! [ -x "$HERE/.venv/bin/python" ] || PYTHON=$HERE/.venv/bin/python
fi
command -v "$PYTHON" >/dev/null || die "the interpreter $PYTHON does not exist; set PYTHON to one that has torch"
"$PYTHON" -c 'import torch' 2>/dev/null || die "$PYTHON has no torch; set PYTHON to an interpreter that has it"
lacking=$(missing "$PYTHON")
if [ -n "$lacking" ]; then
    [ -n "${WHEELS:-}" ] || die "$PYTHON lacks $lacking; set WHEELS to a folder with their wheels (pip download makes one)"
    [ -d "$WHEELS" ] || die "the folder of wheels $WHEELS does not exist"
    log "taking $lacking from $WHEELS"
    [ -x "$WORK/env/bin/python" ] || "$PYTHON" -m venv --system-site-packages "$WORK/env" >&2
    read -ra lacking <<<"$lacking"
    DS_BUILD_OPS=0 "$WORK/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-index \
        --no-build-isolation --find-links "$WHEELS" "${lacking[@]}" >&2 ||
        die "the folder $WHEELS does not hold all that ${lacking[*]} need; see pip's message above"
    PYTHON=$WORK/env/bin/python
fi
has_gpu || tune_cpu
exec "$PYTHON" "$HERE/bench/gpu.py" --work "$WORK" "$@"
