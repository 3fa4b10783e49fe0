"""A training's log.txt as the platform reads it from a container's output.

Its reader takes everything between { and } of a line, turns single quotes into double ones and tries it as JSON with
the fields epoch, loss, learning_rate, grad_norm, eval_loss, step, rank; what has no loss counts as a loss of 0, and the
last one is what it shows. So each line has its loss and the last eval_loss, and no other line may have such brackets.
Seen in the platform's source (IceBearAI/LLM-And-More, cmd/service/service_job_finetuning.go).
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmops import files

COPIED = ("learning_rate", "grad_norm")
INTERVAL = 0.5  # seconds between two looks
BRACKETS = str.maketrans("{}", "()")


def without_brackets(text: str) -> str:
    """A text that the platform's reader passes over."""
    return text.translate(BRACKETS)


class Lines:
    """Lines of log.txt into lines of the platform, each step's once."""

    def __init__(self) -> None:
        self.told: set[tuple[int, bool]] = set()
        self.loss: float | None = None
        self.eval_loss: float | None = None

    def take(self, line: dict[str, Any]) -> str | None:
        """The platform's line for a parsed line of log.txt; None where it has nothing to show there, or had it already.

        An evaluation comes with the loss of the step before it. The one before the first step has none: it waits.
        """
        step, evaluated = line.get("step"), line.get("eval_loss")
        if not isinstance(step, int) or not ({"loss", "eval_loss"} & line.keys()):
            return None
        kind = (step, "eval_loss" in line)
        if kind in self.told:
            return None
        self.told.add(kind)
        if isinstance(evaluated, int | float):
            self.eval_loss = evaluated
        if isinstance(line.get("loss"), int | float):
            self.loss = line["loss"]
        elif "loss" in line or self.loss is None:
            return None  # a loss that is no number: the platform would take it for 0
        entry = {"rank": 0, "epoch": line.get("epoch"), "step": step, "loss": self.loss}
        entry |= {name: line[name] for name in COPIED if isinstance(line.get(name), int | float)}
        if self.eval_loss is not None:
            entry["eval_loss"] = self.eval_loss
        return str(entry)


class Follower:
    """Tells what comes into a log.txt, from its first line, in a thread of its own; a context manager.

    The file may appear later and may be replaced by another one.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path, self.tell = path, tell
        self.lines = Lines()
        self.place = (0, 0)  # the file's number, and how many of its bytes were read
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Follower":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(INTERVAL):
            self._look()
        self._look()

    def _look(self) -> None:
        """Read the whole lines that came since the last look."""
        if not files.is_file(self.path):
            return
        with files.open_regular(self.path, "the log") as stream:
            number = os.fstat(stream.fileno()).st_ino
            offset = self.place[1] if number == self.place[0] else 0
            stream.seek(offset)
            for raw in stream:
                if not raw.endswith(b"\n"):
                    break
                offset += len(raw)
                value, _ = files.parse_line(raw)
                told = self.lines.take(value) if isinstance(value, dict) else None
                if told:
                    self.tell(told)
        self.place = (number, offset)
