"""The one form that a conversation has inside: messages in order, tools it may call, which answers are learned.

A message is {"role", "content"} with the roles of ROLES; an assistant's may have "tool_calls" as OpenAI writes them,
arguments as an object; a tool's has the "name" and "tool_call_id" of the call that it answers. `shapes` makes this form
of what people have.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from llmops import files
from llmops.console import UserError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
PROBLEMS_SHOWN = 20
LEARN = ("all", "last")


class BadRow(ValueError):
    """A row that is no conversation: what was found and what was expected, as a sentence."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one line (or row) of a file: where, what was found, what was expected."""

    path: Path
    line: int
    text: str
    unit: str = "line"

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.unit == "line" else f"{self.path}, {self.unit} {self.line}"
        return f"{place}: {self.text}"


@dataclass(frozen=True)
class Conversation:
    """Messages, the tools that they may call, and for each message whether it is learned (an assistant's may be)."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    learned: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if not self.learned:
            flags = tuple(message["role"] == "assistant" for message in self.messages)
            object.__setattr__(self, "learned", flags)

    @property
    def plain(self) -> bool:
        """Whether there is nothing of tools in it."""
        return not self.tools and not any(m["role"] == "tool" or "tool_calls" in m for m in self.messages)

    def learning(self, which: str) -> "Conversation":
        """With `all` learned answers, or those after the `last` user message alone."""
        if which == "all":
            return self
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "user")
        return replace(self, learned=tuple(flag and i > last for i, flag in enumerate(self.learned)))

    def upto(self, end: int) -> "Conversation":
        """The first `end` messages, of which the last alone is learned."""
        return replace(self, messages=self.messages[:end], learned=(False,) * (end - 1) + (True,))

    def without_first_turn(self) -> "Conversation | None":
        """Without the oldest question and what answers it; the system message stays. None for a single question."""
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if len(users) < 2:
            return None
        kept = [*range(users[0]), *range(users[1], len(self.messages))]
        return replace(self, messages=[self.messages[i] for i in kept], learned=tuple(self.learned[i] for i in kept))


class Turn(NamedTuple):
    """A message as a shape has it: `label` is how its file calls it, `calls` are an assistant's tool calls."""

    label: str
    role: str
    content: Any = ""
    calls: tuple[dict[str, Any], ...] = ()
    learned: bool = True
    extra: tuple[tuple[str, str], ...] = ()  # name and tool_call_id of a tool's message, where the file has them


def assemble(turns: Sequence[Turn], tools: list[dict[str, Any]]) -> Conversation:
    """A conversation of turns. Raises BadRow for turns that are none, in words of the file."""
    joined = join_calls(turns)
    check_order(joined)
    learned = tuple(turn.role == "assistant" and turn.learned for turn in joined)
    if not any(learned):
        raise BadRow("'loss' is false or 'weight' 0 for every answer, so nothing of it is learned; take the row out")
    return Conversation(messages_of(joined), tools, learned)


def join_calls(turns: Sequence[Turn]) -> list[Turn]:
    """Turns in which what an assistant says and calls before anybody else speaks is one message."""
    joined: list[Turn] = []
    for turn in turns:
        before = joined[-1] if joined else None
        if turn.calls and not turn.content and before is not None and before.role == "assistant":
            joined[-1] = before._replace(calls=before.calls + turn.calls, learned=before.learned and turn.learned)
        else:
            joined.append(turn)
    return joined


def check_order(turns: Sequence[Turn]) -> None:
    """Raise BadRow for the first thing that is wrong with roles, contents or their order."""
    if not turns:
        raise BadRow("it has no messages; expected at least a user and an assistant message")
    expected: tuple[str, ...] = ("system", "user")
    before: Turn | None = None
    for turn in turns:
        if turn.role not in ROLES:
            raise BadRow(
                f"{turn.label} has the unknown role {files.shown(turn.role)}; expected one of {', '.join(ROLES)}"
            )
        if not isinstance(turn.content, str):
            raise BadRow(f"{turn.label}: content is {files.kind_of(turn.content)}, expected a string")
        if not turn.content.strip() and not turn.calls and turn.role in ("user", "assistant"):
            raise BadRow(f"{turn.label} ({turn.role}) is empty; expected text")
        if turn.role not in expected:
            if before is not None and turn.role == before.role:
                raise BadRow(f"{turn.label}: two {turn.role} messages in a row; expected user and assistant in turn")
            wanted = " or ".join(role for role in expected if role != "tool" or before is None or before.calls)
            raise BadRow(f"{turn.label} has the role {turn.role}, expected {wanted or 'user'} here")
        expected = followers(turn)
        before = turn
    assert before is not None
    if before.role != "assistant":
        raise BadRow(f"the last message is the {before.role}'s; expected the assistant's answer")


