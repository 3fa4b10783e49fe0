"""FAQ data as users have it: questions, the intent they share, the reply. Read with line numbers, problems named.

Shapes, told apart by their keys, as JSON lines, one JSON array, or csv with a header:
    {"instruction", "question", "intent", "output"}                one question
    {"intruction", "input": "['怎么了？', ...]", "intent", "output"}   several, a list written as text; misspelt or not
    {"instruction", "input": "问题: Q\n候选类别: A\nB\n...", "output": "A"}   one, with a list of candidates of its own
    {"messages": [...]}                                            conversations whose prompts are made already
"""

import ast
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from llmops import files, json_text
from llmops.console import UserError, run_main
from llmops.conversations import shapes
from llmops.conversations.data_files import kind_of, list_files, read_chunks, rows_of, tests_beside
from llmops.conversations.records import BadRow, Message, Problem, problems_error

LITERAL_LIMIT = 1 << 20  # characters of a list that is written as text
INTENTS_NAME = "intents.json"  # beside the training data, and beside the model that learned it
PREPARED_NAME = ".prepare.json"  # beside the training data: what faq/prepare wrote, and whether all of it
QUESTION_KEYS = ("question", "text", "query", "问题")
LIST_KEY = "input"
INTENT_KEYS = ("intent", "category", "label", "意图", "类别", "分类")
NONE_FITS = "不符合"  # the answer when no candidate fits, in the templates and in the original's data
CONVERTED = re.compile(r"问题[:：]([\s\S]*?)\n\s*候选类别[:：]([\s\S]*)")
FINAL_MARKS = ".,;:!?~。、·"  # as NFKC writes them
OTHER_DATA = 3  # the exit code
EXPORT_ROWS = 200  # that tell whether a file is an export
REPLY_KEYS = ("output", "answer", "reply", "答案", "回复")
INSTRUCTION_KEYS = ("instruction", "intruction")


@dataclass(frozen=True, slots=True)
class FaqRecord:
    """One record of a file: where it stands (line from 1, index from 0), its questions, intent and reply.

    `messages` is set for a conversation whose prompt is made already: its intent is the last answer, its question the
    last one asked, unless the row names it; `variant` is the candidate list that faq/prepare.py gave it, `candidates`
    the one that the row itself has. `intent` is "" where it may be missing and is.
    """

    line: int
    index: int
    questions: tuple[str, ...]
    intent: str
    reply: str = ""
    instruction: str = ""
    messages: tuple[Message, ...] = ()
    variant: int | None = None
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class FaqFile:
    """The usable records of a file, what is wrong with the others, and in words what kind of file it is."""

    path: Path
    kind: str
    records: list[FaqRecord]
    problems: list[Problem]


class BadRecords(UserError):
    """Records that cannot be used; `others` are those of the file that can."""

    def __init__(self, text: str, others: FaqFile) -> None:
        super().__init__(text)
        self.others = others


def refuse_unfinished(folder: Path) -> None:
    """Raise UserError where faq/prepare was killed between its files: they may not belong together."""
    path = folder / PREPARED_NAME
    if files.is_file(path) and files.read_object(path, "faq/prepare's list of its files").get("state") == "writing":
        raise UserError(
            f"faq/prepare was killed while it wrote to {folder}, so {INTENTS_NAME} and the data there may not belong "
            "together; run faq/prepare.sh again"
        )


def read_faq(path: Path, skip_bad_lines: bool = False, need_intent: bool = True, with_prompts: bool = True) -> FaqFile:
    """Every record of a file. Raises UserError that names all bad lines, unless they are to be skipped; or no record.

    `need_intent` False: questions to be classified, whose intent may be missing. `with_prompts` False: records without
    their messages, of which a million are gigabytes.
    """
    shape, rows = raw_records(path)
    refuse_exported(path)
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
            records.append(record if with_prompts else replace(record, messages=()))
            keys.update(dict.fromkeys(raw))
    found = FaqFile(path, f"{shape} with {', '.join(map(str, keys))}", records, problems)
    if problems and not skip_bad_lines:
        raise BadRecords(str(problems_error(path, problems, count)), found)
    if not records:
        raise UserError(f"{path} has no usable record ({len(problems)} were bad); expected questions with intents")
    return found


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
    converted = None if "intent" in raw else converted_parts(raw.get(LIST_KEY))
    if converted:
        return converted_record(raw, *converted, line, index, need_intent)
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


