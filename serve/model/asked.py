"""What a request asks for: OpenAI's bodies, every field checked. Standard library and `llmops` only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmops import files, json_text
from llmops.conversations import shapes
from llmops.conversations.records import BadRow, Message
from serve.answers import ApiError
from serve.settings import Limits

MOST_STOPS = 16
MOST_LOGPROBS = 20
MOST_PROMPTS = 128
MOST_TOLD = 100_000  # log-probabilities of one request: each is a token's text, which takes time
NOT_TOLD = ("documents", "messages", "tools", "add_generation_prompt")  # what a template gets from the request itself
SILENT = frozenset(  # fields that change nothing of an answer here, or do nothing at these values
    ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"]
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "min_p": (0,), "modalities": (["text"],),
}  # fmt: skip
FREE = "answers are free text here; ask for the form in a message, and check the answer"
REFUSED = {
    "functions": "functions are no longer OpenAI's way; pass tools",
    "audio": "the models here write text",
    "suffix": "the models here write on and do not fill in",
    "echo": "the prompt is not sent back",
    "best_of": "one answer is written",
    **dict.fromkeys(  # vLLM's and llama.cpp's
        (
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "structured_outputs",
            "grammar",
            "json_schema",
        ),
        FREE,
    ),
}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0: the likeliest. `top_k` 0 and `top_p` 1: among all. `logprobs` < 0: none;
    else the log-probability of each token, and so many of the likeliest beside it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int = -1


@dataclass(frozen=True)
class Asked:
    """What both ways of asking share. `model` "": the first one. `max_tokens` None: as many as may be."""

    model: str
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    with_usage: bool
    warnings: list[str]


@dataclass(frozen=True)
class Chat:
    """A conversation that is to be answered."""

    asked: Asked
    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """Texts, or token ids, that are to be continued."""

    asked: Asked
    prompts: list[str | list[int]]


def bad(name: str, value: Any, expected: str) -> ApiError:
    """The error of a field."""
    return ApiError(400, f"{name} is {files.shown(value)}, expected {expected}", name, "invalid_value")


class Fields:
    """The fields of a body, taken one by one; what is left is not known here."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, default: Any, good: Callable[[Any], bool], expected: str) -> Any:
        """A field's value, or the default where it is missing or null."""
        if name not in self.left:
            return default
        value = self.left.pop(name)
        if not good(value):
            raise bad(name, value, expected)
        return value

    def whole(self, name: str, default: Any, lowest: int, highest: int) -> Any:
        """A whole number in bounds."""
        return self.take(
            name, default, lambda v: type(v) is int and lowest <= v <= highest, f"a whole number {lowest} to {highest}"
        )

    def number(self, name: str, default: float, lowest: float, highest: float) -> float:
        """A number in bounds."""
        good = lambda v: type(v) in (int, float) and lowest <= v <= highest  # noqa: E731
        return float(self.take(name, default, good, f"a number {lowest:g} to {highest:g}"))

    def flag(self, name: str) -> bool:
        """true or false."""
        return self.take(name, False, lambda v: isinstance(v, bool), "true or false")

    def text(self, name: str) -> str:
        """A text."""
        return self.take(name, "", lambda v: isinstance(v, str), "a text")

    def object(self, name: str) -> dict[str, Any]:
        """An object."""
        return self.take(name, {}, lambda v: isinstance(v, dict), "an object")

    def warnings(self) -> list[str]:
        """What is not known here and is left out. Raises ApiError for what changes the answer's kind."""
        found = []
        for name, value in self.left.items():
            if name in SILENT or any(value == one for one in NEUTRAL.get(name, ())):
                continue
            if name in REFUSED:
                raise ApiError(400, f"{name} is not known here: {REFUSED[name]}", name, "unsupported_parameter")
            found.append(f"{files.plain(name)} is not known here and was left out")
        return found


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body."""
    try:
        body = json_text.parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ApiError(400, "the body is not UTF-8", code="invalid_json") from error
    except json_text.BadJson as error:
        raise ApiError(400, f"the body is no JSON ({error})", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {files.kind_of(body)}, expected an object", code="invalid_json")
    return body


def read_chat(body: Mapping[str, Any], limits: Limits) -> Chat:
    """The body of /v1/chat/completions."""
    fields = Fields(body)
    messages, tools = conversation(fields)
    wanted = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, 0, MOST_LOGPROBS)
    if top and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs", "invalid_value")
    choice = fields.take("tool_choice", "auto", lambda v: v in ("auto", "none"), '"auto" or "none"')
    variables = template_variables(fields.object("chat_template_kwargs"))
    asked = read_asked(fields, limits, top if wanted else -1, ("max_completion_tokens", "max_tokens"))
    return Chat(asked, messages, [] if choice == "none" else tools, variables)


def read_completion(body: Mapping[str, Any], limits: Limits) -> Completion:
    """The body of /v1/completions."""
    fields = Fields(body)
    prompts = fields.take("prompt", [], lambda v: bool(prompts_of(v)), f"a text, token ids, or 1 to {MOST_PROMPTS}")
    if not prompts:
        raise ApiError(400, "prompt is missing; expected a text", "prompt", "invalid_value")
    logprobs = fields.whole("logprobs", -1, 0, MOST_LOGPROBS)
    return Completion(read_asked(fields, limits, logprobs, ("max_tokens",)), prompts_of(prompts))


def read_asked(fields: Fields, limits: Limits, logprobs: int, lengths: Sequence[str]) -> Asked:
    """What both bodies share; the warnings are about all that nobody took before."""
    sampling = Sampling(
        temperature=fields.number("temperature", 1.0, 0, 100),
        top_p=fields.number("top_p", 1.0, 0, 1),
        top_k=max(0, fields.whole("top_k", 0, -1, 2**31)),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100),
        seed=fields.whole("seed", None, -(2**63), 2**63 - 1),
        logprobs=logprobs,
    )
    form = fields.take("response_format", {}, is_form, '{"type": "text"}').get("type", "text")
    if form != "text":
        raise ApiError(
            400, f'response_format is of the type {form}, expected "text": {FREE}', "response_format",
            "unsupported_parameter",
        )  # fmt: skip
    if fields.whole("n", 1, 1, 128) != 1:
        raise ApiError(400, "n is more than 1; expected one answer per request", "n", "unsupported_parameter")
    stops = fields.take("stop", (), lambda v: stops_of(v) is not None, f"a text or up to {MOST_STOPS} texts")
    asked = [fields.whole(name, None, 1, 2**31) for name in lengths]
    most = next((number for number in asked if number is not None), None)
    stream, model = fields.flag("stream"), fields.text("model")
    options = Fields(fields.object("stream_options"))
    with_usage = options.flag("include_usage")
    warnings = fields.warnings()
    if most is not None and most > limits.tokens:
        warnings.append(f"{most} tokens were asked for, and at most {limits.tokens} are written (--max_tokens)")
    return Asked(model, sampling, most, stops_of(stops) or (), stream, with_usage, warnings)


def is_form(value: Any) -> bool:
    """Whether a value is a form of answers that OpenAI knows."""
    return isinstance(value, dict) and value.get("type") in ("text", "json_object", "json_schema")


def stops_of(value: Any) -> tuple[str, ...] | None:
    """Texts that end an answer, or None for what is none."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or len(found) > MOST_STOPS:
        return None
    return tuple(found) if all(isinstance(one, str) and one for one in found) else None


