"""Predictions of faq/predict: intents with counts, which are taken for which, the questions behind it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmops import files
from llmops.console import UserError
from llmops.intents.questions import INTENTS_NAME
from serve.console.evaluations import refuse_large, section
from serve.console.mount import KEPT_BYTES, Cached, Mounted, NotFound
from serve.console.runs import number, text

CURE = "faq/predict.sh --output_file writes such a file"
MOST_IN_MATRIX = 24


@dataclass(frozen=True)
class Prediction:
    """A question with what was predicted; `true` "" where it is not known."""

    place: int
    question: str
    intent: str
    true: str
    probability: float | None
    second: str
    second_probability: float | None


@dataclass(frozen=True)
class IntentRow:
    """An intent in the table: questions that have it, that were given it, and that have it and were given it."""

    name: str
    questions: int
    predicted: int
    right: int


@dataclass(frozen=True)
class Matrix:
    """Counts of (true, predicted) for the intents that are mistaken most; `largest` mistake, for the shade."""

    names: list[str]
    counts: Mapping[tuple[str, str], int]
    largest: int
    left_out: int


def read_predictions(path: Path) -> list[Prediction]:
    """The lines of a file of predictions. Raises UserError for one that is too large, or another file."""
    refuse_large(path)
    found: list[Prediction] = []
    for line in files.json_lines(path, "the predictions", CURE):
        row = section(line.value)
        if line.problem or not isinstance(row.get("intent"), str) or not isinstance(row.get("question"), str):
            raise UserError(f"{path.name}:{line.number}: {line.problem or 'no question with an intent'}; {CURE}")
        second = section(row.get("runner_up"))
        found.append(Prediction(
            len(found) + 1, row["question"], row["intent"], text(row.get("reference")), number(row.get("probability")),
            text(second.get("intent")), number(second.get("probability")),
        ))  # fmt: skip
    return found


def read_candidates(path: Path) -> list[str]:
    """The candidate intents of intents.json; none where it is damaged."""
    try:
        return list(section(files.read_object(path, "the intents").get("intents")))
    except UserError:
        return []


class Faq:
    """The predictions of a mount."""

    def __init__(self, mounted: Mounted) -> None:
        self.mounted = mounted
        self.predictions, self.candidates = Cached(read_predictions, KEPT_BYTES), Cached(read_candidates)

    def open(self, name: str) -> tuple[list[Prediction], list[str]]:
        """(predictions, candidate intents of the model that made them, where they are known)."""
        rows = self.predictions(self.mounted.file(name))
        folder = name.rpartition("/")[0]
        try:
            return rows, self.candidates(self.mounted.file(f"{folder}/{INTENTS_NAME}" if folder else INTENTS_NAME))
        except NotFound:
            return rows, []


def intents_of(rows: Sequence[Prediction], candidates: Sequence[str]) -> list[IntentRow]:
    """Every intent that is a candidate, true or predicted, the most questions first."""
    true, predicted = Counter(row.true for row in rows if row.true), Counter(row.intent for row in rows)
    right = Counter(row.true for row in rows if row.true == row.intent)
    names = dict.fromkeys([*candidates, *true, *predicted])
    table = [IntentRow(name, true[name], predicted[name], right[name]) for name in names]
    return sorted(table, key=lambda row: (-row.questions, -row.predicted))


def matrix_of(rows: Sequence[Prediction]) -> Matrix:
    """The confusions among the intents that are in most of them."""
    counts = Counter((row.true, row.intent) for row in rows if row.true)
    involved: Counter[str] = Counter()
    for (true, predicted), count in counts.items():
        if true != predicted:
            involved[true] += count
            involved[predicted] += count
    names = [name for name, _ in involved.most_common(MOST_IN_MATRIX)]
    mistakes = {pair: n for pair, n in counts.items() if pair[0] != pair[1]}
    inside = sum(n for (true, predicted), n in mistakes.items() if true in names and predicted in names)
    return Matrix(names, counts, max(mistakes.values(), default=0), sum(mistakes.values()) - inside)


def chosen(rows: Sequence[Prediction], true: str, predicted: str, below: float | None, wrong: bool, search: str) -> Any:
    """The questions that a reader asked for."""
    wanted = search.lower()
    return [
        row
        for row in rows
        if (not true or row.true == true)
        and (not predicted or row.intent == predicted)
        and (below is None or (row.probability is not None and row.probability < below))
        and not (wrong and row.true == row.intent)
        and (not wanted or wanted in f"{row.question} {row.intent} {row.true}".lower())
    ]
