"""Conversations in jsonl files: one reader, one validator, problems with line numbers.

A line is `{"messages": [{"role": "system"|"user"|"assistant", "content": str}, ...]}`: an optional system message
first, then user and assistant in turn, the assistant last.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmops import files
from llmops.console import UserError

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """What is wrong with one line of a file: where, what was found, what was expected."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def check_messages(record: object) -> str | None:
    """The first thing wrong with a parsed line, or None. The loader and the validator both come through here."""
    if not isinstance(record, dict):
        return f"found {files.kind_of(record)}, expected an object with the key 'messages'"
    messages = record.get("messages")
    if messages is None:
        found = ", ".join(map(files.shown, list(record)[:5])) or "none"
        hint = "; questions with intents become such lines by faq/prepare.sh" if "intent" in record else ""
        return f'no \'messages\' (keys found: {found}); expected {{"messages": [{{"role", "content"}}, ...]}}{hint}'
    if not isinstance(messages, list) or not messages:
        return "'messages' is empty or not a list; expected at least a user and an assistant message"
    expected = ("system", "user")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            return f"message {number} is no object with 'role' and 'content'"
        role, content = message["role"], message["content"]
        if role not in ROLES:
            return f"message {number} has the unknown role {files.shown(role)}; expected one of {', '.join(ROLES)}"
        if not isinstance(content, str):
            return f"message {number}: content is {files.kind_of(content)}, expected a string"
        if not content.strip() and role != "system":
            return f"message {number} ({role}) is empty; expected text"
        if role not in expected:
            if number > 1 and role == messages[number - 2]["role"]:
                return f"message {number}: two {role} messages in a row; expected user and assistant in turn"
            return f"message {number} has the role {role}, expected {' or '.join(expected)} here"
        expected = {"system": ("user",), "user": ("assistant",), "assistant": ("user",)}[role]
    if messages[-1]["role"] != "assistant":
        return f"the last message is the {messages[-1]['role']}'s; expected the assistant's answer"
    return None


def parse_line(raw: bytes) -> tuple[list[Message] | None, str | None]:
    """(messages, None) for a good line, (None, problem) for a bad one."""
    return messages_of(*files.parse_line(raw))


def messages_of(record: object, unreadable: str | None) -> tuple[list[Message] | None, str | None]:
    """`parse_line` for a line that is parsed already, or could not be."""
    problem = unreadable or check_messages(record)
    if problem or not isinstance(record, dict):
        return None, problem
    return [{"role": m["role"], "content": m["content"]} for m in record["messages"]], None


def read_conversations(path: Path) -> Iterator[tuple[int, list[Message] | None, Problem | None]]:
    """Every line that is not blank as (line number from 1, messages or None, problem or None)."""
    for number, value, unreadable in files.json_lines(path, "the data", "put it there or name another file"):
        messages, text = messages_of(value, unreadable)
        yield number, messages, Problem(path, number, text) if text else None


def problems_error(path: Path, problems: list[Problem], rows: int) -> UserError:
    """One error that names every bad line (the first of them in full)."""
    shown = "\n  ".join(str(problem) for problem in problems[:PROBLEMS_SHOWN])
    rest = problems[PROBLEMS_SHOWN:]
    more = ""
    if rest:
        numbers = ", ".join(str(problem.line) for problem in rest[:200])
        more = f"\n  and {len(rest)} more, lines {numbers}{' ...' if len(rest) > 200 else ''}"
    return UserError(
        f"{len(problems)} of {rows} lines of {path} cannot be used; "
        f"fix them or pass --skip_bad_lines true to drop and count them:\n  {shown}{more}"
    )


def validate_file(path: Path, skip_bad_lines: bool = False) -> tuple[int, int]:
    """Check every line; (good rows, bad rows).

    Raises UserError that names all bad lines (unless they are to be skipped) or an empty file.
    """
    from llmops.console import progress

    good = 0
    problems: list[Problem] = []
    for _, messages, problem in progress(read_conversations(path), f"checking {path.name}"):
        if problem:
            problems.append(problem)
        good += messages is not None
    if problems and not skip_bad_lines:
        raise problems_error(path, problems, good + len(problems))
    if not good:
        raise UserError(
            f"{path} has no usable line; expected one JSON object with 'messages' per line "
            f"({len(problems)} lines were bad)"
        )
    return good, len(problems)