def prompts_of(value: Any) -> list[str | list[int]]:
    """Texts or lists of token ids; none for what is neither."""
    if isinstance(value, str) or is_ids(value):
        return [value] if value else []
    if not isinstance(value, list) or not 0 < len(value) <= MOST_PROMPTS:
        return []
    return value if all((isinstance(one, str) or is_ids(one)) and one for one in value) else []


def is_ids(value: Any) -> bool:
    """Whether a value is a list of token ids."""
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**31 for one in value)


def conversation(fields: Fields) -> tuple[list[Message], list[dict[str, Any]]]:
    """Messages in the form that training knows, and tools. The last message is a user's or a tool's."""
    given = fields.take("messages", [], lambda v: isinstance(v, list), "a list of messages")
    tools = fields.take("tools", [], lambda v: isinstance(v, list), "a list of functions")
    if not given:
        raise ApiError(400, "messages is missing or empty; expected at least a user's", "messages", "invalid_value")
    messages = [with_text(number, message) for number, message in enumerate(given, 1)]
    last = messages[-1].get("role") if isinstance(messages[-1], dict) else None
    if last == "assistant":
        raise ApiError(
            400, "the last message is the assistant's; expected a user's or a tool's", "messages", "invalid_value"
        )
    try:  # the form is that of training data, where an answer follows
        row = {"messages": [*messages, {"role": "assistant", "content": "-"}], "tools": tools}
        found = shapes.from_messages(row)
    except BadRow as error:
        raise ApiError(400, str(error), "messages", "invalid_value") from error
    return found.messages[:-1], found.tools


def with_text(number: int, message: Any) -> Any:
    """A message whose content is a text, where it came in parts. Raises ApiError for parts that are no text."""
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list):
        return message
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ApiError(
            400, f"message {number} has parts that are no text; the models here read text", "messages", "invalid_value"
        )
    return message | {"content": "".join(map(str, texts))}


def template_variables(given: dict[str, Any]) -> dict[str, Any]:
    """What the chat template is told beside the conversation: switches, numbers and names."""
    for name, value in given.items():
        simple = isinstance(value, bool | int | float) or (isinstance(value, str) and is_name(value))
        if not name.isidentifier() or name in NOT_TOLD or name.endswith("_token") or not simple or len(name) > 64:
            raise ApiError(
                400,
                f"chat_template_kwargs has {files.plain(name)}: {files.shown(value)}; expected names with true, false, "
                "numbers or plain words",
                "chat_template_kwargs", "invalid_value",
            )  # fmt: skip
    if len(given) > 16:
        raise ApiError(400, "chat_template_kwargs has more than 16 names", "chat_template_kwargs", "invalid_value")
    return given


def is_name(text: str) -> bool:
    """Whether a text is a plain word, which is no control token and no markup: letters, digits, blanks, . , : - _."""
    return len(text) <= 64 and all(character.isalnum() or character in " .,:-_" for character in text)
