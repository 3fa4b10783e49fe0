"""Content is content: which texts are control tokens, and how a text that holds one is encoded as text.

A control token is what the tokenizer marks as special, what a chat format inserts by id, and an added token that a chat
template writes around messages although the tokenizer does not call it special. Other added tokens that are not special
(`<think>`, `<tool_call>`) are vocabulary that any text may use. A tokenizer takes the text of a control token for the
token wherever it stands, so the two kinds are told apart before it sees them:

- `named`: in a rendered conversation the template's own control tokens get other names, which no text can guess.
- A fast tokenizer has a copy that knows the control tokens under these names only, ids and all else unchanged. What is
  left of their texts is then text to it, encoded in its place like any other, and nothing beside it changes.
- A slow tokenizer encodes what lies between names; a text that would still give a control token is encoded in parts,
  cut inside the token's text.

Texts without control tokens never come here: they are encoded by the tokenizer as ever.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmops.console import UserError
from llmops.conversations.records import Message, texts_in, with_strings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PRIVATE = range(0xF0000, 0xFFFFE)  # characters without a meaning; whichever of them a text does not hold
ANCHORS = ("\n", ".", "a", "、")  # what a part of a text is encoded after, so that it is not taken for a beginning
Encoded = tuple[list[int], list[tuple[int, int]]]


class ControlTokens:
    """The control tokens of one tokenizer in one chat format.

    `own`: tokens that the format inserts by id. `written`: added tokens that its template writes around messages.
    """

    def __init__(self, tokenizer: Any, own: Mapping[str, int], written: Iterable[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.fast = bool(tokenizer.is_fast)
        known = dict(own) | {text: tokenizer.convert_tokens_to_ids(text) for text in special_texts(tokenizer, written)}
        unknown = getattr(tokenizer, "unk_token_id", None)  # what a rare character gives is no control token
        name = getattr(tokenizer, "unk_token", None)
        known = {text: i for text, i in known.items() if i is not None and (i != unknown or text == name)}
        self.ids = frozenset(known.values()) - {unknown}
        # one character or a blank cannot be written in another way; a slow tokenizer takes few texts for tokens
        texts = [text for text in known if len(text) > 1 and not text.isspace()]
        if not self.fast:
            texts = [text for text in texts if {*self._plain(text), *self._plain(f"a {text} a")} & {*known.values()}]
        self.texts = tuple(sorted(texts, key=len, reverse=True))
        either = "|".join(map(re.escape, self.texts)) or "(?!)"
        self._pattern = re.compile(either)
        self._starts = re.compile(f"(?=(?:{either})).", re.DOTALL)  # of overlapping ones, too
        secret = secrets.token_hex(8)
        self._names = {text: f"\ue000{secret}x{i}\ue001" for i, text in enumerate(self.texts)}
        self._named = re.compile(f"(\ue000{secret}x[0-9]+\ue001)")
        self._texts = {name: text for text, name in self._names.items()}
        self._copy: Tokenizer | None = None
        # whether a text without a control token's text could give one: a BPE cannot that takes texts as they are
        backend = tokenizer.backend_tokenizer if self.fast else None
        self.checks = backend is None or type(backend.model).__name__ != "BPE" or backend.normalizer is not None

    def first(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str | None:
        """The first control token that the texts of messages and tools hold, or None."""
        for text in texts_in(messages, tools):
            match = self._pattern.search(text)
            if match:
                return match.group()
        return None

    def found(self, text: str) -> list[str]:
        """The control tokens in a text, in their order."""
        return self._pattern.findall(text)

    def begins(self, text: str) -> str:
        """The control token that stands first in a text, blanks before it left out, or ""."""
        match = self._pattern.match(text.lstrip())
        return match.group() if match else ""

    def end_of_first(self, text: str, start: int, named: bool) -> int:
        """Where the control token (or its name) ends that follows `start` after blanks at most; else `start`."""
        blanks = len(text) - start - len(text[start:].lstrip()) if text[start : start + 1].isspace() else 0
        match = (self._named if named else self._pattern).match(text, start + blanks)
        return match.end() if match else start

    def count(self, ids: Iterable[int]) -> int:
        """How many of the ids are control tokens."""
        return sum(map(self.ids.__contains__, ids))

    def encode_text(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text in which nothing is a control token; `add_special_tokens`: with what begins every text."""
        if not self._pattern.search(text):
            ids = self._plain(text)
            if not (self.checks and self.count(ids)):
                return self._plain(text, True) if add_special_tokens else ids
        if self.fast:
            return self._renamed().encode(text, add_special_tokens=add_special_tokens).ids
        ids = self._as_text(text)
        return self.tokenizer.build_inputs_with_special_tokens(ids) if add_special_tokens else ids

    def encode_named(self, text: str) -> Encoded:
        """(ids, offsets into the text) of a text in which names stand for control tokens.

        A slow tokenizer gives no offsets.
        """
        if self.fast:
            encoding = self._renamed().encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        ids: list[int] = []
        run = ""  # what the tokenizer can take as it is
        for i, part in enumerate(self._named.split(text)):
            if i % 2:
                run += self._texts[part]
            elif part and (self._pattern.search(part) or self.count(self._plain(part))):
                ids += (self._plain(run) if run else []) + self._as_text(part)
                run = ""
            else:
                run += part
        return ids + (self._plain(run) if run else []), []

    def name(self, text: str) -> str:
        """The text with names for its control tokens."""
        return self._pattern.sub(lambda match: self._names[match.group()], text)

    def unnamed(self, text: str) -> str:
        """The text with the control tokens that the names in it stand for."""
        return self._named.sub(lambda match: self._texts[match.group()], text)

    def broken(self, text: str, mark: str) -> str:
        """The text with a mark after the first character of every control token in it."""
        return self._starts.sub(lambda match: match.group() + mark, text)

    def _plain(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def _renamed(self) -> "Tokenizer":
        """The copy of a fast tokenizer that knows the control tokens by their names; made when it is first needed."""
        if self._copy is None:
            copy = renamed(self.tokenizer.backend_tokenizer, self._names)
            for text, name in self._names.items():
                if copy.token_to_id(name) != self.tokenizer.convert_tokens_to_ids(text):
                    raise UserError(
                        f"a conversation holds the text of a control token, and the tokenizer's vocabulary gives "
                        f"{text!r} an id of its own twice, so it cannot be kept a text; take it out of the data"
                    )
            self._copy = copy
        return self._copy

    def _as_text(self, text: str) -> list[int]:
        """The ids of a text from a slow tokenizer, none of them a control token."""
        from transformers import PreTrainedTokenizer

        if getattr(type(self.tokenizer), "tokenize", None) is PreTrainedTokenizer.tokenize:
            ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if not self.count(ids):
                return ids
        return self._in_parts(text, False)

    def _in_parts(self, text: str, continues: bool) -> list[int]:
        """The ids of a text, encoded in as many parts as it takes; `continues`: it follows another text."""
        ids = self._after_anchor(text) if continues else self._plain(text)
        if not self.count(ids):
            return ids
        if len(text) == 1:
            raise UserError(f"the tokenizer writes {text!r} as a control token in any case; take it out of the data")
        match = self._pattern.search(text)
        cut = match.start() + 1 if match else len(text) // 2
        return self._in_parts(text[:cut], continues) + self._in_parts(text[cut:], True)

    def _after_anchor(self, text: str) -> list[int]:
        """The ids of a text that continues another: without what a tokenizer puts before a beginning."""
        for anchor in ANCHORS:
            head, whole = self._plain(anchor), self._plain(anchor + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self._plain(text)


def special_texts(tokenizer: Any, written: Iterable[str]) -> list[str]:
    """What a tokenizer calls special, and what a template writes."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = [token.content for token in added if token.special]
    return list(dict.fromkeys([*special, *map(str, getattr(tokenizer, "all_special_tokens", ())), *written]))


def renamed(backend: "Tokenizer", names: Mapping[str, str]) -> "Tokenizer":
    """A copy of a tokenizer in which some tokens have other texts, as added tokens and in the model; ids stay."""
    from tokenizers import Tokenizer

    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = description["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    description["truncation"] = description["padding"] = None
    return Tokenizer.from_str(json.dumps(description))


@dataclass(frozen=True)
class Marks:
    """Three characters that no text of a conversation holds: inside a control token, before and after a message."""

    inside: str
    before: str
    after: str

    @classmethod
    def absent_from(cls, texts: Iterable[str]) -> "Marks":
        """Marks that none of the texts holds."""
        held = set().union(*texts)
        free = (chr(code) for code in PRIVATE if chr(code) not in held)
        return cls(next(free), next(free), next(free))

    def put_into(self, message: Message, controls: ControlTokens, edges: bool) -> Message:
        """A message with marks in its text, and inside the control tokens that its calls hold."""
        others = {key: value for key, value in message.items() if key not in ("role", "content")}
        others = with_strings(others, lambda text: controls.broken(text, self.inside)) if others else others
        return {"role": message["role"], "content": self.put(message["content"], controls, edges)} | others

    def put(self, content: str, controls: ControlTokens, edges: bool) -> str:
        """A message's text with marks; those at its edges lie within blanks, which templates strip."""
        core = content.strip()
        if not core:
            return content
        start = content.index(core)
        inner = controls.broken(core, self.inside)
        marked = f"{self.before}{inner}{self.after}" if edges else inner
        return content[:start] + marked + content[start + len(core) :]

    def taken(self, text: str) -> str:
        """The text without marks."""
        return re.sub(f"[{self.inside}{self.before}{self.after}]", "", text)

    def named(self, text: str, controls: ControlTokens) -> str | None:
        """The rendered text without marks, and with names for control tokens that are no message's in any part.

        None when the marks at the messages' edges are not in pairs.
        """
        parts = re.split(f"{self.before}([^{self.before}{self.after}]*){self.after}", text)
        if any(self.before in part or self.after in part for part in parts):
            return None
        # a token that holds a mark, or that begins in one part and ends in the next, is left as the text that it is
        return self.taken("".join(part if i % 2 else controls.name(part) for i, part in enumerate(parts)))
