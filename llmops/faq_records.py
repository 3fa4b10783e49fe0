"""FAQ data as users have it: questions, the intent they share, the reply. Read with line numbers, problems named.

Shapes, told apart by their keys, as JSON lines, one JSON array, or csv with a header:
    {"instruction", "question", "intent", "output"}                one question
    {"intruction", "input": "['怎么了？', ...]", "intent", "output"}   several, a list written as text; misspelt or not
    {"messages": [...]}                                            conversations whose prompts are made already
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmops import files, shapes
from llmops.console import UserError
from llmops.data_files import kind_of, read_chunks, rows_of
from llmops.records import BadRow, Message, Problem, problems_error

LITERAL_LIMIT = 1 << 20  # characters of a list that is written as text
INTENTS_NAME = "intents.json"  # beside the training data, and beside the model that learned it
PREPARED_NAME = ".prepare.json"  # beside the training data: what faq/prepare wrote, and whether all of it
QUESTION_KEYS = ("question", "text", "query", "问题")
LIST_KEY = "input"
INTENT_KEYS = ("intent", "category", "label", "意图")
REPLY_KEYS = ("output", "answer", "reply", "答案", "回复")
INSTRUCTION_KEYS = ("instruction", "intruction")


@dataclass(frozen=True)
class FaqRecord:
    """One record of a file: where it stands (line from 1, index from 0), its questions, intent and reply.

    `messages` is set for a conversation whose prompt is made already: its intent is the last answer, its question the
    last one asked, unless the row names it; `variant` is the candidate list that faq/prepare.py gave it. `intent` is
    "" where it may be missing and is.
    """

    line: int
    index: int
    questions: tuple[str, ...]
    intent: str
    reply: str = ""
    instruction: str = ""
    messages: tuple[Message, ...] = ()
    variant: int | None = None


@dataclass(frozen=True)
class FaqFile:
    """The usable records of a file, what is wrong with the others, and in words what kind of file it is."""

    path: Path
    kind: str
    records: list[FaqRecord]
    problems: list[Problem]


def refuse_unfinished(folder: Path) -> None:
    """Raise UserError where faq/prepare was killed between its files: they may not belong together."""
    path = folder / PREPARED_NAME
    if files.is_file(path) and files.read_object(path, "faq/prepare's list of its files").get("state") == "writing":
        raise UserError(
            f"faq/prepare was killed while it wrote to {folder}, so {INTENTS_NAME} and the data there may not belong "
            "together; run faq/prepare.sh again"
        )


def read_faq(path: Path, skip_bad_lines: bool = False, need_intent: bool = True) -> FaqFile:
    """Every record of a file. Raises UserError that names all bad lines, unless they are to be skipped; or no record.

    `need_intent` False: questions to be classified, whose intent may be missing.
    """
    shape, rows = raw_records(path)
    records: list[FaqRecord] = []
    problems: list[Problem] = []
    keys: dict[str, None] = {}
    count = 0
    for index, (line, raw, unreadable) in enumerate(rows):
        count += 1
        record, problem = (None, unreadable) if unreadable else check_record(raw, line, index, need_intent)
        if problem:
            problems.append(Problem(path, line, problem))
        elif record is not None:
            records.append(record)
            keys.update(dict.fromkeys(raw))
    if problems and not skip_bad_lines:
        raise problems_error(path, problems, count)
    if not records:
        raise UserError(f"{path} has no usable record ({len(problems)} were bad); expected questions with intents")
    return FaqFile(path, f"{shape} with {', '.join(map(str, keys))}", records, problems)


def raw_records(path: Path) -> tuple[str, Iterator[tuple[int, Any, str | None]]]:
    """(shape in words, records as (line, parsed value, problem))."""
    files.open_regular(path, "the data file", "pass the file with your questions and intents").close()
    kinds = {"csv": "csv", "array": "a JSON array", "lines": "JSON lines"}
    kind = kinds.get(kind_of(path), "a table")
    return kind, (row for chunk in read_chunks([path]) for row in rows_of(chunk))


def check_record(raw: Any, line: int, index: int, need_intent: bool) -> tuple[FaqRecord | None, str | None]:
    """(record, None), or (None, what is wrong with it)."""
    if not isinstance(raw, dict):
        return None, f"found {files.kind_of(raw)}, expected an object with a question and its intent"
    if "messages" in raw:
        return conversation_record(raw, line, index)
    questions, problem = find_questions(raw)
    if problem:
        return None, problem
    intent = first_text(raw, INTENT_KEYS)
    if intent is None and need_intent:
        found = ", ".join(map(files.shown, list(raw)[:6])) or "none"
        return None, f"no intent (keys found: {found}); expected a text under {INTENT_KEYS[0]!r}"
    if not intent and need_intent:
        return None, "the intent is empty; expected its name, or 不符合 for a question that none fits"
    if intent and "\n" in intent:
        return None, newline_problem(intent)
    for key in (*REPLY_KEYS, *INSTRUCTION_KEYS):
        if not isinstance(raw.get(key, ""), str | None):
            return None, f"{files.shown(key)} is {files.shown(raw[key])}, expected a text"
    reply, instruction = (first_text(raw, keys) or "" for keys in (REPLY_KEYS, INSTRUCTION_KEYS))
    return FaqRecord(line, index, questions, intent or "", reply, instruction), None


def conversation_record(raw: dict[str, Any], line: int, index: int) -> tuple[FaqRecord | None, str | None]:
    """`check_record` for a row with messages."""
    try:
        messages = tuple(shapes.from_messages(raw).messages)
    except BadRow as error:
        return None, str(error)
    intent = messages[-1]["content"].strip()
    if "\n" in intent:
        return None, newline_problem(intent)
    question = first_text(raw, QUESTION_KEYS) or messages[-2]["content"]
    variant = raw.get("variant")
    return FaqRecord(
        line, index, (question,), intent, messages=messages, variant=variant if isinstance(variant, int) else None
    ), None


def newline_problem(intent: str) -> str:
    """The sentence for an intent that is no single line."""
    return f"the intent {files.shown(intent)} has a line break; expected a name on one line"


def find_questions(raw: dict[str, Any]) -> tuple[tuple[str, ...], str | None]:
    """(questions, None), or ((), what is wrong with them)."""
    if LIST_KEY in raw and raw[LIST_KEY] not in (None, ""):
        value = raw[LIST_KEY]
        if isinstance(value, str):
            value = list_literal(value)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            found = files.shown(raw[LIST_KEY], 40)
            return (), f"'input' is {found}, expected a list of questions such as \"['怎么了？', '出什么事了']\""
    else:
        text = first_text(raw, QUESTION_KEYS)
        if text is None:
            found = ", ".join(map(files.shown, list(raw)[:6])) or "none"
            return (), f"no question (keys found: {found}); expected a text under 'question' or a list under 'input'"
        value = [text]
    questions = tuple(item.strip() for item in value)
    if not questions or not all(questions):
        return (), "an empty question; expected text"
    return questions, None


def list_literal(text: str) -> Any:
    """The value of a Python literal, as the original's data has them; None for a text that is none or is too long."""
    if len(text) > LITERAL_LIMIT or text.count("[") + text.count("(") + text.count("{") > files.MAX_DEPTH:
        return None  # the parser's memory and stack grow with both
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return None
    texts = [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
    return value if all(map(files.encodable, texts)) else None


def first_text(raw: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """The stripped text under the first of these keys that is there."""
    for key in keys:
        if isinstance(raw.get(key), str):
            return raw[key].strip()
    return None
