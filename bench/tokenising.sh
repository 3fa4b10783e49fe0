#!/usr/bin/env bash
# From a file of conversations to tokens on disk, as jsonl and as parquet: time, peak memory and second start.
#   bash bench/tokenising.sh --model FOLDER [options of bench/tokenising.py]    1,000,000 conversations
# DATA: folder with alpaca_zh/.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

DATA=${DATA:-$HERE/../shared/data}
for file in alpaca_zh/train.jsonl alpaca_zh/test.jsonl; do
    [ -f "$DATA/$file" ] || die "$DATA/$file does not exist; set DATA to a folder that holds it"
done
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
has_gpu || tune_cpu
exec "$PYTHON" "$HERE/bench/tokenising.py" --data "$DATA/alpaca_zh" --conversations 1000000 "$@"
