"""Conversations to token ids and back to which of them are learned: the one renderer of training and evaluation.

A checkpoint's own chat template wins. A checkpoint without one is served by its family's file in TEMPLATES: either a
Jinja template (formats whose special tokens are typed as text) or the name of a function that lays out pieces (formats
whose role tokens must be inserted by id). Sources of the formats: the vendors' own demos and fine-tuning code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from llmops import files
from llmops.chat_templates import ChatTemplate, no_tools, written_around
from llmops.console import UserError
from llmops.control_tokens import ControlTokens
from llmops.records import Message


@dataclass
class Rendered:
    """Token ids of a conversation and, for each, whether it is learned. Both have the same length."""

    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True)
class Piece:
    """A run of text or, where it says so, one token by its name or id, in a format that is laid out by id."""

    content: str | int
    learned: bool = False
    control: bool = False


GENERATION = ("max_new_tokens", "batch_size")  # keys of a family's `generation`
LAID_OVER = ("faq", "faq_en", "generation")  # keys of auto.json that every mode has, too
Layout = Callable[[Sequence[Message], bool], list[Piece]]


@dataclass(frozen=True)
class Family:
    """How one model family writes conversations, which layers its LoRA adapts, how its FAQ prompts are worded.

    One file of TEMPLATES, named after the `--mode`. `chat_template` is a Jinja template, or `layout` names the function
    below that turns messages into pieces; with neither, the checkpoint's own template is used. `model_types` are the
    config.json model_type values that fit; `config_has` keys of config.json, `tokenizer_has` and `tokenizer_lacks`
    texts in the checkpoint's tokenizer files narrow them. `one_sample_per_answer`: the prompt is not causal. `stop`:
    tokens that end an answer, beside the end token.
    `faq`, `faq_en` (where English differs) and `generation` are laid over those of `auto`.
    """

    name: str
    about: str = ""
    model_types: tuple[str, ...] = ()
    config_has: tuple[str, ...] = ()
    tokenizer_has: str = ""
    tokenizer_lacks: str = ""
    chat_template: str = ""
    layout: str = ""
    stop: tuple[str, ...] = ()
    one_sample_per_answer: bool = False
    lora_layers: tuple[str, ...] = ()
    faq: dict[str, str] = field(default_factory=dict)
    faq_en: dict[str, str] = field(default_factory=dict)
    generation: dict[str, int] = field(default_factory=dict)

    def misfit(self, config: dict[str, Any], tokenizer_text: str) -> str | None:
        """What of a checkpoint speaks against this family, or None."""
        model_type = config.get("model_type", "")
        if self.model_types and model_type not in self.model_types:
            return f"is for model_type {' or '.join(self.model_types)}, the checkpoint is {model_type!r}"
        missing = [key for key in self.config_has if key not in config]
        if missing:
            return f"is for checkpoints with {', '.join(missing)} in config.json, which this one lacks"
        if self.tokenizer_has and self.tokenizer_has not in tokenizer_text:
            return f"is for tokenizers with {self.tokenizer_has}, which this checkpoint's lacks"
        if self.tokenizer_lacks and self.tokenizer_lacks in tokenizer_text:
            return f"is for tokenizers without {self.tokenizer_lacks}, which this checkpoint's has"
        return None


def read_families(folder: Path) -> dict[str, Family]:
    """The families by mode, `auto` first. Raises UserError for a file that does not describe one."""
    paths = sorted(folder.glob("*.json"), key=lambda path: (path.stem != "auto", path.stem))
    described = {path.stem: read_family(path) for path in paths}
    if "auto" not in described:
        raise UserError(f"{folder} has no auto.json, whose wording every mode is laid over; copy the project again")
    families = {}
    for name, values in described.items():
        both = {key: described["auto"].get(key, {}) | values.get(key, {}) for key in LAID_OVER}
        own = values.get("faq", {}) if name != "auto" else {}  # the wording of a file is for every language
        both["faq_en"] = {k: v for k, v in both["faq_en"].items() if k not in own or k in values.get("faq_en", {})}
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        families[name] = Family(name, **(plain | both))
        missing = [key for key in GENERATION if key not in families[name].generation]
        if missing:
            raise UserError(f"{folder / 'auto.json'}: generation has no {missing[0]}; copy the project again")
    return families


def read_family(path: Path) -> dict[str, Any]:
    """What one file of TEMPLATES says, every key checked. Raises UserError that names the file and the key."""
    found = files.read_object(path, "the template file", "mend it or copy the project again")
    known = {item.name: item for item in fields(Family) if item.name != "name"}
    for key, value in found.items():
        if key not in known:
            raise UserError(f"{path}: unknown key {files.plain(key)}; expected some of {', '.join(known)}")
        default = known[key].default
        if key in ("faq", "faq_en"):
            good, expected = is_texts_by_name(value), "an object of texts"
        elif key == "generation":
            good, expected = is_counts(value), f"an object of whole numbers from 1 under {', '.join(GENERATION)}"
        elif isinstance(default, tuple):
            good, expected = isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of texts"
        else:
            good, expected = type(value) is type(default), "true or false" if default is False else "a text"
        if not good:
            raise UserError(f"{path}: {key} is {files.shown(value)}, expected {expected}")
    if path.stem != "auto" and not any(found.get(key) for key in ("model_types", "chat_template", "layout")):
        raise UserError(f"{path}: expected model_types, chat_template or layout to say something, found none of them")
    if found.get("layout", "") not in ("", *LAYOUTS):
        raise UserError(f"{path}: unknown layout {files.shown(found['layout'])}; expected {', '.join(LAYOUTS)}")
    return found


def is_texts_by_name(value: Any) -> bool:
    """Whether a value is an object of texts."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def is_counts(value: Any) -> bool:
    """Whether a value is what `generation` may be."""
    return isinstance(value, dict) and all(k in GENERATION and type(n) is int and n > 0 for k, n in value.items())


