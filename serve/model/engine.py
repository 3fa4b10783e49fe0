"""The one thread that owns the model; whoever has work in it takes turns.

A lane is one model id: the base, or the base with its adapter. Each has a batch of its own.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from serve.answers import RETRY_SECONDS, ApiError
from serve.metrics import Metrics
from serve.model.lanes import Answer, Lane, Outbox
from serve.settings import Limits


class Worker(Protocol):
    """Something that takes turns in the engine's thread."""

    def turn(self, out: Outbox) -> bool:
        """Do some work; whether there was any."""
        ...

    def fail(self, error: ApiError, out: Outbox) -> None:
        """Refuse everything that waits or runs."""
        ...


class Engine:
    """The thread. `workers` take turns; what waits is counted and refused beyond the limits."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits = limits
        self.workers: list[Worker] = []
        self.lanes: dict[str, Lane] = {}
        self.alive = True
        self._lock = threading.Lock()  # around what is handed over, and the end, after which nothing is
        self._inbox: deque[tuple[Lane, Answer]] = deque()
        self._out = Outbox()
        self._wake = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.gauge("llmops_answers_running", "Answers that are being written.", lambda: self.running)
        metrics.gauge("llmops_answers_waiting", "Requests that wait for a place.", lambda: self.waiting)
        metrics.gauge("llmops_prefix_bytes", "Memory of known beginnings of prompts.",
            lambda: sum(lane.known_bytes for lane in self.lanes.values()))  # fmt: skip

    def start(self, lanes: dict[str, Lane], others: Sequence[Worker] = ()) -> None:
        """Begin to work."""
        self.lanes = lanes
        self.workers = [*lanes.values(), *others]
        self._thread.start()

    @property
    def running(self) -> int:
        """How many answers are being written."""
        return sum(len(lane.going) for lane in self.lanes.values())

    @property
    def waiting(self) -> int:
        """How many requests wait for a place."""
        return len(self._inbox) + sum(len(lane.waiting) for lane in self.lanes.values())

    def submit(self, name: str, answers: Sequence[Answer], post: Callable[..., Any]) -> None:
        """Hand requests over; `post(function, argument)` runs a function on the side that waits.

        Raises ApiError when too many wait already.
        """
        with self._lock:
            self.check()
            free = self.limits.rows - self.running
            if self.waiting + len(answers) > self.limits.queue + max(0, free):
                raise ApiError(429, "too many requests wait already", code="queue", retry=RETRY_SECONDS)
            self._inbox.extend((self.lanes[name], answer) for answer in answers)
            self.wake(post)

    def check(self) -> None:
        """Raise ApiError when the engine does not run."""
        if not self.alive or self._ending:
            raise ApiError(503, "the server is ending", code="ending", retry=RETRY_SECONDS)

    def wake(self, post: Callable[..., Any]) -> None:
        """There is something to do."""
        self._out.post = post
        self._wake.set()

    def ask(self, waiting: deque[Any], asked: Any, post: Callable[..., Any]) -> None:
        """Let a request wait for a worker, whose queue this is. Raises ApiError when too many wait already."""
        with self._lock:
            self.check()
            if len(waiting) >= self.limits.queue + self.limits.rows:
                raise ApiError(429, "too many requests wait already", code="queue", retry=RETRY_SECONDS)
            waiting.append(asked)
            self.wake(post)

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Who asked has hung up."""
        for answer in answers:
            answer.gone = True
        self._wake.set()

    def close(self) -> bool:
        """End, whatever still runs; whether all went well until now."""
        good, self._ending = self.alive, True
        self._wake.set()
        self._thread.join()
        return good

    @torch.inference_mode()
    def _run(self) -> None:
        whole = False
        try:
            while not self._ending:
                self._wake.clear()
                self._take_in()
                worked = [worker.turn(self._out) for worker in self.workers]
                self._out.send()
                if not any(worked) and not self._inbox:
                    self._wake.wait()
            whole = True
        finally:
            with self._lock:
                self.alive = whole
            if not whole:  # the traceback goes to stderr, and the server ends
                self._fail_all()

    def _take_in(self) -> None:
        while self._inbox:
            lane, answer = self._inbox.popleft()
            lane.waiting.append(answer)

    def _fail_all(self) -> None:
        error = ApiError(500, "the server made a mistake; its log says which")
        self._take_in()
        for worker in self.workers:
            worker.fail(error, self._out)
        self._out.send()
