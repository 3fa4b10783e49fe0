"""What a curator decides about: similar questions with different intents, or questions that are probably mislabelled.

The similar-questions command writes pairs with the indices of their records. faq/score writes suspects with their line
in the training file, which as a rule holds prompts that are made already; so a suspect is looked for in the raw data by
its question and intent. It is a pair then whose right side is no record but the suggested intent.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from llmops import files, json_text
from llmops.console import UserError
from llmops.intents.questions import FaqRecord, read_faq
from serve.console.mount import holds_suspects
from serve.console.runs import number

FIRST = 50  # pairs that tell whether a report is about a data file


@dataclass(frozen=True)
class Pair:
    """Two questions with different intents; `questions` None for a whole record, where the report names none.

    `probability` of the right intent where the pair is a suspect, the same record and question on both sides.
    """

    key: str
    records: tuple[int, int]
    questions: tuple[str | None, str | None]
    intents: tuple[str, str]
    alike: bool
    probability: float | None = None

    @property
    def group(self) -> tuple[str, str]:
        """The two intents in one order."""
        return min(self.intents), max(self.intents)

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides that are of the data."""
        return (0, 1) if self.probability is None else (0,)


@dataclass(frozen=True)
class Suspect:
    """A question that is probably mislabelled, and the intent that fits better."""

    question: str
    intent: str
    suggested: str
    probability: float


@dataclass(frozen=True)
class Report:
    """What a command found: pairs, or suspects."""

    pairs: list[Pair]
    suspects: list[Suspect]


@dataclass(frozen=True)
class Data:
    """The records of a data file by index, and its intents in their order."""

    records: dict[int, FaqRecord]
    intents: list[str]


def read_report(path: Path) -> Report:
    """A report of either command. Raises UserError for another file."""
    return Report([], read_suspects(path)) if holds_suspects(path) else Report(read_pairs(path), [])


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a report, as the command wrote them. Raises UserError for another file."""
    cure = "the similar-questions command writes it with --output_file"
    found = files.read_object(path, "the pairs", cure).get("data")
    listed = found if isinstance(found, dict) else {}
    pairs: dict[str, Pair] = {}
    for key, alike, names in (
        ("mismatched_intents", False, ("intent1", "intent2")),
        ("similar_intents", True, ("intentPair",)),
    ):
        rows = listed.get(key)
        if not isinstance(rows, list):
            raise UserError(f"{path.name} has no list {key!r}; {cure}")
        for place, row in enumerate(rows):
            pair = pair_of(row, alike, names) if isinstance(row, dict) else None
            if pair is None:
                raise UserError(f"{path.name}: {key}[{place}] is {files.shown(row)}, expected a pair; {cure}")
            pairs.setdefault(pair.key, pair)
    return list(pairs.values())


def pair_of(row: dict[str, Any], alike: bool, names: tuple[str, ...]) -> Pair | None:
    """A row of a report, or None for what is none."""
    intents = row.get(names[0]) if len(names) == 1 else [row.get(name) for name in names]
    questions = [None, None] if alike else row.get("questionPair")
    records = row.get("lineNumbers")
    if not (is_two(intents, str) and is_two(questions, str | None) and is_two(records, int)):
        return None
    return Pair(key_of(records, questions, intents), tuple(records), tuple(questions), tuple(intents), alike)


def key_of(records: list[int], questions: list[str | None], intents: list[str]) -> str:
    """By what a pair is known."""
    return hashlib.sha256(json_text.dumps([records, questions, intents]).encode()).hexdigest()[:16]


def read_suspects(path: Path) -> list[Suspect]:
    """The suspects of a file, as the command wrote them. Raises UserError for another file."""
    cure = "faq/score.sh --suspects_file writes such a file"
    found = []
    for line in files.json_lines(path, "the suspects", cure):
        row = line.value if isinstance(line.value, dict) else {}
        texts = [row.get(name) for name in ("question", "intent", "suggested")]
        probability = number(row.get("probability"))
        if line.problem or probability is None or not all(isinstance(text, str) for text in texts):
            problem = line.problem or "no question with an intent, a suggested one and its probability"
            raise UserError(f"{path.name}:{line.number}: {problem}; {cure}")
        found.append(Suspect(row["question"], row["intent"], row["suggested"], probability))
    return found


def read_data(path: Path) -> Data:
    """The records of a data file; bad lines are passed over, as the command may have done."""
    records = read_faq(path, skip_bad_lines=True).records
    return Data({r.index: r for r in records}, list(dict.fromkeys(r.intent for r in records)))


def pairs_in(report: Report, data: Data, name: str, of: str) -> list[Pair]:
    """The pairs of a report (`name`) in its data (`of`). Raises UserError where one of the first is not there."""
    for pair in report.pairs[:FIRST]:
        refuse_strange(pair, data, name, of)
    return report.pairs or list(dict.fromkeys(placed(report.suspects, data, name, of)))


def placed(suspects: Iterable[Suspect], data: Data, name: str, of: str) -> Iterator[Pair]:
    """Suspects as pairs; those behind the first that are not in the data any more are left out."""
    places: dict[tuple[str, str], int] = {}
    for record in data.records.values():
        if not record.messages and not record.candidates:  # a prompt that is made already cannot be edited
            for question in record.questions:
                places.setdefault((question, record.intent), record.index)
    for count, suspect in enumerate(suspects):
        index = places.get((suspect.question, suspect.intent))
        if index is not None:
            question, intents = suspect.question, (suspect.intent, suspect.suggested)
            key = key_of([index, index], [question, question], list(intents))
            yield Pair(key, (index, index), (question, question), intents, False, suspect.probability)
        elif count < FIRST:
            raise UserError(
                f"{name} is not about {of}: the question {files.shown(suspect.question)} with the intent "
                f"{files.shown(suspect.intent)} is not there; choose the raw questions with intents that the training "
                "data was made of, or run faq/score.sh again"
            )


def fits(pair: Pair, data: Data) -> bool:
    """Whether a pair's records are in the data as the pair says."""
    found = [(data.records.get(pair.records[i]), pair.intents[i], pair.questions[i]) for i in pair.sides]
    return all(
        record is not None and record.intent == intent and (question is None or question in record.questions)
        for record, intent, question in found
    )


def refuse_strange(pair: Pair, found: Data, report: str, data: str) -> None:
    """Raise UserError for a pair that is not in the data."""
    if not fits(pair, found):
        raise UserError(
            f"{report} is not about {data}: its pair of the records {pair.records[0]} and {pair.records[1]} "
            "is not there; choose the file that the report was made of, or make the report again"
        )


def is_two(values: Any, kind: Any) -> TypeGuard[list[Any]]:
    """Whether a value is a list of two of a kind."""
    return isinstance(values, list) and len(values) == 2 and all(isinstance(value, kind) for value in values)
