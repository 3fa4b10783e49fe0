"""The questions of a file, laid out for the search: equal texts once, questions of one text and intent side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmops import files
from llmops.console import UserError, log
from llmops.intents.questions import FaqRecord, read_faq

if TYPE_CHECKING:
    import numpy as np

SEVERAL = -1  # in place of an intent: the text stands under several


@dataclass(frozen=True)
class Questions:
    """Unique texts and intents; nodes (one text under one intent); questions, sorted by node.

    `text_intent`: per text its intent, or SEVERAL. `node_start`, `node_count`: each text's nodes. `first`, `count`:
    each node's questions. `record`, `order`: each question's record and its place in the file. Texts of one intent
    stand side by side.
    """

    records: list[FaqRecord]
    texts: list[str]
    intents: list[str]
    text_intent: "np.ndarray"
    node_start: "np.ndarray"
    node_count: "np.ndarray"
    node_intent: "np.ndarray"
    node_text: "np.ndarray"
    first: "np.ndarray"
    count: "np.ndarray"
    record: "np.ndarray"
    order: "np.ndarray"


def read_questions(path: Path, skip_bad_lines: bool) -> Questions:
    """Read and lay out a file. Raises UserError for one that cannot be compared."""
    if files.is_folder(path):
        raise UserError(f"the data file {path} is a folder; pass the file with your questions and intents")
    try:
        found = read_faq(path, skip_bad_lines)
    except RecursionError as error:
        raise UserError(f"{path} is broken JSON: nested too deeply; expected questions with intents") from error
    except OSError as error:
        raise UserError(f"the data file {path} cannot be read ({error.strerror}); check its permissions") from error
    if found.problems:
        log(f"{len(found.problems)} bad lines of {path} are passed over")
    questions = lay_out(found.records)
    if len(questions.order) < 2:
        raise UserError(f"{path} has one question only; expected at least two to compare")
    log(
        f"{path}: {len(questions.order)} questions ({len(questions.texts)} different) with "
        f"{len(questions.intents)} intents in {len(found.records)} records, {found.kind}"
    )
    if len(questions.intents) == 1:
        log(f"every question has the intent {questions.intents[0]!r}, so no pair can differ in it")
    return questions


def lay_out(records: list[FaqRecord]) -> Questions:
    """Sort the questions by (text, intent). A text that one record holds twice counts once."""
    import numpy as np

    intents = {intent: i for i, intent in enumerate(dict.fromkeys(record.intent for record in records))}
    rows: list[tuple[str, int, int]] = []
    of_text: dict[str, int] = {}
    for number, record in enumerate(records):
        intent = intents[record.intent]
        for text in dict.fromkeys(record.questions):
            rows.append((text, intent, number))
            if of_text.setdefault(text, intent) != intent:
                of_text[text] = SEVERAL
    texts = sorted(of_text, key=of_text.__getitem__)  # stable: within an intent by first appearance
    place = {text: i for i, text in enumerate(texts)}
    text_of = np.fromiter((place[text] for text, _, _ in rows), np.int64, len(rows))
    intent_of = np.fromiter((intent for _, intent, _ in rows), np.int64, len(rows))
    order = np.lexsort((np.arange(len(rows)), intent_of, text_of))
    nodes, first, count = np.unique(
        text_of[order] * len(intents) + intent_of[order], return_index=True, return_counts=True
    )
    node_text = nodes // len(intents)
    _, node_start, node_count = np.unique(node_text, return_index=True, return_counts=True)
    record_of = np.fromiter((number for _, _, number in rows), np.int64, len(rows))
    return Questions(
        records, texts, list(intents), np.array([of_text[text] for text in texts]), node_start, node_count,
        nodes % len(intents), node_text, first, count, record_of[order], order,
    )  # fmt: skip
