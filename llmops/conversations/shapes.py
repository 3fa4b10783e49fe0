"""From the shapes that people's data has to conversations: one converter per shape, told apart by a row's keys.

    messages               {"messages": [{"role", "content"}, ...]}   OpenAI's; also with tools and tool calls
    ShareGPT               {"conversations": [{"from", "value"}, ...]}
    Alpaca                 {"instruction", "input", "output"}          with "history" and "system"
    query and response     {"query", "response"}                       with "history" and "system"
    prompt and completion  {"prompt", "completion"}                    texts, or lists of messages (TRL's)

The parsers of LLaMA-Factory, ms-swift and TRL say what their files look like. Standard library only.
"""

from collections.abc import Callable
from typing import Any

from llmops import files, json_text
from llmops.conversations.records import BadRow, Conversation, Turn, assemble

SPEAKERS = {  # of ShareGPT
    "human": "user", "user": "user", "gpt": "assistant", "bot": "assistant", "assistant": "assistant",
    "system": "system", "function_call": "tool_call", "tool_call": "tool_call", "observation": "tool",
    "function_response": "tool", "tool_response": "tool", "tool": "tool",
}  # fmt: skip
ROLE_NAMES = {"tool_response": "tool", "developer": "system"}  # of ms-swift and of OpenAI, beside ours
QUESTIONS = ("query", "question", "prompt", "problem")
ANSWERS = ("response", "answer", "target", "completion")
ONE_TEXT = "text alone is for pretraining; expected a question with its answer"
PREFERENCE = "two answers to choose between are preference data, which this does not learn; keep the better one"
JUDGEMENT = "a mark of good and bad answers is preference data, which this does not learn; keep the good ones, unmarked"
REJECTED = ("rejected_response", "rejected_messages")  # of ms-swift, beside the answer that is better
JUDGED = ("label", "kto_tag")  # of ms-swift and LLaMA-Factory: whether the answer is good
EXPECTED = 'expected {"messages": [{"role", "content"}, ...]} or another shape of docs/training.md'
Row = dict[str, Any]


def convert(row: Any) -> tuple[Conversation, str]:
    """(conversation, name of its shape). Raises BadRow, which says what was found and what was expected."""
    if not isinstance(row, dict):
        raise BadRow(f"found {files.kind_of(row)}, expected an object with the key 'messages'")
    present = {key: value for key, value in row.items() if value is not None}
    name, converter = shape_of(present)
    return converter(present), name


def shape_of(row: Row) -> tuple[str, Callable[[Row], Conversation]]:
    """The shape of a row's keys. Raises BadRow for keys of none."""
    refuse_preference(row)
    if "messages" in row:
        return "messages", from_messages
    if "conversations" in row or "conversation" in row:
        return "ShareGPT", from_sharegpt
    if "intent" not in row:
        if "instruction" in row and "output" in row:
            return "Alpaca", from_alpaca
        if "prompt" in row and "completion" in row:
            return "prompt and completion", from_prompt
        if first_key(row, QUESTIONS) and first_key(row, ANSWERS):
            return "query and response", from_query
    found = ", ".join(map(files.shown, list(row)[:5])) or "none"
    if list(row) == ["text"]:
        raise BadRow(f"no 'messages' (keys found: {found}); {ONE_TEXT}")
    hint = "; questions with intents are learned with SCENARIO=faq, or become such lines by faq/prepare.sh"
    raise BadRow(f"no 'messages' (keys found: {found}); {EXPECTED}{hint if 'intent' in row else ''}")


def refuse_preference(row: Row) -> None:
    """Raise BadRow for a row of preference data: it holds an answer that nobody is to learn."""
    for key, other in (("chosen", "rejected"), ("completion", "label")):
        if key in row and other in row:
            raise BadRow(f"found {key!r} and {other!r}: {PREFERENCE}")
    for key in REJECTED:
        if row.get(key):  # a table has every column in every row
            raise BadRow(f"there is {key!r}: {PREFERENCE}")
    for key in JUDGED:
        if isinstance(row.get(key), bool):
            raise BadRow(f"{key!r} is {files.shown(row[key])}: {JUDGEMENT}")


def first_key(row: Row, keys: tuple[str, ...]) -> str:
    """The first of these keys that a row has, or ""."""
    return next((key for key in keys if key in row), "")


# --- the shapes


