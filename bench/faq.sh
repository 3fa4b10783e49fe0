#!/usr/bin/env bash
# The FAQ scenario on banking77: a model of about 10M weights from scratch, its accuracy, and how fast it answers
# against transformers' own constrained generation, which computes the prompt anew for every question.
#   bash bench/faq.sh [options of bench/faq.py]
# DATA: folder with banking77/.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

DATA=${DATA:-$HERE/../shared/data}
for file in banking77/train.csv banking77/test.csv; do
    [ -f "$DATA/$file" ] || die "$DATA/$file does not exist; set DATA to a folder that holds it"
done
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
has_gpu || tune_cpu
exec "$PYTHON" "$HERE/bench/faq.py" --work "$HERE/bench/.work/faq" --data "$DATA/banking77" "$@"