def converted_parts(text: object) -> tuple[str, tuple[str, ...]] | None:
    """(question, its own candidates in their order) of an `input` that holds both; None for any other."""
    match = CONVERTED.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        return None
    return match[1].strip(), tuple(dict.fromkeys(filter(None, map(str.strip, match[2].split("\n")))))


def converted_record(
    raw: dict[str, Any], question: str, candidates: tuple[str, ...], line: int, index: int, need_intent: bool
) -> tuple[FaqRecord | None, str | None]:
    """`check_record` for a row that brings its candidates: its answer is one of them, or says that none fits."""
    intent = first_text(raw, ("output",)) or ""
    if not question or len(candidates) < 2:
        return None, "'input' has no question or fewer than two candidates after 候选类别; expected both"
    if not intent and need_intent:
        return None, "'output' is empty; expected the intent, one of the candidates of 'input'"
    if intent and intent not in (*candidates, NONE_FITS):
        return (
            None,
            f"the intent {files.shown(intent)} is not among its own candidates, and not {NONE_FITS}; mend either",
        )
    instruction = first_text(raw, INSTRUCTION_KEYS) or ""
    return FaqRecord(line, index, (question,), intent, instruction=instruction, candidates=candidates), None


def kind_of_data(path: Path) -> str:
    """`raw` for questions with intents, `prepared` for conversations, by the first row that can be read; else "".

    Raises UserError for conversations that were exported from FAQ data.
    """
    refuse_exported(path)
    for chunk in read_chunks([path], 1):
        for _, value, problem in rows_of(chunk):
            if problem is None and isinstance(value, dict):
                if "messages" in value:
                    return "prepared"
                known = "intent" in value or converted_parts(value.get(LIST_KEY)) is not None
                return "raw" if known or first_text(value, INTENT_KEYS) else ""
    return ""


def refuse_exported(path: Path) -> None:
    """Raise UserError for conversations in which question and intent are asked and the reply is the answer.

    So the original's platform exports FAQ data. In a prompt for an intent the answer stands among the candidates;
    there the question's second line is the intent and the answer, a reply, stands nowhere before.
    """
    seen = 0
    for chunk in islice(read_chunks([path], EXPORT_ROWS), 1):
        for _, value, problem in rows_of(chunk):
            messages = value.get("messages") if problem is None and isinstance(value, dict) else None
            said = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
            texts = [text for text in said if isinstance(text, str)]
            if not 2 <= len(texts) <= 3 or len(texts) < len(said):
                return
            asked = texts[-2].strip()
            if asked.count("\n") != 1 or any(texts[-1].strip() in text for text in texts[:-1]):
                return
            seen += 1
    if seen > 1:
        raise UserError(
            f"{path} holds conversations exported from FAQ data: each asks a question with its intent on the next line "
            "and answers with the reply, so the replies would be taken for intents; give the questions with their "
            "intents (instruction, question, intent, output), or learn the replies with SCENARIO=general"
        )


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
    if len(text) > LITERAL_LIMIT or text.count("[") + text.count("(") + text.count("{") > json_text.MAX_DEPTH:
        return None  # the parser's memory and stack grow with both
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # of thousands of signs the last two
        return None
    texts = [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
    return value if all(map(json_text.encodable, texts)) else None


def compared(text: str) -> str:
    """What two texts share that ask the same: NFKC, without case, blanks and the marks at the end."""
    plain = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.rstrip(FINAL_MARKS) or plain


def first_text(raw: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """The stripped text under the first of these keys that is there."""
    for key in keys:
        if isinstance(raw.get(key), str):
            return raw[key].strip()
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m llmops.intents.questions FILES`: 0 for questions with intents, 3 for anything else, 2 with a sentence.

    chat_main.sh asks whether its training files have to be prepared before they are learned, and which test file is
    beside them, which is printed. 1 is Python's own, for a crash.
    """

    def body() -> int:
        given = (sys.argv[1:] if argv is None else argv)[0]
        try:
            paths = list_files(given)
        except UserError:  # the check of all settings says so, with what else is wrong
            return OTHER_DATA
        kinds = {path: kind_of_data(path) for path in paths if files.is_file(path)}
        raw, prepared = ([path for path, kind in kinds.items() if kind == which] for which in ("raw", "prepared"))
        if raw and prepared:
            raise UserError(
                f"{raw[0]} holds questions with intents and {prepared[0]} conversations; prepare the questions first "
                "(faq/prepare.sh), or learn one of the two"
            )
        if not raw:
            return OTHER_DATA
        print(*tests_beside(paths), end="")
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
