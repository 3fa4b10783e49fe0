#!/usr/bin/env bash
# The first hour of a team with very little data: 12 conversations and 40 questions with 8 intents, all settings at their
# defaults. How long until a model answers a question of that data, and how many it gets right.
#   MODEL=mnt/Qwen1.5-7B-Chat bash bench/first_hour.sh
# The data is bench/first_hour/, in Chinese, of a bicycle shop that does not exist. Prints one JSON object.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

[ -n "${MODEL:-}" ] || die "set MODEL to the folder of a chat model"
DATA=$HERE/bench/first_hour
WORK=${WORK:-$HERE/bench/.work/first_hour}
PYTHON=$(ensure_python "$HERE" "$HERE/requirements.txt") || exit 2
[ ! -e "$WORK" ] || die "$WORK is there from an earlier time; move it away, or set WORK to another folder"
mkdir -p "$WORK/general/datasets" "$WORK/faq"
cp "$DATA/conversations.jsonl" "$WORK/general/datasets/train.jsonl"

begin=$SECONDS
bash "$HERE/chat_main.sh" --mount_path "$WORK/general" --model_name_or_path "$MODEL" >&2
trained=$((SECONDS - begin))
"$PYTHON" "$DATA/compare.py" questions | bash "$HERE/serve/chat.sh" --model_name_or_path "$WORK/general/output_path" \
    --compare true --max_new_tokens 64 >"$WORK/answers.txt"
general=$((SECONDS - begin))
begin=$SECONDS
bash "$HERE/faq/run_all.sh" --data_file "$DATA/questions.jsonl" --mount_path "$WORK/faq" --model_name_or_path "$MODEL" \
    --embedding_model "${EMBEDDING_MODEL:-}" >"$WORK/score.json"
faq=$((SECONDS - begin))
exec "$PYTHON" "$DATA/compare.py" results "$WORK" "$trained" "$general" "$faq"
