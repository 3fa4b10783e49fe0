"""FAQ data with a curator's decisions carried out: a new file of rows, and what changed. The original stays as it is.

A row keeps its keys. A question that gets another intent leaves its row for one of its own when the row has several;
the reply is then the one that the other intent has, or none where it has none: the old one is about something else. Of
two intents that became one the name that stays has the reply, or else the other. A question that stands under its new
intent already is not written twice. Of two decisions about one question a drop wins over a new intent, and the later
intent over the earlier one.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmops import files, json_text
from llmops.console import UserError
from llmops.intents.questions import INTENT_KEYS, LIST_KEY, QUESTION_KEYS, REPLY_KEYS, FaqRecord, raw_records, read_faq

Row = dict[str, Any]


@dataclass
class Edits:
    """What decisions come to: questions by (record's index, text), intents that go into another one."""

    dropped: set[tuple[int, str]] = field(default_factory=set)
    relabelled: dict[tuple[int, str], str] = field(default_factory=dict)
    merged: dict[str, str] = field(default_factory=dict)

    def merge(self, gone: str, into: str) -> None:
        """Let one intent go into another; an earlier merge that this one turns around is taken back."""
        if self.final(into) == gone:
            self.merged.pop(into, None)
        if self.final(into) != gone:
            self.merged[gone] = into

    def final(self, intent: str) -> str:
        """The intent that takes this one's place, or itself."""
        seen = set()
        while intent in self.merged and intent not in seen:
            seen.add(intent)
            intent = self.merged[intent]
        return intent


@dataclass
class Cleaned:
    """Rows to write, and what changed of them."""

    rows: list[Row] = field(default_factory=list)
    changes: list[Row] = field(default_factory=list)
    bad_lines: int = 0
    questions_before: int = 0
    questions_after: int = 0


def clean(path: Path, edits: Edits) -> Cleaned:
    """Carry out edits on the rows of a file. Raises UserError for a row that cannot be edited."""
    records = {record.index: record for record in read_faq(path, skip_bad_lines=True).records}
    replies: dict[str, str] = {}
    of_merged: dict[str, str] = {}
    held: set[tuple[str, str]] = set()  # (question, intent) that stay where they are
    for record in records.values():
        if record.reply:
            replies.setdefault(record.intent, record.reply)
            of_merged.setdefault(edits.final(record.intent), record.reply)
        for question in record.questions:
            place = record.index, question
            if place not in edits.dropped and place not in edits.relabelled and record.intent not in edits.merged:
                held.add((question, record.intent))
    cleaned, replies = Cleaned(), of_merged | replies
    for index, (line, raw, _) in enumerate(raw_records(path)[1]):
        read = records.get(index)
        if read is None:
            cleaned.bad_lines += 1
            continue
        cleaned.questions_before += len(read.questions)
        for row, questions in edited(raw, read, edits, replies, held, cleaned.changes, f"{path.name}:{line}"):
            cleaned.rows.append(row)
            cleaned.questions_after += len(questions)
    return cleaned


def edited(
    raw: Row, record: FaqRecord, edits: Edits, replies: Mapping[str, str], held: set[tuple[str, str]],
    changes: list[Row], where: str,
) -> Iterator[tuple[Row, list[str]]]:  # fmt: skip
    """(row, its questions) of what becomes of a row; what changed is added to `changes` and `held`."""
    by_intent: dict[str, list[str]] = {edits.final(record.intent): []}  # what stays comes first
    changed = False
    for question in record.questions:
        place = record.index, question
        intent = edits.final(edits.relabelled.get(place, record.intent))
        told = {"record": record.index, "question": question, "intent": record.intent}
        if place in edits.dropped:
            changes.append(told | {"change": "dropped"})
            changed = True
            continue
        if intent != record.intent:
            changed = True
            if (question, intent) in held:
                changes.append(told | {"change": "dropped", "because": f"it stands under {intent} already"})
                continue
            held.add((question, intent))
            kind = "relabelled" if place in edits.relabelled else "merged"
            changes.append(told | {"change": kind, "to": intent})
        by_intent.setdefault(intent, []).append(question)
    if not changed:
        yield raw, list(record.questions)
        return
    if record.messages or record.candidates:
        raise UserError(
            f"{where} holds a prompt that is made already, in which the intents stand, too; decide about the raw "
            "questions with intents that it was made of"
        )
    for intent, questions in by_intent.items():
        if questions:
            yield row_with(raw, record, questions, intent, replies), questions


def row_with(raw: Row, record: FaqRecord, questions: Sequence[str], intent: str, replies: Mapping[str, str]) -> Row:
    """A copy of a row with other questions and another intent."""
    row = dict(raw)
    if row.get(LIST_KEY) not in (None, ""):
        as_text = isinstance(row[LIST_KEY], str)
        row[LIST_KEY] = repr(list(questions)) if as_text else list(questions)
    else:
        row[first_key(raw, QUESTION_KEYS)] = questions[0]
    if intent != record.intent:
        row[first_key(raw, INTENT_KEYS)] = intent
        for key in [key for key in REPLY_KEYS if key in row] or ([REPLY_KEYS[0]] if intent in replies else []):
            if intent in replies:
                row[key] = replies[intent]
            else:
                del row[key]
    return row


def first_key(raw: Row, keys: Sequence[str]) -> str:
    """The first of these keys under which a row has a text, as llmops/intents/questions.py reads it."""
    return next((key for key in keys if isinstance(raw.get(key), str)), keys[0])


def write(path: Path, cleaned: Cleaned, target: Path, changes: Path, decisions: int, unfit: Sequence[Row]) -> Row:
    """Write the rows, then what changed; the summary that is in it. Raises UserError over a file of somebody else.

    `unfit`: those of the decisions that were not applied.
    """
    if (target.exists() and not changes.exists()) or target.is_symlink() or changes.is_symlink():
        raise UserError(f"{target.name} is there and was not written here; move it away, then write again")
    kinds = Counter(change["change"] for change in cleaned.changes)
    summary = {
        "data": path.name, "cleaned": target.name, "decisions": decisions, "not_applied": len(unfit),
        "rows": len(cleaned.rows),
        "questions_before": cleaned.questions_before, "questions_after": cleaned.questions_after,
        "bad_lines_left_out": cleaned.bad_lines,
        **{kind: kinds[kind] for kind in ("relabelled", "merged", "dropped")},
    }  # fmt: skip
    files.write_json(changes, summary | {"changes": cleaned.changes, "decisions_not_applied": list(unfit)})
    files.write_text(target, "".join(json_text.dumps(row) + "\n" for row in cleaned.rows))
    return summary
