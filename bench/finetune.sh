#!/usr/bin/env bash
# Fine-tuning side by side with LLaMA-Factory and TRL on this machine: seconds, samples/s, peak memory, ratios.
#   bash bench/finetune.sh [options of bench/finetune.py]
# PEERS: folder of the peers' environments (made when missing); DATA: folder with alpaca_zh/ and banking77/.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

WORK=$HERE/bench/.work
PEERS=${PEERS:-$WORK/peers}
DATA=${DATA:-$HERE/../shared/data}
for file in alpaca_zh/train.jsonl banking77/train.csv; do
    [ -f "$DATA/$file" ] || die "$DATA/$file does not exist; set DATA to a folder that holds it"
done
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
[ -x "$PEERS/llamafactory/bin/python" ] || PYTHON=$PYTHON bash "$HERE/bench/peers/install.sh" "$PEERS" >&2
# the same allocator settings for everybody, those that chat_main.sh uses
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
exec "$PYTHON" "$HERE/bench/finetune.py" --work "$WORK" --peers "$PEERS" --data "$DATA" "$@"
