"""Conversations to token ids and back to which of them are learned: the one renderer of training and evaluation.

A checkpoint's own chat template wins. A checkpoint without one is served by its family's file (`families`): either a
Jinja template (formats whose special tokens are typed as text) or the name of a function that lays out pieces (formats
whose role tokens must be inserted by id, `layouts`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmops.console import UserError
from llmops.conversations.records import Message
from llmops.formats.chat_templates import PROBE, ChatTemplate, no_tools, written_around
from llmops.formats.control_tokens import ControlTokens
from llmops.formats.families import OWN, Family, families, modes_text
from llmops.formats.layouts import LAYOUTS, OWN_TOKENS, Piece

if TYPE_CHECKING:
    from llmops.formats.spans import SpanEncoder

THINKING = ("enable_thinking", "thinking")  # Qwen3 and most others; DeepSeek-V3.1, Granite
OPENED, CLOSED = "<think>", "</think>"

NOT_TO_THINK = (
    "an answer thinks (<think>) and --enable_thinking false asks for answers that do not; leave it out, or take the "
    "thinking out of the data"
)


@dataclass
class Rendered:
    """Token ids of a conversation and, for each, whether it is learned. Both have the same length."""

    ids: list[int]
    learned: list[bool]


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
    `allow_special_tokens` lets the tokenizer take them for what they look like. `ends`: where the vendor ends answers.
    """

    def __init__(
        self,
        tokenizer: Any,
        family: Family | None = None,
        allow_special_tokens: bool = False,
        thinking: bool | None = None,
        variables: Mapping[str, Any] | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.ends = tuple(ends)
        self.family = family = family or families()[OWN]
        self.allow_special_tokens = allow_special_tokens
        self.layout = LAYOUTS[family.layout] if family.layout else None
        if family.chat_template:
            tokenizer.chat_template = family.chat_template
        self.name = family.name if family.name != OWN else "the checkpoint's own chat template"
        if self.layout is None and not tokenizer.chat_template:
            raise UserError(f"the checkpoint has no chat template; pass --mode with its format, one of {modes_text()}")
        self.thinking = thinking
        variables = ({} if thinking is None else dict.fromkeys(THINKING, thinking)) | dict(variables or {})
        self.template: ChatTemplate | None = (
            None if self.layout else ChatTemplate(tokenizer, self._template_name(), variables)
        )
        own = {self._token_text(token): self._special_id(token) for token in self._own_tokens()}
        self.controls = ControlTokens(tokenizer, own, written_around(self.template) if self.template else ())

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Token ids of the messages up to where the assistant begins to write; the last is a user's or a tool's."""
        self._check_tools(messages, tools)
        if self.layout:
            return self._encode_pieces(self.layout(messages, True)).ids
        self._jinja.start(messages)
        if self._trusted(messages, tools):
            text = self._jinja.text(messages, True, tools)
            ids = self._encode(text)
            if self._own_only(text, Asked(messages, tools), True, ids):
                return ids
        return self.controls.encode_named(self._jinja.named(messages, True, self.controls, tools))[0]

    def stop_ids(self) -> list[int]:
        """Tokens at which the assistant has finished, for every command: the end token, the family's own, the vendor's,
        and what ends an answer as this format writes it."""
        named = {self.tokenizer.eos_token_id, *map(self._special_id, self.family.stop), *self.ends}
        return sorted(named | self._written_ends | {*self._followers.values()})

    @property
    def knows_thinking(self) -> bool:
        """Whether the template can be told to think or not to."""
        return self.template is not None and self.template.names_any(THINKING)

    @cached_property
    def _followers(self) -> dict[str, int]:
        """The control token after an answer by who speaks next, in a template that ends no answer itself (GLM-4's)."""
        after = self.template.after_answers() if self.template else {}
        begun = {role: self.controls.begins(text) for role, text in after.items()}
        return {role: self._special_id(token) for role, token in begun.items() if token}

    @cached_property
    def _written_ends(self) -> set[int]:
        """What ends a rendered answer, where it is one token; none where the format wants other conversations."""
        for question in (PROBE[1:2], PROBE[:2]):
            try:
                first, other = (self._learned_tokens([*question, probe_answer(text)]) for text in ("third probe", "x"))
            except UserError:  # it takes none of these conversations: real ones will tell
                continue
            shared = next((n for n, (a, b) in enumerate(zip(first[::-1], other[::-1], strict=False)) if a != b), 0)
            return {*first[-1:]} if shared == 1 or self.controls.count(first[-1:]) else set()
        return set()

    def _learned_tokens(self, messages: Sequence[Message]) -> list[int]:
        """The learned tokens of the last answer."""
        sample = self.conversation(messages)[-1]
        return [i for i, learned in zip(sample.ids, sample.learned, strict=True) if learned]

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
        self._jinja.start(messages)
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

    @property
    def _jinja(self) -> ChatTemplate:
        """The template, in a format that has one."""
        assert self.template is not None
        return self.template

    def _own_only(self, text: str, asked: "Asked", generate: bool, ids: Sequence[int]) -> bool:
        """Whether all control tokens of a rendered and encoded conversation are the template's."""
        if self.allow_special_tokens:
            return True
        if self.controls.checks and self.controls.count(ids) != len(self.controls.found(text)):
            return False
        return self._jinja.own_only(text, asked.messages, generate, self.controls, asked.tools)

    def _text(self, asked: "Asked", generate: bool, named: bool) -> str:
        if named:
            return self._jinja.named(asked.messages, generate, self.controls, asked.tools)
        return self._jinja.text(asked.messages, generate, asked.tools)

    def _templated(self, asked: "Asked", ends: list[int], named: bool) -> list[Rendered] | None:
        """The samples by the template, with names for its control tokens or without.

        None when a text without names has control tokens that are not the template's.
        """
        text = self._text(asked, False, named)
        spans = self._answer_spans(asked, ends, text, named)
        parts = [(asked, text, spans, ends[-1])] if spans is not None else [
            (asked.upto(end), *self._last_answer(asked.upto(end), named), end) for end in ends
        ]  # fmt: skip
        samples = []
        for part, written, answers, end in parts:
            sample = self._encode_spans(written, answers, named)
            if not named and not self._own_only(written, part, False, sample.ids):
                return None
            if end == len(part.messages) and not self._jinja.ends_answers:
                follower = asked.messages[end]["role"] if end < len(asked.messages) else ""
                sample = ended(sample, self._followers.get(follower, self.tokenizer.eos_token_id))
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
            closed = end_of_answer(upto)
            self._check_thought(asked.messages[end - 1]["content"], upto[len(before) :])
            if not self._jinja.ends_answers:
                closed = self.controls.end_of_first(text, closed, named)
            spans.append((len(before), closed))
        return spans

    def _last_answer(self, asked: "Asked", named: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text that ends with an answer, and the answer's span in it."""
        before, text = self._text(asked.upto(-1), True, named), self._text(asked, False, named)
        if not text.startswith(before):
            text = self._thought_answer(asked, before, text, named)
        self._check_thought(asked.messages[-1]["content"], text[len(before) :])
        return text, [(len(before), end_of_answer(text))]

    def _check_thought(self, answer: str, written: str) -> None:
        """Raise UserError where an answer's thought is not in what is written of it, which would not learn it."""
        thought, closed, _ = answer.partition(CLOSED)
        if not closed or "".join(thought.rpartition(OPENED)[2].split()) in "".join(written.split()):
            return
        if self.thinking is False:
            raise UserError(NOT_TO_THINK)
        cure = "take the thinking out of the data"
        if self.knows_thinking and self.thinking is None:
            cure = "pass --enable_thinking true, or take the thinking out of the data"
        name = self._template_name()
        raise UserError(
            f"an answer thinks (<think>) and {name} leaves the thought out, so it would not be learned; {cure}"
        )

    def _thought_answer(self, asked: "Asked", before: str, text: str, named: bool) -> str:
        """The text that ends with an answer, where the generation prompt opens or closes the thinking by itself.

        Such templates (DeepSeek-R1's) write an answer without its thinking, also the last one. What is learned is
        what the model would have to write after its prompt. Raises UserError where that cannot be told.
        """
        same = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(text))
        answer = asked.messages[-1]["content"].lstrip()
        tag, prompt = self.controls.name(OPENED) if named else OPENED, before.rstrip()
        # the answer's own first characters may be the tag's
        opens = prompt.endswith(tag) and same >= len(prompt) - len(tag)
        if opens and "tool_calls" not in asked.messages[-1]:
            mark = "\ue0f0answer\ue0f1"  # a text that holds no thinking
            marked = Asked([*asked.messages[:-1], {"role": "assistant", "content": mark}], asked.tools)
            rest = answer.removeprefix(OPENED) if CLOSED in answer else f"\n{CLOSED}\n\n{answer}"
            ending = self._text(marked, False, named).rpartition(mark)[2]
            return before + (rest.lstrip("\n") if before.endswith("\n") else rest) + ending
        if CLOSED in before[same:] and CLOSED in answer:
            raise UserError(NOT_TO_THINK)
        raise UserError(
            "the checkpoint's chat template writes an answer differently from its own generation prompt, so its "
            f"tokens cannot be found; pass --mode with one of {modes_text()}"
        )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def _spans(self) -> "SpanEncoder":
        """A fast tokenizer's, without truncation and padding, as a call of the outer one leaves it."""
        from llmops.formats.spans import SpanEncoder  # numpy, which not every command needs

        self.tokenizer("", add_special_tokens=False)
        return SpanEncoder(self.tokenizer.backend_tokenizer)

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
            return Rendered(ids, self._spans.marked(offsets, spans))
        return Rendered(*self._spans.encode(text, spans))

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


def probe_answer(text: str) -> Message:
    """An assistant's message."""
    return {"role": "assistant", "content": text}


def ended(sample: Rendered, token: int) -> Rendered:
    """The sample up to its last learned token, and then a learned `token`; one that learns nothing stays as it is."""
    end = max((i for i, learned in enumerate(sample.learned) if learned), default=-1) + 1
    return Rendered([*sample.ids[:end], token], [*sample.learned[:end], True]) if end else sample


def end_of_answer(text: str) -> int:
    """Where an answer and its end token end: blanks that a template writes after them are not learned."""
    return len(text.rstrip())
