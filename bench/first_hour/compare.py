"""What bench/first_hour.sh asks, and what it prints.

python bench/first_hour/compare.py questions                     the questions, each a conversation of its own
python bench/first_hour/compare.py results FOLDER SECONDS...     the answers of base and tuned model, as JSON
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from sacrebleu.metrics import CHRF

HERE = Path(__file__).resolve().parent


def rows(name: str) -> list[dict[str, Any]]:
    """The records of a file of this folder."""
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def asked() -> list[tuple[str, str]]:
    """(question, right answer): first those that are learned, then each of them in other words."""
    learned = [tuple(message["content"] for message in row["messages"]) for row in rows("conversations.jsonl")]
    return [*learned, *((row["question"], row["answer"]) for row in rows("asked.jsonl"))]


def compare(answers: list[str], half: slice) -> dict[str, Any]:
    """How many answers are right to the letter, and how near all are (chrF of sacrebleu, 0 to 100)."""
    right = [answer for _, answer in asked()][half]
    given = answers[half]
    return {
        "questions": len(right),
        "to the letter": sum(one == other for one, other in zip(given, right, strict=True)),
        "chrF": round(CHRF().corpus_score(given, [right]).score, 1),
    }


def answers_of(text: str) -> dict[str, list[str]]:
    """{model: its answers in the order of the questions} from what serve/chat.py --compare true writes."""
    found: dict[str, list[str]] = {}
    _, *parts = re.split(r"^\[(base|tuned)\] ", text, flags=re.MULTILINE)
    for name, answer in zip(parts[::2], parts[1::2], strict=True):
        found.setdefault(name, []).append(answer.strip())
    return found


def results(folder: Path, seconds: list[int]) -> dict[str, Any]:
    """The object that is printed."""
    general: dict[str, Any] = dict(zip(("seconds of training", "seconds until all answers"), seconds[:2], strict=True))
    half = len(rows("conversations.jsonl"))
    for name, answers in answers_of((folder / "answers.txt").read_text(encoding="utf-8")).items():
        general[name] = {"learned": compare(answers, slice(half)), "other words": compare(answers, slice(half, None))}
    score = json.loads((folder / "score.json").read_text(encoding="utf-8"))
    kept = ("questions", "accuracy", "accuracy_interval")
    faq = {"seconds": seconds[2], "model": {key: score["results"][0][key] for key in kept}}
    faq |= {key: score[key] for key in ("baselines", "recommendation")}
    return {"general": general, "faq": faq}


if __name__ == "__main__":
    if sys.argv[1] == "questions":
        print("\n\n".join(question for question, _ in asked()))
    else:
        print(json.dumps(results(Path(sys.argv[2]), [int(one) for one in sys.argv[3:]]), ensure_ascii=False, indent=2))
