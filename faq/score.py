"""How good predictions of faq/predict.sh are, from files whose questions have a true intent.

python faq/score.py predictions.jsonl [unconstrained.jsonl ...]
Prints one JSON object on stdout: {"results": [one per file]}; draws the confusions of the first file.

Definitions: accuracy is the share of questions whose predicted intent is the true one. Precision, recall and F1 of an
intent are of one against the rest; macro F1 is their plain mean over the true intents, those predicted by mistake
included when they are candidates (as in scikit-learn's default). The standard error is that of a proportion.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faq.catalog import load_catalog, wording_of
from llmops import files, pictures
from llmops.console import Parser, UserError, log, run_main
from llmops.faq_records import INTENTS_NAME

TOP_PAIRS = 10


def build_parser() -> argparse.ArgumentParser:
    """Every setting with its default."""
    parser = Parser(prog="score.py", description="Score intent predictions.", allow_abbrev=False)
    parser.add_argument("predictions", nargs="+", help="output files of faq/predict.sh")
    parser.add_argument("--picture", default="", help="PNG of the confusions; empty: beside the first file")
    parser.add_argument("--intents_file", default="", help=f"{INTENTS_NAME}; empty: beside the first file")
    return parser


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The lines of a file. Raises UserError for a line that is no prediction with a true intent."""
    found = []
    cure = "faq/predict.sh --output_file writes such a file"
    for number, row, problem in files.json_lines(path, "the predictions", cure):
        if problem:
            raise UserError(f"{path}:{number}: {problem}")
        is_row = isinstance(row, dict)
        wrong = [key for key in ("intent", "reference") if not is_row or not isinstance(row.get(key), str)]
        if wrong:
            raise UserError(
                f"{path}:{number}: no {wrong[0]!r}; expected a prediction of faq/predict.sh for a question "
                "whose true intent is known"
            )
        flags = [key for key in ("known", "constrained") if not isinstance(row.get(key, True), bool)]
        if flags:
            raise UserError(f"{path}:{number}: {flags[0]!r} is {files.shown(row[flags[0]])}, expected true or false")
        found.append(row)
    if not found:
        raise UserError(f"{path} is empty; expected predictions of faq/predict.sh")
    return found


def rates(pairs: Sequence[tuple[str, str]], intent: str) -> dict[str, float]:
    """Precision, recall and F1 of one intent against the rest; 0 where there is nothing to divide by."""
    hits = sum(true == predicted == intent for true, predicted in pairs)
    predicted_as = sum(predicted == intent for _, predicted in pairs)
    support = sum(true == intent for true, _ in pairs)
    precision, recall = hits / predicted_as if predicted_as else 0.0, hits / support if support else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": round(precision, 4), "recall": round(recall, 4), "f1": round(f1, 4), "support": support}


def score(rows: Sequence[dict[str, Any]], none: str) -> dict[str, Any]:
    """All figures of one file; `rows` have intent, reference, and may have known and constrained."""
    pairs = [(row["reference"], row["intent"]) for row in rows]
    outside = sum(not row.get("known", True) for row in rows)
    right = sum(true == predicted for true, predicted in pairs)
    accuracy = right / len(pairs)
    judged = {true for true, _ in pairs} | {row["intent"] for row in rows if row.get("known", True)}
    by_intent = {intent: rates(pairs, intent) for intent in sorted(judged)}
    confused = Counter(pair for pair in pairs if pair[0] != pair[1])
    return {
        "constrained": all(row.get("constrained", True) for row in rows),
        "questions": len(pairs),
        "accuracy": round(accuracy, 4),
        "accuracy_standard_error": round(math.sqrt(accuracy * (1 - accuracy) / len(pairs)), 4),
        "macro_f1": round(sum(found["f1"] for found in by_intent.values()) / len(by_intent), 4),
        "none_of_the_intents": rates(pairs, none),
        "outside_the_candidates": outside,
        "most_confused": [
            {"intent": true, "predicted": predicted, "count": count}
            for (true, predicted), count in confused.most_common(TOP_PAIRS)
        ],
        "per_intent": {
            intent: {"accuracy": found["recall"], "questions": found["support"]}
            for intent, found in by_intent.items()
            if found["support"]
        },
    }


def draw(rows: Sequence[dict[str, Any]], result: dict[str, Any], path: Path) -> None:
    """A confusion matrix of the intents in the most confused pairs: true intents in rows, predictions in columns."""
    names: dict[str, None] = {}
    for pair in result["most_confused"]:
        names.update(dict.fromkeys((pair["intent"], pair["predicted"])))
    shown = list(names)
    counts = Counter((row["reference"], row["intent"]) for row in rows)
    labels = pictures.prepare_labels(shown)
    import matplotlib.pyplot as plt

    size = max(4.5, 0.45 * len(shown) + 2.5)
    figure, axes = plt.subplots(figsize=(size, size), dpi=120, layout="constrained")
    matrix = [[counts[true, predicted] for predicted in shown] for true in shown]
    mistakes = max(counts[pair["intent"], pair["predicted"]] for pair in result["most_confused"])
    axes.imshow([[n if i != j else 0 for j, n in enumerate(row)] for i, row in enumerate(matrix)], cmap="Reds",
                vmin=0, vmax=mistakes)  # fmt: skip
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            if count:
                color = "#2e7d5b" if i == j else "white" if count > 0.6 * mistakes else "#333333"
                axes.text(j, i, str(count), ha="center", va="center", fontsize=9, color=color)
    axes.set_xticks(range(len(shown)), labels, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true intent")
    axes.set_title(f"The {len(result['most_confused'])} most confused pairs of {len(rows)} questions, accuracy "
                   f"{result['accuracy']:.1%}", fontsize=10)  # fmt: skip
    pictures.save(figure, path)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Score every file, draw the first one's confusions; what is printed."""
    paths = [Path(name) for name in arguments.predictions]
    read = [read_predictions(path) for path in paths]
    intents = Path(arguments.intents_file or paths[0].with_name(INTENTS_NAME))
    given = arguments.intents_file or intents.is_file()
    none = load_catalog(intents).none if given else wording_of("auto").none
    results = [{"file": str(path)} | score(rows, none) for path, rows in zip(paths, read, strict=True)]
    picture = Path(arguments.picture) if arguments.picture else paths[0].with_suffix(".png")
    pictures.refuse_other(picture)
    if results[0]["most_confused"]:
        draw(read[0], results[0], picture)
        log(f"confusions drawn in {picture}")
    return {"results": results}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""

    def body() -> int:
        files.print_json(run(build_parser().parse_args(argv)))
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