def control(token: str | int, learned: bool = False) -> Piece:
    """A control token of the format."""
    return Piece(token, learned, control=True)


def glm_layout(messages: Sequence[Message], generate: bool) -> list[Piece]:
    """ChatGLM-6B: `[Round i]\\n问：q\\n答：` as text, [gMASK] sop, the answer, eop. Only the last answer is learned."""
    system, turns = split_system(messages)
    rounds = [turns[i : i + 2] for i in range(0, len(turns), 2)]
    history = "".join(
        f"[Round {i}]\n问：{q['content']}\n答：{a['content']}\n" for i, (q, a) in enumerate(full(rounds[:-1]))
    )
    question = rounds[-1][0]["content"]
    # the vendor's chat API sends a single question bare and numbers rounds from 0
    prompt = f"{history}[Round {len(rounds) - 1}]\n问：{question}\n答：" if history else question
    pieces = [Piece(system + prompt), control("[gMASK]"), control("<sop>")]
    if not generate:
        pieces += [Piece(rounds[-1][1]["content"], True), control("<eop>", True)]
    return pieces


def glm2_layout(messages: Sequence[Message], generate: bool) -> list[Piece]:
    """ChatGLM2: `[gMASK]sop[Round i]\\n\\n问：q\\n\\n答：a</s>`, blank lines between rounds; the end token by id."""
    system, turns = split_system(messages)
    pieces = [control("[gMASK]"), control("sop")]
    for i in range(0, len(turns), 2):
        lead = system if i == 0 else "\n\n"
        pieces.append(Piece(f"{lead}[Round {i // 2 + 1}]\n\n问：{turns[i]['content']}\n\n答："))
        if i + 1 < len(turns):
            learned = is_learned(turns[i + 1])
            pieces += [Piece(turns[i + 1]["content"], learned), control("</s>", learned)]
    return pieces


def glm3_layout(messages: Sequence[Message], generate: bool) -> list[Piece]:
    """ChatGLM3: role tokens by id, `\\n ` and the text encoded apart.

    An answer ends with the next `<|user|>`, the last with eos.
    """
    pieces = [control("[gMASK]"), control("sop")]
    for i, message in enumerate(messages):
        answer = is_learned(message)
        after_answer = i > 0 and is_learned(messages[i - 1])
        pieces += [
            control(f"<|{message['role']}|>", after_answer),
            Piece("\n", answer),
            Piece(message["content"], answer),
        ]
    pieces.append(control("<|assistant|>") if generate else control("</s>", is_learned(messages[-1])))
    return pieces


def baichuan2_layout(messages: Sequence[Message], generate: bool) -> list[Piece]:
    """Baichuan2: system as a raw prefix, `<reserved_106>` (195) q `<reserved_107>` (196) a, eos after every answer."""
    system, turns = split_system(messages)
    pieces = [Piece(system)] if system else []
    for message in turns:
        if message["role"] == "user":
            pieces += [control(195), Piece(message["content"])]
        else:
            learned = is_learned(message)
            pieces += [control(196), Piece(message["content"], learned), control("</s>", learned)]
    return pieces + ([control(196)] if generate else [])


