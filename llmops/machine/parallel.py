"""Work in as many processes as this one has cores, results in order, memory bounded: forked, so nothing loads twice."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from llmops.console import RunStopped, log

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2  # pieces of work that wait for each process


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def in_processes(work: Callable[[T], R], pieces: Iterable[T], processes: int) -> Generator[R]:
    """`work` of every piece, in order; in this process where there is one piece, one core, or no place for semaphores.

    `work` is what it is when the first piece comes: the processes are forked then and share its memory. Raises
    RunStopped when the kernel ends one of them.
    """
    pieces = iter(pieces)
    first = list(islice(pieces, 2))
    if len(first) < 2 or processes < 2:
        yield from map(work, chain(first, pieces))
        return
    global _work  # noqa: PLW0603 - a fork hands it over without pickling it
    _work = work
    context = multiprocessing.get_context("fork")
    waiting: deque[Future[R]] = deque()
    try:
        executor = ProcessPoolExecutor(processes, context, begin, (os.getpid(),))
    except OSError as error:  # semaphores are files there
        log(f"warning: /dev/shm cannot be written ({error.strerror}), so the data is prepared in one process")
        yield from map(work, chain(first, pieces))
        return
    with executor as pool:
        try:
            for piece in chain(first, pieces):
                waiting.append(pool.submit(call, piece))
                if len(waiting) > processes * AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RunStopped(
                "a process that prepares the data was ended from outside, probably because memory ran out; start again "
                "when less of it is in use"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


_work: Callable[[Any], Any]


def call(piece: Any) -> Any:
    """The work, in a forked process."""
    return _work(piece)


def begin(parent: int) -> None:
    """Begin a forked process: Ctrl-C is its parent's matter, and it does not outlive its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
