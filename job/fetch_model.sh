#!/usr/bin/env bash
# Get a model from the Hugging Face hub into the local cache and print its folder: job/run.sh with FETCH=true.
#   bash job/fetch_model.sh OWNER/NAME
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

[ $# = 1 ] || die "one hub id is needed, such as Qwen/Qwen1.5-7B-Chat"
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
exec "$PYTHON" "$HERE/job/fetch_model.py" "$1"
