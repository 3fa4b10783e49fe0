#!/usr/bin/env bash
# Evaluation speed side by side with lm-evaluation-harness: same model of about 40M weights, same prompts, same answers.
#   bash bench/evaluation.sh [options of bench/evaluation.py]
# DATA: folder with cmrc2018/ (without it the shipped samples serve). PEER_PYTHON: a Python that has lm-eval; without it
# an environment is made in bench/.work from bench/peers/requirements-lm-eval.txt.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

DATA=${DATA:-$HERE/../shared/data}
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
if [ -z "${PEER_PYTHON:-}" ]; then
    PEER_PYTHON=$HERE/bench/.work/lm-eval/bin/python
    [ -x "$PEER_PYTHON" ] || "$PYTHON" -m venv "$HERE/bench/.work/lm-eval"
    "$PEER_PYTHON" -m pip install --quiet --requirement "$HERE/bench/peers/requirements-lm-eval.txt" >&2
fi
has_gpu || tune_cpu
exec "$PYTHON" "$HERE/bench/evaluation.py" --work "$HERE/bench/.work/evaluation" --data "$DATA" --peer_python "$PEER_PYTHON" "$@"