def from_messages(row: Row) -> Conversation:
    """OpenAI's messages, and ms-swift's with the roles tool_call and tool_response; `loss` or `weight` on a message."""
    return assemble([*system_turn(row), *role_turns(row, "messages")], tools_of(row))


def from_sharegpt(row: Row) -> Conversation:
    """ShareGPT: turns of {from, value}; ms-swift's also of {human, assistant}."""
    key = first_key(row, ("conversations", "conversation"))
    turns: list[Turn] = []
    for number, one in enumerate(listed(row, key, "turns of 'from' and 'value'"), 1):
        label = f"turn {number}"
        if isinstance(one, dict) and "human" in one and "assistant" in one:
            turns += [
                Turn(f"{label}, human", "user", one["human"]),
                Turn(f"{label}, assistant", "assistant", one["assistant"]),
            ]
            continue
        if isinstance(one, dict) and "role" in one and "content" in one:
            turns += [message_turn(label, one)]
            continue
        if not isinstance(one, dict) or "from" not in one or "value" not in one:
            raise BadRow(f"{label} is no object with 'from' and 'value'")
        speaker = one["from"]
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise BadRow(f"{label} is from {files.shown(speaker)}; expected one of {', '.join(SPEAKERS)}")
        turns.append(spoken(label, SPEAKERS[speaker], one["value"], one))
    return assemble([*system_turn(row), *turns], tools_of(row))


def from_alpaca(row: Row) -> Conversation:
    """Alpaca: the question is the instruction, and the input on the lines after it."""
    parts = [text_of(row, key) for key in ("instruction", "input") if row.get(key, "") != ""]
    question = Turn("'instruction'", "user", "\n".join(parts))
    answer = Turn("'output'", "assistant", row["output"])
    return assemble([*system_turn(row), *history_turns(row), question, answer], tools_of(row))


def from_query(row: Row) -> Conversation:
    """A question and its answer under the names of the field."""
    asked, answered = first_key(row, QUESTIONS), first_key(row, ANSWERS)
    question, answer = Turn(f"{asked!r}", "user", row[asked]), Turn(f"{answered!r}", "assistant", row[answered])
    return assemble([*system_turn(row), *history_turns(row), question, answer], tools_of(row))


def from_prompt(row: Row) -> Conversation:
    """TRL's prompt and completion, texts or lists of messages; only the completion is learned."""
    turns: list[Turn] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[key], list):
            turns += [
                turn
                if key == "completion"
                else Turn(turn.label, turn.role, turn.content, turn.calls, False, turn.extra)
                for turn in role_turns(row, key, f"{key}, ")
            ]
        else:
            turns.append(Turn(f"{key!r}", role, row[key]))
    return assemble(
        [*system_turn(row), *([] if isinstance(row["prompt"], list) else history_turns(row)), *turns], tools_of(row)
    )


# --- their parts


def listed(row: Row, key: str, what: str) -> list[Any]:
    """The list under a key; in a table it is JSON text. Raises BadRow for anything else, and for an empty one."""
    value = unpacked(row[key], key)
    if not isinstance(value, list) or not value:
        raise BadRow(f"{key!r} is empty or not a list; expected {what}")
    return value


