"""Follow a log that grows, is replaced, is emptied, or does not exist yet."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from eval.diagnosis.log_reader import LogReader
from eval.diagnosis.sources import CURE, PACKED, PIECE
from llmops import files
from llmops.console import Terminated, UserError, log


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
        while log_path and not stopped.is_set():
            added = 0
            stream = open_log(log_path)
            if stream:  # else between two files: a rotation, or a training that starts again
                with stream:
                    status = os.fstat(stream.fileno())
                    now = (status.st_ino, status.st_dev)
                    if (file_id and now != file_id) or status.st_size < position:
                        log(f"{log_path} begins anew")
                        reader, position = LogReader(), 0
                    file_id = now
                    stream.seek(position)
                    for piece in grown_by(stream, status.st_size - position):
                        if position == 0 and piece.startswith(tuple(PACKED)):
                            raise UserError(
                                f"--watch follows plain text, and the log {log_path} is packed; leave --watch out"
                            )
                        reader.feed(piece)
                        position += len(piece)
                        added += len(piece)
            if added:
                grown = time.monotonic()
                yield reader
            elif until_idle and time.monotonic() - grown >= until_idle:
                reader.finish()
                yield reader
                return
            stopped.wait(interval)


def open_log(path: Path) -> BinaryIO | None:
    """The log, None while it is not there. Raises UserError for what is no file (a pipe, a device)."""
    try:
        return files.open_regular(path, "the log")
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def grown_by(stream: BinaryIO, left: int) -> Iterator[bytes]:
    """The next `left` bytes in pieces: what was there when it was looked at, however fast it grows."""
    while left > 0 and (piece := stream.read(min(PIECE, left))):
        left -= len(piece)
        yield piece


def wait_for(
    path: Path, find: Callable[[Path], Path], interval: float, until_idle: float, stopped: threading.Event
) -> Path | None:
    """The log once it exists, None when that was given up. Raises UserError where nothing can ever appear."""
    started = time.monotonic()
    said = False
    while not stopped.is_set():
        try:
            found = find(path)
            with files.open_regular(found, "the log", CURE):
                return found
        except UserError as error:
            missing = isinstance(error.__cause__, FileNotFoundError)
            to_come = os.path.isdir(path) or (missing and os.path.isdir(path.parent))
            if not to_come or (until_idle and time.monotonic() - started >= until_idle):
                raise
        if not said:
            log(f"waiting for {path} to appear")
            said = True
        stopped.wait(interval)
    return None