def followers(turn: Turn) -> tuple[str, ...]:
    """The roles that may come after a turn. A call may stand in an answer's text, so a tool may speak after any."""
    if turn.role == "assistant":
        return ("tool",) if turn.calls else ("user", "tool")
    return {"system": ("user",), "user": ("assistant",), "tool": ("tool", "assistant")}[turn.role]


def messages_of(turns: Sequence[Turn]) -> list[Message]:
    """Messages of turns; a call without an id gets one, and a tool's message the name and the id of its call."""
    messages: list[Message] = []
    waiting: list[dict[str, Any]] = []
    number = 0
    for turn in turns:
        message: Message = {"role": turn.role, "content": turn.content}
        if turn.role == "assistant":
            waiting = []
            for call in turn.calls:
                waiting.append({"id": call.get("id") or f"{number:09d}"} | call)
                number += 1
            if waiting:
                message["tool_calls"] = list(waiting)
        elif turn.role == "tool":
            extra = dict(turn.extra)
            if waiting:
                called = waiting.pop(answered(waiting, extra))
                message |= {"name": called["function"]["name"], "tool_call_id": called["id"]}
            message |= extra
        messages.append(message)
    return messages


def answered(waiting: Sequence[dict[str, Any]], extra: dict[str, str]) -> int:
    """Which of the waiting calls a result is of: the one with its id, else the first of its name, else the first."""
    ids = [call["id"] for call in waiting]
    names = [call["function"]["name"] for call in waiting]
    for known, wanted in ((ids, extra.get("tool_call_id")), (names, extra.get("name"))):
        if wanted in known:
            return known.index(wanted)
    return 0


def texts_in(messages: Sequence[Message], tools: Sequence[Any] = ()) -> Iterator[str]:
    """Every text of a conversation that comes from its data, those in calls and descriptions of tools included."""
    for message in messages:
        yield message["content"]
        if len(message) > 2:
            yield from strings_in([value for key, value in message.items() if key not in ("role", "content")])
    yield from strings_in(tools)


def strings_in(value: Any) -> Iterator[str]:
    """Every string in a JSON value, names of keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for one in value.values():
            yield from strings_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from strings_in(one)


def with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string in it changed, names of keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): with_strings(one, change) for key, one in value.items()}
    return [with_strings(one, change) for one in value] if isinstance(value, list | tuple) else value


def problems_error(path: Path | str, problems: Sequence[Problem], rows: int) -> UserError:
    """One error that names every bad line (the first of them in full).

    Of lines that are not UTF-8 one is enough in full: the others of its file are written alike.
    """
    full: list[Problem] = []
    rest: list[Problem] = []
    encoded_otherwise: set[Path] = set()
    for problem in problems:
        repeats = problem.path in encoded_otherwise and problem.text.startswith(files.NOT_UTF8)
        (rest if repeats or len(full) == PROBLEMS_SHOWN else full).append(problem)
        if problem.text.startswith(files.NOT_UTF8):
            encoded_otherwise.add(problem.path)
    shown = "\n  ".join(map(str, full))
    more = ""
    unit = problems[0].unit
    if rest:
        numbers = ", ".join(str(problem.line) for problem in rest[:200])
        more = f"\n  and {len(rest)} more, {unit}s {numbers}{' ...' if len(rest) > 200 else ''}"
    return UserError(
        f"{len(problems)} of {rows} {unit}s of {path} cannot be used; "
        f"fix them or pass --skip_bad_lines true to drop and count them:\n  {shown}{more}"
    )
