"""Tokens to text while they come, the texts that end an answer, and what a token is by itself."""

import re
from collections.abc import Callable, Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a decoder writes for half a character
MOST_HELD = 6  # tokens that may wait for the rest of a character
BLANK = "▁"  # sentencepiece's
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a piece that is a byte, where sentencepiece falls back to them
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
UNPRINTABLE = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_LETTERS = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(UNPRINTABLE)}


class Detokenizer:
    """The text of an answer, piece by piece; a stop's text never comes out, nor what may become one.

    A token is decoded together with those of the piece before it, on which its blanks depend. So what is decoded begins
    where a piece began and never inside a character: a decoder of bytes gives up a whole run of them for half a one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.decode = decode
        self.stops = stops
        self.ids: list[int] = []
        self.held = ""  # decoded, and perhaps the beginning of a stop
        self.stopped = False
        self._begin = self._end = 0  # tokens [_begin, _end) are written, and decoded again with the next ones

    def push(self, token: int) -> str:
        """What can be said after one more token."""
        self.ids.append(token)
        whole = self.decode(self.ids[self._begin :])
        if whole.endswith(UNFINISHED) and len(self.ids) - self._end < MOST_HELD:
            return ""
        return self._say(self._new(whole))

    def finish(self) -> str:
        """What is left when no more tokens come."""
        if self.stopped:
            return ""
        rest = self._new(self.decode(self.ids[self._begin :])) if self._end < len(self.ids) else ""
        said = self._say(rest)
        held, self.held = self.held, ""
        return said if self.stopped else said + held

    def waiting(self) -> str:
        """The whole characters of tokens that wait for the rest of one."""
        if self._end == len(self.ids):
            return ""
        before = self.decode(self.ids[self._begin : self._end])
        return self.decode(self.ids[self._begin :]).rstrip(UNFINISHED)[len(before) :]

    def _new(self, whole: str) -> str:
        before = self.decode(self.ids[self._begin : self._end])
        new = whole[len(before) :]
        if new:  # a token without a text tells nothing of the next one's blanks
            self._begin = self._end
        self._end = len(self.ids)
        return new

    def _say(self, new: str) -> str:
        if not self.stops:
            return new
        text = self.held + new
        places = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if places:
            self.stopped, self.held = True, ""
            return text[: min(places)]
        keep = max(begun(text, stop) for stop in self.stops)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Offsets:
    """Where the tokens of an answer begin in its text, in characters; a part of a character: where that one begins."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._said = self._next = 0

    def place(self, token: int) -> int:
        """Where the next token begins."""
        begins = self._next
        self._said += len(self._detokenizer.push(token))
        self._next = self._said + len(self._detokenizer.waiting())
        return begins


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """What a token adds to a text in UTF-8: its true bytes where it is a part of a character, its leading blank, too.

    Pieces of half a character are written in the letters of GPT-2's `bytes_to_unicode`, as sentencepiece's `<0xE4>`, or
    are bytes themselves.
    """
    text = str(tokenizer.decode([token]))
    piece = tokenizer.convert_ids_to_tokens(token)
    if isinstance(piece, bytes):
        return piece
    if not isinstance(piece, str):
        return text.encode()
    blanks = piece.replace(BLANK, " ")
    if piece.startswith(BLANK) and text == blanks[1:]:  # a decoder takes a text's first blank away
        return blanks.encode()
    if UNFINISHED in text:
        if byte := BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        if all(letter in BYTE_LETTERS for letter in piece):
            return bytes(BYTE_LETTERS[letter] for letter in piece)
    return text.encode()


def token_name(raw: bytes, mark: str = "") -> str:
    """A token as OpenAI writes it: its text; where it has parts of characters, those as `\\xe4`, after a mark."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return mark + raw.decode(errors="backslashreplace")
