"""Tokens to text while they come, and the texts that end an answer."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what a decoder writes for half a character
MOST_HELD = 6  # tokens that may wait for the rest of a character


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