def is_learned(message: Message) -> bool:
    """Whether a message is an answer that is learned; `learned` says where an answer is not."""
    return message["role"] == "assistant" and message.get("learned", True)


def split_system(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """(system text or "", the turns after it)."""
    if messages[0]["role"] == "system":
        return messages[0]["content"], list(messages[1:])
    return "", list(messages)


def full(rounds: list[list[Message]]) -> list[tuple[Message, Message]]:
    """Rounds as (question, answer) pairs; all of them are complete."""
    return [(r[0], r[1]) for r in rounds]


LAYOUTS: dict[str, Layout] = {
    "glm": glm_layout,
    "glm2": glm2_layout,
    "glm3": glm3_layout,
    "baichuan2": baichuan2_layout,
}
# what the layouts insert by id
OWN_TOKENS: dict[str, tuple[str | int, ...]] = {
    "glm": ("[gMASK]", "<sop>", "<eop>"),
    "glm2": ("[gMASK]", "sop", "</s>"),
    "glm3": ("[gMASK]", "sop", "</s>", "<|system|>", "<|user|>", "<|assistant|>"),
    "baichuan2": (195, 196, "</s>"),
}
TEMPLATES = Path(__file__).resolve().parent.parent / "faq" / "templates"
OWN = "auto"  # the mode of the checkpoint's own chat template


@cache
def families() -> dict[str, Family]:
    """The families of TEMPLATES by mode, read when they are first asked for. Raises UserError for a damaged file."""
    return read_families(TEMPLATES)


def modes_text() -> str:
    """Every mode, for people."""
    return ", ".join(families())


@dataclass(frozen=True)
class Asked:
    """What a template is asked to write: messages, and the tools that they may call."""

    messages: Sequence[Message]
    tools: Sequence[Any] = ()

    def upto(self, end: int) -> "Asked":
        """The first `end` messages."""
        return Asked(self.messages[:end], self.tools)


class ChatFormat:
    """Renders conversations for one tokenizer: by its own chat template, or by a family's entry.

    Control tokens come from the format alone: their texts in a message are encoded as text, unless
    `allow_special_tokens` lets the tokenizer take them for what they look like.
    """

    def __init__(
        self,
        tokenizer: Any,
        family: Family | None = None,
        allow_special_tokens: bool = False,
        thinking: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.family = family = family or families()[OWN]
        self.allow_special_tokens = allow_special_tokens
        self.layout = LAYOUTS[family.layout] if family.layout else None
        if family.chat_template:
            tokenizer.chat_template = family.chat_template
        self.name = family.name if family.name != OWN else "the checkpoint's own chat template"
        if self.layout is None and not tokenizer.chat_template:
            raise UserError(f"the checkpoint has no chat template; pass --mode with its format, one of {modes_text()}")
        variables = ({} if thinking is None else {"enable_thinking": thinking}) | dict(variables or {})
        self.template = None if self.layout else ChatTemplate(tokenizer, self._template_name(), variables)
        own = {self._token_text(token): self._special_id(token) for token in self._own_tokens()}
        self.controls = ControlTokens(tokenizer, own, written_around(self.template) if self.template else ())

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Token ids of the messages up to where the assistant begins to write; the last is a user's or a tool's."""
        self._check_tools(messages, tools)
        if self.layout:
            return self._encode_pieces(self.layout(messages, True)).ids
        self.template.start(messages)
        if self._trusted(messages, tools):
            text = self.template.text(messages, True, tools)
            ids = self._encode(text)
            if self._own_only(text, Asked(messages, tools), True, ids):
                return ids
        return self.controls.encode_named(self.template.named(messages, True, self.controls, tools))[0]

    def stop_ids(self) -> list[int]:
        """Tokens at which the assistant has finished: the end token and the family's own."""
        return sorted({self.tokenizer.eos_token_id, *map(self._special_id, self.family.stop)})

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), learned: Sequence[bool] | None = None
    ) -> list[Rendered]:
        """The conversation with its learned tokens: every answer and its end token, or those that `learned` says.

        One element; or one per learned answer where a later turn changes how an earlier one is written (templates
        that drop reasoning from history, ChatGLM-6B's prefix attention).
        """
        flags = [message["role"] == "assistant" for message in messages] if learned is None else learned
        ends = [i + 1 for i, flag in enumerate(flags) if flag]
        self._check_tools(messages, tools)
        if self.layout:
            marked = [message | {"learned": flag} for message, flag in zip(messages, flags, strict=True)]
            if self.family.one_sample_per_answer:
                return [self._encode_pieces(self.layout(marked[:end], False)) for end in ends]
            return [self._encode_pieces(self.layout(marked, False))]
        self.template.start(messages)
        asked = Asked(messages, tools)
        samples = self._templated(asked, ends, False) if self._trusted(messages, tools) else None
        return samples or self._templated(asked, ends, True) or []

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Any]) -> None:
        """Raise UserError for tools in a format that does not write them."""
        if not tools and all(message["role"] != "tool" and "tool_calls" not in message for message in messages):
            return
        if self.template is None or self.family.name != OWN:
            raise no_tools(f"the format {self.family.name}", ["tools"])
        self.template.start(messages)
        self.template.check_tools(messages, tools)

    def _trusted(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> bool:
        """Whether the rendered messages may go to the tokenizer as they are."""
        return self.allow_special_tokens or self.controls.first(messages, tools) is None

    def _own_only(self, text: str, asked: "Asked", generate: bool, ids: Sequence[int]) -> bool:
        """Whether all control tokens of a rendered and encoded conversation are the template's."""
        if self.allow_special_tokens:
            return True
        if self.controls.checks and self.controls.count(ids) != len(self.controls.found(text)):
            return False
        return self.template.own_only(text, asked.messages, generate, self.controls, asked.tools)

    def _text(self, asked: "Asked", generate: bool, named: bool) -> str:
        if named:
            return self.template.named(asked.messages, generate, self.controls, asked.tools)
        return self.template.text(asked.messages, generate, asked.tools)

    def _templated(self, asked: "Asked", ends: list[int], named: bool) -> list[Rendered] | None:
        """The samples by the template, with names for its control tokens or without.

        None when a text without names has control tokens that are not the template's.
        """
        text = self._text(asked, False, named)
        spans = self._answer_spans(asked, ends, text, named)
        parts = [(asked, text, spans)] if spans is not None else [
            (asked.upto(end), *self._last_answer(asked.upto(end), named)) for end in ends
        ]  # fmt: skip
        samples = []
        for part, written, answers in parts:
            sample = self._encode_spans(written, answers, named)
            if not named and not self._own_only(written, part, False, sample.ids):
                return None
            if sample.learned[-1] and not self.template.ends_answers:
                sample.ids.append(self.tokenizer.eos_token_id)
                sample.learned.append(True)
            samples.append(sample)
        return samples

    def _answer_spans(self, asked: "Asked", ends: list[int], text: str, named: bool) -> list[tuple[int, int]] | None:
        """Character spans of the answers in the full text, or None when the parts are not prefixes of the whole."""
        spans = []
        for end in ends:
            before = self._text(asked.upto(end - 1), True, named)
            upto = text if end == len(asked.messages) else self._text(asked.upto(end), False, named)
            if not (upto.startswith(before) and text.startswith(upto)):
                return None
            spans.append((len(before), end_of_answer(upto)))
        return spans

    def _last_answer(self, asked: "Asked", named: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text that ends with an answer, and the answer's span in it."""
        before, text = self._text(asked.upto(-1), True, named), self._text(asked, False, named)
        if not text.startswith(before):
            text = self._thought_answer(asked, before, text, named)
        return text, [(len(before), end_of_answer(text))]

    def _thought_answer(self, asked: "Asked", before: str, text: str, named: bool) -> str:
        """The text that ends with an answer, where the generation prompt opens or closes the thinking by itself.

        Such templates (DeepSeek-R1's) write an answer without its thinking, also the last one. What is learned is
        what the model would have to write after its prompt. Raises UserError where that cannot be told.
        """
        same = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(text))
        tail = before[same:].strip()
        answer = asked.messages[-1]["content"].lstrip()
        if tail == "<think>" and "tool_calls" not in asked.messages[-1]:
            mark = "\ue0f0answer\ue0f1"  # a text that holds no thinking
            marked = Asked([*asked.messages[:-1], {"role": "assistant", "content": mark}], asked.tools)
            rest = answer.removeprefix("<think>") if "</think>" in answer else f"\n</think>\n\n{answer}"
            ending = self._text(marked, False, named).rpartition(mark)[2]
            return before + (rest.lstrip("\n") if before.endswith("\n") else rest) + ending
        if "</think>" in tail and "</think>" in answer:
            raise UserError(
                "an answer thinks (<think>) and --enable_thinking false asks for answers that do not; leave it out, "
                "or take the thinking out of the data"
            )
        raise UserError(
            "the checkpoint's chat template writes an answer differently from its own generation prompt, so its "
            f"tokens cannot be found; pass --mode with one of {modes_text()}"
        )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def _backend(self) -> Any:
        """The tokenizer behind a fast one, without truncation and padding, as a call of the outer one leaves it."""
        self.tokenizer("", add_special_tokens=False)
        return self.tokenizer.backend_tokenizer

    def _encode_spans(self, text: str, spans: list[tuple[int, int]], named: bool) -> Rendered:
        """Encode the text as a whole and mark the tokens that overlap a span. Needs a fast tokenizer's offsets."""
        if not self.tokenizer.is_fast:
            ids: list[int] = []
            learned: list[bool] = []
            cursor = 0
            for start, end in [*spans, (len(text), len(text))]:
                for part, flag in ((text[cursor:start], False), (text[start:end], True)):
                    encoded = (self.controls.encode_named(part)[0] if named else self._encode(part)) if part else []
                    ids += encoded
                    learned += [flag] * len(encoded)
                cursor = end
            return Rendered(ids, learned)
        if named:
            ids, offsets = self.controls.encode_named(text)
        else:
            encoding = self._backend.encode(text, add_special_tokens=False)
            ids, offsets = encoding.ids, encoding.offsets
        return Rendered(ids, overlapping(offsets, spans))

    def _encode_pieces(self, pieces: list[Piece]) -> Rendered:
        ids: list[int] = []
        learned: list[bool] = []
        for piece in pieces:
            if piece.control:
                encoded = [self._special_id(piece.content)]
            elif self.allow_special_tokens:
                encoded = self._encode(str(piece.content))
            else:
                encoded = self.controls.encode_text(str(piece.content))
            ids += encoded
            learned += [piece.learned] * len(encoded)
        return Rendered(ids, learned)

    def _special_id(self, token: str | int) -> int:
        if isinstance(token, int):
            return token
        if token == "</s>":
            return self.tokenizer.eos_token_id
        if hasattr(self.tokenizer, "get_command"):  # ChatGLM2 and 3 keep their special ids outside the vocabulary
            return self.tokenizer.get_command(token)
        return self.tokenizer.convert_tokens_to_ids(token)

    def _own_tokens(self) -> set[str | int]:
        """What the format inserts by id."""
        return {*OWN_TOKENS.get(self.family.layout, ()), *self.family.stop}

    def _token_text(self, token: str | int) -> str:
        """The text of a token that the format inserts by id."""
        named = getattr(self.tokenizer, "convert_ids_to_tokens", None)
        return token if isinstance(token, str) else str(named(token) if named else token)

    def _template_name(self) -> str:
        return (
            "the checkpoint's chat template" if self.family.name == OWN else f"the chat template of {self.family.name}"
        )


def overlapping(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each (start, end) overlaps one of the spans, which are in order and apart."""
    if not spans or not offsets:
        return [False] * len(offsets)
    import numpy as np

    places, begins, ends = np.asarray(offsets), *np.asarray(spans).T
    first = np.searchsorted(ends, places[:, 0], side="right")  # the first span that ends after the token begins
    inside = first < len(ends)
    return (inside & (places[:, 1] > begins[np.minimum(first, len(ends) - 1)])).tolist()


def end_of_answer(text: str) -> int:
    """Where an answer and its end token end: blanks that a template writes after them are not learned."""
    return len(text.rstrip())


def choose_family(mode: str, config: dict[str, Any], tokenizer_text: str, has_template: bool | None) -> Family:
    """The family of a checkpoint; that of the mode OWN for its own template.

    `config` is config.json, `tokenizer_text` what the tokenizer's files say; `has_template` None: not known yet.
    Raises UserError for a mode that does not fit or an `auto` that finds nothing.
    """
    known = families()
    if mode not in known:
        raise UserError(f"unknown mode {mode!r}; expected one of {modes_text()} (a file of {TEMPLATES})")
    if mode != OWN:
        misfit = known[mode].misfit(config, tokenizer_text)
        if misfit:
            raise UserError(f"--mode {mode} {misfit}; pass --mode auto or the mode that fits")
        return known[mode]
    if has_template is not False:
        return known[OWN]
    for family in known.values():
        if family.model_types and not family.misfit(config, tokenizer_text):
            return family
    raise UserError(
        f"the checkpoint (model_type {config.get('model_type', '')!r}) has no chat template and is of no family with a "
        f"known format ({modes_text()}); put a chat_template.jinja with its format into the checkpoint's folder"
    )
