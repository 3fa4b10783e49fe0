"""SIGINT and SIGTERM end an evaluation in good order: at once while a model computes, else after the work at hand."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from llmops.console import Terminated, log

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 1.0  # seconds in which a second signal is the first one again: the terminal's, and the launcher's that heard it


class Interrupts:
    """Turns the signals into Terminated within `computing`; what is finished can then be reported.

    A second signal ends the process as if nothing had been caught. Only a process's main thread can catch signals;
    elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.code, self.since = 0, 0.0
        self.raising = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._caught) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within this context a signal raises Terminated where it arrives; one that came before does so at once."""
        self.raising = True
        try:
            if self.code:
                raise Terminated(self.code)
            yield
        finally:
            self.raising = False

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.code:
            if time.monotonic() - self.since > SAME:
                self._restore()
                signal.raise_signal(number)
            return
        self.code, self.since = 128 + number, time.monotonic()
        if self.raising:
            self.raising = False
            raise Terminated(self.code)
        log(f"{signal.Signals(number).name}: ending after what is being written")

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