def unpacked(value: Any, key: str) -> Any:
    """A value, or what the JSON text says that a table has in its place."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json_text.parse_json(value)
    except json_text.BadJson as error:
        raise BadRow(f"{key!r} is text that is no JSON ({error.problem})") from error


def text_of(row: Row, key: str) -> str:
    """The text under a key. Raises BadRow for another value."""
    if not isinstance(row[key], str):
        raise BadRow(f"{key!r} is {files.kind_of(row[key])}, expected a string")
    return row[key]


def system_turn(row: Row) -> list[Turn]:
    """The system text that stands beside the turns, where there is one."""
    return [Turn("'system'", "system", row["system"])] if row.get("system", "") != "" else []


def history_turns(row: Row) -> list[Turn]:
    """Earlier questions and answers: [[question, answer], ...]."""
    if row.get("history", "") in ("", []):
        return []
    turns = []
    for number, pair in enumerate(listed(row, "history", "pairs of question and answer"), 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"'history', pair {number} is {files.shown(pair)}; expected [question, answer]")
        for one, role in zip(pair, ("user", "assistant"), strict=True):
            turns.append(Turn(f"'history', pair {number}", role, one))
    return turns


def role_turns(row: Row, key: str, prefix: str = "") -> list[Turn]:
    """Turns of a list of {role, content}."""
    found = listed(row, key, "at least a user and an assistant message" if key == "messages" else "messages")
    return [message_turn(f"{prefix}message {number}", message) for number, message in enumerate(found, 1)]


def message_turn(label: str, message: Any) -> Turn:
    """One message of {role, content}; the content may be missing where tools are called."""
    if isinstance(message, dict):
        message = {key: value for key, value in message.items() if value is not None or key == "content"}
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(message, dict) or "role" not in message or not ("content" in message or calls):
        raise BadRow(f"{label} is no object with 'role' and 'content'")
    role = message["role"]
    role = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    content = message.get("content")
    return spoken(label, role, "" if calls and content is None else content, message)


def spoken(label: str, role: Any, content: Any, source: dict[str, Any]) -> Turn:
    """A turn of a role: reasoning put before its answer, calls parsed, `loss` and `weight` read."""
    learned = is_learned(label, role, source)
    if role == "tool_call":
        return Turn(label, "assistant", "", calls_of(label, content), learned)
    if role == "tool":
        content = content if isinstance(content, str) or content is None else json_text.dumps(content)
        extra = [(key, source[key]) for key in ("name", "tool_call_id") if isinstance(source.get(key), str)]
        return Turn(label, role, content, extra=tuple(extra))
    calls = source.get("tool_calls") or []
    if calls and role != "assistant":
        raise BadRow(f"{label}: 'tool_calls' stands in a message of the {role}; expected it in the assistant's")
    thought = source.get("reasoning_content", "")
    if isinstance(thought, str) and thought.strip() and isinstance(content, str) and "</think>" not in content:
        content = f"<think>\n{thought.strip()}\n</think>\n\n{content}"
    return Turn(label, role, content, calls_of(label, calls) if calls else (), learned)


def is_learned(label: str, role: Any, source: dict[str, Any]) -> bool:
    """Whether a message may be learned, by `loss` (ms-swift's) and `weight` (OpenAI's: 0 or 1)."""
    loss, weight = source.get("loss", True), source.get("weight")
    if not isinstance(loss, bool):
        raise BadRow(f"{label}: 'loss' is {files.shown(loss)}, expected true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise BadRow(f"{label}: 'weight' is {files.shown(weight)}, expected 0 or 1")
    if role not in ("assistant", "tool_call"):
        if loss and "loss" in source:
            raise BadRow(f"{label}: 'loss' is true; only an assistant's message can be learned")
        if weight:
            raise BadRow(f"{label}: 'weight' is 1; only an assistant's message can be learned")
    return loss and weight != 0


def calls_of(label: str, value: Any) -> tuple[dict[str, Any], ...]:
    """Tool calls in OpenAI's form, their arguments as objects: of a list, of one call, of JSON text of either."""
    if isinstance(value, str):
        try:
            value = json_text.parse_json(value)
        except json_text.BadJson as error:
            raise BadRow(f'{label}: the call is no JSON of {{"name", "arguments"}} ({error.problem})') from error
    return tuple(call_of(label, call) for call in (value if isinstance(value, list) else [value]))


def call_of(label: str, call: Any) -> dict[str, Any]:
    """One call: {"function": {"name", "arguments"}} or {"name", "arguments"}; arguments may be JSON text."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise BadRow(f'{label}: a call is {files.shown(call)}, expected {{"name", "arguments"}}')
    arguments = inner.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json_text.parse_json(arguments)
        except json_text.BadJson as error:
            raise BadRow(
                f"{label}: the arguments of {files.plain(inner['name'])} are no JSON ({error.problem})"
            ) from error
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, dict):
        raise BadRow(
            f"{label}: the arguments of {files.plain(inner['name'])} are {files.kind_of(arguments)}, expected an object"
        )
    known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return known | {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}


def tools_of(row: Row) -> list[dict[str, Any]]:
    """Descriptions of the tools in OpenAI's form: of a list, or of JSON text of one; bare functions are wrapped."""
    if row.get("tools", "") in ("", []):
        return []
    value = unpacked(row["tools"], "tools")
    if not isinstance(value, list):
        raise BadRow(f"'tools' is {files.kind_of(value)}, expected a list of functions")
    tools = []
    for number, one in enumerate(value, 1):
        tool = unpacked(one, "tools")
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow(f"tool {number} is {files.shown(tool)}, expected a function with 'name' and 'parameters'")
        tools.append({"type": "function", "function": inner})
    return tools
