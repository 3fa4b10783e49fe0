"""Follow a log that grows, is replaced, is emptied, or does not exist yet."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from eval.diagnosis.log_reader import LogReader
from llmops.console import Terminated, UserError, log

PIECE = 1 << 20


@contextmanager
def ended_by_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; on the way out the signal becomes the exit code (128 + its number)."""
    stopped = threading.Event()
    received = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise Terminated(128 + received[0])


def follow(path: Path, find: Callable[[Path], Path], interval: float, until_idle: float) -> Iterator[LogReader]:
    """A reader after every growth of the log, first with all that is there; a fresh one when the log begins anew.

    Ends when nothing was added for `until_idle` seconds (0: never). A last line without its end is read only then.
    """
    with ended_by_signal() as stopped:
        log_path = wait_for(path, find, interval, until_idle, stopped)
        reader, position, file_id = LogReader(), 0, None
        grown = time.monotonic()
        while log_path:
            if stopped.is_set():
                return
            try:
                with open(log_path, "rb") as stream:
                    now = (log_path.stat().st_ino, log_path.stat().st_dev)
                    if (file_id and now != file_id) or log_path.stat().st_size < position:
                        log(f"{log_path} begins anew")
                        reader, position = LogReader(), 0
                    file_id = now
                    stream.seek(position)
                    added = 0
                    while (piece := stream.read(PIECE)) and not stopped.is_set():
                        reader.feed(piece)
                        added += len(piece)
            except FileNotFoundError:
                added = 0  # between two files: a rotation, or a training that starts again
            position += added
            if added:
                grown = time.monotonic()
                yield reader
            elif until_idle and time.monotonic() - grown >= until_idle:
                reader.finish()
                yield reader
                return
            stopped.wait(interval)


def wait_for(
    path: Path, find: Callable[[Path], Path], interval: float, until_idle: float, stopped: threading.Event
) -> Path | None:
    """The log once it exists, None when that was given up. Raises UserError where nothing can ever appear."""
    started = time.monotonic()
    said = False
    while not stopped.is_set():
        if path.is_file():
            return path
        try:
            return find(path)
        except UserError:
            if not path.is_dir() and not path.parent.is_dir():
                raise
            if until_idle and time.monotonic() - started >= until_idle:
                raise
        if not said:
            log(f"waiting for {path} to appear")
            said = True
        stopped.wait(interval)
    return None
