"""JSON as texts: read strictly, what is wrong said in words with its place; written as any program reads it."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmops.keyboard import FULL_WIDTH

MAX_DEPTH = 64  # of lists and objects within each other
JSON_BLANK = re.compile(r"[ \t\r\n]*")
MARKS = {wide: mark for wide, mark in FULL_WIDTH.items() if mark in ':,"{}[]'}  # of JSON
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BadJson(ValueError):
    """A text that is no JSON of ours: what is wrong in words, and where (line and column from 1, 0 for nowhere)."""

    def __init__(self, problem: str, line: int = 0, column: int = 0) -> None:
        super().__init__(problem)
        self.problem, self.line, self.column = problem, line, column


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises BadJson for what is none, and for what no other program should have to take.

    That is: more than MAX_DEPTH lists and objects in each other, numbers beyond Python's limit of digits, and halves
    of surrogate pairs, which are no characters and cannot be written in UTF-8 again.
    """
    with decoding():
        value = json.loads(text)
    check_value(value, text)
    return value


def after_blank(text: str, position: int) -> int:
    """Where what is no blank begins, from a position on."""
    found = JSON_BLANK.match(text, position)
    return found.end() if found else position


def json_elements(text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of every element of one JSON array; an element's line is where it begins. Raises BadJson.

    What comes before the array's bracket must be blank, and so must what comes after it.
    """
    decoder = json.JSONDecoder()
    position = after_blank(text, text.index("[") + 1)
    line, counted, first = 1, 0, True
    while True:
        line += text.count("\n", counted, position)
        counted = position
        if first and text.startswith("]", position):
            break
        with decoding(line):
            value, end = decoder.raw_decode(text, position)
        check_value(value, text[position:end], line)
        yield line, value
        first = False
        position = after_blank(text, end)
        if text.startswith("]", position):
            break
        if not text.startswith(",", position):
            line += text.count("\n", counted, position)
            raise BadJson("broken JSON: the list does not go on with a comma or end with ]", line)
        position = after_blank(text, position + 1)
    if text[position + 1 :].strip():
        raise BadJson("broken JSON: something follows the list's end", line + text.count("\n", counted, position))


@contextmanager
def decoding(line: int = 0) -> Iterator[None]:
    """Turn the decoder's errors into BadJson; `line` is where the value begins, when the decoder does not tell."""
    try:
        yield
    except json.JSONDecodeError as error:
        found = error.doc[error.pos : error.pos + 1]
        wide = f"; write {MARKS[found]} and not the full-width {found}" if found in MARKS else ""
        problem = f"broken JSON: {error.msg} (column {error.colno}){wide}"
        raise BadJson(problem, error.lineno, error.colno) from error
    except RecursionError as error:
        raise BadJson(too_deep(), line) from error
    except ValueError as error:  # int() of thousands of digits
        raise BadJson("broken JSON: a number with thousands of digits; expected at most 4,300", line) from error


def check_value(value: Any, text: str, line: int = 0) -> None:
    """Raises BadJson for a value that was decoded from `text` and is deeper or other than parse_json allows."""
    if text.count("[") + text.count("{") > MAX_DEPTH and deeper_than(value, MAX_DEPTH):
        raise BadJson(too_deep(), line)
    if SURROGATE.search(text) and not encodable(json.dumps(value, ensure_ascii=False)):
        raise BadJson("half a surrogate pair (\\ud800 to \\udfff), which is no character; use whole characters", line)


def too_deep() -> str:
    """The sentence for nesting."""
    return f"broken JSON: nested too deeply; expected at most {MAX_DEPTH} levels"


def deeper_than(value: Any, limit: int) -> bool:
    """Whether lists and objects are within each other more than `limit` times; level by level, without recursion."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent if isinstance(parent, list) else ())
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def dumps(value: Any, indent: int | None = None) -> str:
    """Strict JSON on one line or indented: no NaN, no Infinity, characters as they are, always valid UTF-8."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    return text if encodable(text) else json.dumps(value, allow_nan=False, indent=indent)  # names that are no UTF-8


def finite(value: float) -> float | None:
    """A number as JSON knows it: None (null) for NaN and the infinities."""
    return value if math.isfinite(value) else None
