"""Tokens to text while they come, and the texts that end an answer."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what a decoder writes for half a character
LOOK_BACK = 6  # tokens that decide how the next one is written


class Detokenizer:
    """The text of an answer, piece by piece; a stop's text never comes out, nor what may become one.

    A token is decoded together with a few before it: blanks and characters of several tokens depend on them.
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
        if whole.endswith(UNFINISHED) and len(self.ids) - self._end < LOOK_BACK:
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
        self._begin = max(0, len(self.ids) - LOOK_BACK)
        self._end = len(self.ids)
        return whole[len(before) :]

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
