"""Conversations to token ids and back to which of them are learned: the one renderer of training and evaluation.

A checkpoint's own chat template wins. A checkpoint without one is served by its family's entry in FAMILIES: either a
Jinja template (formats whose special tokens are typed as text) or a function that lays out pieces (formats whose role
tokens must be inserted by id). Sources of the formats: the vendors' own demos and fine-tuning code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmops.console import UserError
from llmops.records import Message


@dataclass
class Rendered:
    """Token ids of a conversation and, for each, whether it is learned. Both have the same length."""

    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True)
class Piece:
    """A run of text or one token, in a format that is laid out by id."""

    content: str | int
    learned: bool = False


Layout = Callable[[Sequence[Message], bool], list[Piece]]


@dataclass(frozen=True)
class Family:
    """How one model family writes conversations and which layers its LoRA adapts.

    `template` is a Jinja chat template, or `layout` turns messages into pieces. `model_types` are the config.json
    model_type values that `auto` recognises, narrowed by `hints` (all of these keys must be in config.json).
    `per_turn`: one sample per answer, because the prompt is not causal.
    """

    name: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    model_types: tuple[str, ...] = ()
    template: str | None = None
    layout: Layout | None = None
    hints: tuple[str, ...] = field(default=())
    per_turn: bool = False

    @property
    def lora_layers(self) -> tuple[str, ...]:
        """Attention and MLP; the head is left out."""
        return self.attention + self.mlp


LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


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
    pieces = [Piece(system + prompt), Piece("[gMASK]"), Piece("<sop>")]
    if not generate:
        pieces += [Piece(rounds[-1][1]["content"], True), Piece("<eop>", True)]
    return pieces


def glm2_layout(messages: Sequence[Message], generate: bool) -> list[Piece]:
    """ChatGLM2: `[gMASK]sop[Round i]\\n\\n问：q\\n\\n答：a</s>`, blank lines between rounds; the end token by id."""
    system, turns = split_system(messages)
    pieces = [Piece("[gMASK]"), Piece("sop")]
    for i in range(0, len(turns), 2):
        lead = system if i == 0 else "\n\n"
        pieces.append(Piece(f"{lead}[Round {i // 2 + 1}]\n\n问：{turns[i]['content']}\n\n答："))
        if i + 1 < len(turns):
            pieces += [Piece(turns[i + 1]["content"], True), Piece("</s>", True)]
    return pieces


def glm3_layout(messages: Sequence[Message], generate: bool) -> list[Piece]:
    """ChatGLM3: role tokens by id, `\\n ` and the text encoded apart.

    An answer ends with the next `<|user|>`, the last with eos.
    """
    pieces = [Piece("[gMASK]"), Piece("sop")]
    for i, message in enumerate(messages):
        answer = message["role"] == "assistant"
        after_answer = i > 0 and messages[i - 1]["role"] == "assistant"
        pieces += [
            Piece(f"<|{message['role']}|>", after_answer),
            Piece("\n", answer),
            Piece(message["content"], answer),
        ]
    pieces.append(Piece("<|assistant|>") if generate else Piece("</s>", True))
    return pieces


def baichuan2_layout(messages: Sequence[Message], generate: bool) -> list[Piece]:
    """Baichuan2: system as a raw prefix, `<reserved_106>` (195) q `<reserved_107>` (196) a, eos after every answer."""
    system, turns = split_system(messages)
    pieces = [Piece(system)] if system else []
    for message in turns:
        if message["role"] == "user":
            pieces += [Piece(195), Piece(message["content"])]
        else:
            pieces += [Piece(196), Piece(message["content"], True), Piece("</s>", True)]
    return pieces + ([Piece(196)] if generate else [])


def split_system(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """(system text or "", the turns after it)."""
    if messages[0]["role"] == "system":
        return messages[0]["content"], list(messages[1:])
    return "", list(messages)


def full(rounds: list[list[Message]]) -> list[tuple[Message, Message]]:
    """Rounds as (question, answer) pairs; all of them are complete."""
    return [(r[0], r[1]) for r in rounds]


LLAMA_ATTENTION, LLAMA_MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
GLM_ATTENTION, GLM_MLP = ("query_key_value", "dense"), ("dense_h_to_4h", "dense_4h_to_h")
FAMILIES = {
    family.name: family
    for family in (
        Family("llama2", LLAMA_ATTENTION, LLAMA_MLP, ("llama",), template=LLAMA2_TEMPLATE),
        Family("qwen1.5", LLAMA_ATTENTION, LLAMA_MLP, ("qwen2",), template=CHATML_TEMPLATE),
        Family(
            "glm",
            GLM_ATTENTION,
            GLM_MLP,
            ("chatglm",),
            layout=glm_layout,
            hints=("position_encoding_2d",),
            per_turn=True,
        ),
        Family("glm3", GLM_ATTENTION, GLM_MLP, layout=glm3_layout),
        Family("glm2", GLM_ATTENTION, GLM_MLP, ("chatglm",), layout=glm2_layout, hints=("multi_query_attention",)),
        Family("baichuan2_13b", ("W_pack", "o_proj"), LLAMA_MLP, ("baichuan",), layout=baichuan2_layout),
    )
}


class ChatFormat:
    """Renders conversations for one tokenizer: by its own chat template, or by a family's entry."""

    def __init__(self, tokenizer: Any, family: Family | None = None) -> None:
        self.tokenizer = tokenizer
        self.layout = family.layout if family else None
        self.per_turn = bool(family and family.per_turn)
        if family and family.template:
            tokenizer.chat_template = family.template
        self.name = family.name if family else "the checkpoint's own chat template"
        if self.layout is None and not tokenizer.chat_template:
            raise UserError(
                f"the checkpoint has no chat template; pass --mode with its format, one of {', '.join(FAMILIES)}"
            )

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the messages up to where the assistant begins to write; the last message is the user's."""
        if self.layout:
            return self._encode_pieces(self.layout(messages, True)).ids
        return self._encode(self._text(messages, generate=True))

    def conversation(self, messages: Sequence[Message]) -> list[Rendered]:
        """The conversation with its learned tokens: every answer and its end token.

        One element; or one per answer where a later turn changes how an earlier one is written (templates that drop
        reasoning from history, ChatGLM-6B's prefix attention).
        """
        ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.layout:
            if self.per_turn:
                return [self._encode_pieces(self.layout(messages[:end], False)) for end in ends]
            return [self._encode_pieces(self.layout(messages, False))]
        spans = self._answer_spans(messages, ends)
        if spans is not None:
            return [self._encode_spans(self._text(messages), spans)]
        return [self._encode_last_answer(messages[:end]) for end in ends]

    def _text(self, messages: Sequence[Message], generate: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
        except TemplateError as error:
            raise UserError(f"the checkpoint's chat template refuses a conversation: {error}") from error

    def _answer_spans(self, messages: Sequence[Message], ends: list[int]) -> list[tuple[int, int]] | None:
        """Character spans of the answers in the full text, or None when the parts are not prefixes of the whole."""
        text = self._text(messages)
        spans = []
        for end in ends:
            before = self._text(messages[: end - 1], generate=True)
            upto = self._text(messages[:end])
            if not (upto.startswith(before) and text.startswith(upto)):
                return None
            spans.append((len(before), end_of_answer(upto)))
        return spans

    def _encode_last_answer(self, messages: Sequence[Message]) -> Rendered:
        before, text = self._text(messages[:-1], generate=True), self._text(messages)
        if not text.startswith(before):
            raise UserError(
                "the checkpoint's chat template writes an answer differently from its own generation prompt, so its "
                f"tokens cannot be found; pass --mode with one of {', '.join(FAMILIES)}"
            )
        return self._encode_spans(text, [(len(before), end_of_answer(text))])

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode_spans(self, text: str, spans: list[tuple[int, int]]) -> Rendered:
        """Encode the text as a whole and mark the tokens that overlap a span. Needs a fast tokenizer's offsets."""
        if not self.tokenizer.is_fast:
            ids: list[int] = []
            learned: list[bool] = []
            cursor = 0
            for start, end in [*spans, (len(text), len(text))]:
                for part, flag in ((text[cursor:start], False), (text[start:end], True)):
                    encoded = self._encode(part) if part else []
                    ids += encoded
                    learned += [flag] * len(encoded)
                cursor = end
            return Rendered(ids, learned)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        learned = [False] * len(encoding["input_ids"])
        position = 0
        for i, (start, end) in enumerate(encoding["offset_mapping"]):
            while position < len(spans) and spans[position][1] <= start:
                position += 1
            if position == len(spans):
                break
            learned[i] = end > spans[position][0] and start < spans[position][1]
        return Rendered(encoding["input_ids"], learned)

    def _encode_pieces(self, pieces: list[Piece]) -> Rendered:
        ids: list[int] = []
        learned: list[bool] = []
        for piece in pieces:
            if isinstance(piece.content, int):
                encoded = [piece.content]
            elif is_special(piece.content):
                encoded = [self._special_id(piece.content)]
            else:
                encoded = self._encode(piece.content)
            ids += encoded
            learned += [piece.learned] * len(encoded)
        return Rendered(ids, learned)

    def _special_id(self, token: str) -> int:
        if token == "</s>":
            return self.tokenizer.eos_token_id
        if hasattr(self.tokenizer, "get_command"):  # ChatGLM2 and 3 keep their special ids outside the vocabulary
            return self.tokenizer.get_command(token)
        return self.tokenizer.convert_tokens_to_ids(token)


SPECIAL = {"[gMASK]", "<sop>", "<eop>", "sop", "</s>", "<|system|>", "<|user|>", "<|assistant|>"}


def is_special(text: str) -> bool:
    """Whether a piece is one of the tokens that must be inserted by id."""
    return text in SPECIAL


def end_of_answer(text: str) -> int:
    """Where an answer and its end token end: blanks that a template writes after them are not learned."""
    return len(text.rstrip())


def choose_family(mode: str, model_config: dict[str, Any], has_template: bool) -> Family | None:
    """The family of a checkpoint, or None for its own template.

    `model_config` is config.json. Raises UserError for a mode that does not fit or an `auto` that finds nothing.
    """
    model_type = model_config.get("model_type", "")
    if mode != "auto":
        if mode not in FAMILIES:
            raise UserError(f"unknown mode {mode!r}; expected auto or one of {', '.join(FAMILIES)}")
        expected = FAMILIES["glm2"].model_types if mode == "glm3" else FAMILIES[mode].model_types
        if model_type and model_type not in expected:
            raise UserError(
                f"--mode {mode} is for model_type {' or '.join(expected)}, the checkpoint is {model_type!r}; "
                "pass --mode auto or the mode that fits"
            )
        return FAMILIES[mode]
    if has_template:
        return None
    for family in FAMILIES.values():
        if model_type in family.model_types and all(hint in model_config for hint in family.hints):
            return family
    raise UserError(
        f"the checkpoint (model_type {model_type!r}) has no chat template and is of no family with a known format "
        f"({', '.join(FAMILIES)}); put a chat_template.jinja with its format into the checkpoint's folder"
    )
