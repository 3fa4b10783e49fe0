"""The one thread that owns the model: requests join and leave the running batch between two steps.

A lane is one model id: the base, or the base with its adapter. Lanes take turns, each with a batch of its own.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from llmops.console import UserError, log
from llmops.continuous import Pool, Row
from llmops.generation import PACE, STEPS_SHARE
from llmops.passes import Passes
from llmops.shared_prefix import NOTHING, Prefix, group_by_prefix
from serve.answers import RETRY_SECONDS, ApiError
from serve.metrics import Metrics
from serve.model.prefixes import Prefixes
from serve.model.sampling import Logprob, Sampler, choose, logprob
from serve.model.text import Detokenizer
from serve.settings import Limits

WORTH_A_PASS = 64  # tokens that new rows need not read each if what they share is read first
COPIED_PER_TOKEN = 32  # tokens of a cache that are copied in about the time that one is read


@dataclass
class Event:
    """What became of an answer: new text and logprobs; how it ended ("stop", "length"), or why it was not given."""

    text: str = ""
    logprobs: list[Logprob] = field(default_factory=list)
    finish: str | None = None
    error: ApiError | None = None


@dataclass(eq=False)
class Answer(Row):
    """A request's row: how its tokens are chosen and told. `tell` is called on the side that waits for it.

    `pieces`: told token by token, else once at its end. `known`: what of its prompt is computed; `cached`: what of that
    was known before.
    """

    sampler: Sampler = field(kw_only=True)
    detokenizer: Detokenizer = field(kw_only=True)
    tell: Callable[[Event], None] = field(kw_only=True)
    pieces: bool = field(kw_only=True, default=False)
    deadline: float = field(kw_only=True, default=float("inf"))
    asked: float = field(kw_only=True, default_factory=time.monotonic)
    began: float = 0.0
    known: Prefix = field(default_factory=lambda: NOTHING)
    cached: int = 0
    finish: str = ""
    gone: bool = False
    event: Event = field(default_factory=Event)

    def take(self, token: int, logp: float, stop_ids: frozenset[int]) -> None:
        """Add a token, or the end."""
        self.began = self.began or time.monotonic()
        if token in stop_ids:
            self.stopped, self.finish = True, "stop"
            if self.sampler.sampling.logprobs >= 0:
                self.event.logprobs.pop()
            return
        self.ids.append(token)
        if self.pieces or self.detokenizer.stops:
            self.event.text += self.detokenizer.push(token)
            if self.detokenizer.stopped:
                self.stopped, self.finish = True, "stop"

    def ended(self) -> Event:
        """The last event."""
        if self.pieces or self.detokenizer.stops:
            self.event.text += self.detokenizer.finish()
        else:
            self.event.text = self.detokenizer.decode(self.ids)
        self.event.finish = self.finish or "length"
        return self.event

    def piece(self) -> Event | None:
        """What there is to tell so far, once."""
        if not self.pieces or not (self.event.text or self.event.logprobs):
            return None
        found, self.event = self.event, Event()
        return found


class Worker(Protocol):
    """Something that takes turns in the engine's thread."""

    def turn(self, say: Callable[[Any, Any], None]) -> bool:
        """Do some work; whether there was any. `say(tell, event)` hands an event over."""
        ...

    def fail(self, error: ApiError, say: Callable[[Any, Any], None]) -> None:
        """Refuse everything that waits or runs."""
        ...


class Lane:
    """One model id: its passes, its running batch, who waits for a place, what is known of prompts."""

    def __init__(
        self, passes: Passes, stop_ids: Sequence[int], limits: Limits, budget: int, metrics: Metrics,
        activate: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.passes = passes
        self.pool = Pool(passes, stop_ids, self._choose, own_caches=True)
        self.rows = limits.rows
        self.budget = budget
        self.metrics = metrics
        self.activate = activate
        self.waiting: deque[Answer] = deque()
        self.prefixes = Prefixes(limits.prefix_bytes)
        self.at_once, self.pass_cost = PACE.get(passes.device.type, PACE["cuda"])
        self.due = 0

    @property
    def going(self) -> list[Answer]:
        """The answers that are being written."""
        return [row for row in self.pool.rows if not row.done]  # type: ignore[misc]

    def turn(self, say: Callable[[Any, Any], None]) -> bool:
        """Take waiting rows in, or compute one more token for all; whether there was anything to do."""
        self._expire(say)
        if not self.waiting and not self.pool.going:
            self.pool.clear()
            return False
        self.activate()
        taken: list[Answer] = []
        ended: Sequence[Row] | None = None
        try:
            if self.waiting and self.pool.has_room(self.rows) and (self.due <= 0 or not self.pool.going):
                ended = self._admit(taken)
            elif self.pool.going:
                ended = self.pool.step()
                self.due -= len(self.pool.rows) + self.pass_cost
        except torch.OutOfMemoryError:
            pass  # what holds the tensors is gone after this block
        except UserError as error:  # no numbers
            log(f"error: {error}")
            self.fail(ApiError(500, str(error)), say)
            return True
        if ended is None:
            self._fewer([*taken, *self.pool.clear()], say)  # type: ignore[list-item]
        self._tell(ended or [], say)
        return True

    def fail(self, error: ApiError, say: Callable[[Any, Any], None]) -> None:
        """Refuse everything that waits or runs."""
        for answer in [*self.waiting, *self.pool.clear()]:
            say(answer.tell, Event(error=error))  # type: ignore[attr-defined]
        self.waiting.clear()

    def _expire(self, say: Callable[[Any, Any], None]) -> None:
        """Who has hung up leaves; whose time is over is told what there is, or that there was no time for it."""
        now = time.monotonic()
        for answer in self.going:
            if answer.gone:
                answer.stopped = True
            elif now > answer.deadline:
                answer.stopped = True
                say(answer.tell, answer.ended())
        if any(answer.gone or now > answer.deadline for answer in self.waiting):
            for answer in self.waiting:
                if now > answer.deadline and not answer.gone:
                    error = ApiError(
                        503, "there was no time left for this request", code="timeout", retry=RETRY_SECONDS
                    )
                    say(answer.tell, Event(error=error))
            self.waiting = deque(a for a in self.waiting if not a.gone and now <= a.deadline)

    def _admit(self, taken: list[Answer]) -> list[Row]:
        """Take in what waits, as much as is read in one go; those that are done with their first token."""
        tokens, free = 0, self.rows - self.pool.going
        width = max((len(row.prompt) + row.limit for row in self.going), default=0)
        while self.waiting and len(taken) < free and tokens < self.at_once:
            answer = self.waiting[0]
            width = max(width, len(answer.prompt) + answer.limit)
            if (self.pool.going + len(taken) + 1) * width > self.budget and (taken or self.pool.going):
                break
            if not answer.known.length and not answer.ids:
                answer.known = self.prefixes.longest(answer.prompt)
                answer.cached = answer.known.length
            left = len(answer.prompt) - answer.known.length
            if left > 2 * self.at_once:  # some of it now: others do not wait for all
                if not taken:
                    upto = answer.known.length + self.at_once
                    answer.known = self.passes.prefix(answer.prompt[:upto], answer.known)
                    self.due = self.at_once // STEPS_SHARE
                    return []
                break
            taken.append(self.waiting.popleft())
            tokens += left
        if not taken:
            return list(self.pool.step()) if self.pool.going else []
        self._share(taken)
        taken.sort(key=lambda answer: id(answer.known))
        columns = self.pool.state.valid.numel() if self.pool.state else 0
        ended = self.pool.admit(list(taken), [answer.known for answer in taken])
        self.due = (tokens + columns // COPIED_PER_TOKEN) // STEPS_SHARE
        for answer in taken:
            answer.known = NOTHING
            self.metrics.add("llmops_prompt_tokens_total", len(answer.prompt))
            self.metrics.add("llmops_cached_tokens_total", answer.cached)
        return ended

    def _share(self, taken: Sequence[Answer]) -> None:
        """Read first what several new rows begin with and nobody knows yet."""
        for group, shared in group_by_prefix([answer.prompt for answer in taken]):
            lacking = [taken[i] for i in group if taken[i].known.length < shared]
            known = max((answer.known for answer in lacking), key=lambda prefix: prefix.length, default=NOTHING)
            if (shared - known.length) * (len(lacking) - 1) < WORTH_A_PASS:
                continue
            prefix = self.passes.prefix(lacking[0].prompt[:shared], known)
            self.prefixes.keep(prefix)
            for answer in lacking:
                answer.known = prefix

    def _choose(self, rows: Sequence[Row], logits: torch.Tensor) -> list[tuple[int, float]]:
        """The next token of every row that is not done."""
        answers: list[Answer] = list(rows)  # type: ignore[arg-type]
        going = [k for k, answer in enumerate(answers) if not answer.done]
        seen = [[] if answer.sampler.plain else [*answer.prompt, *answer.ids] for answer in answers]
        part = logits if len(going) == len(answers) else logits[torch.tensor(going, device=logits.device)]
        tokens = choose([answers[k].sampler for k in going], [seen[k] for k in going], part)
        found = [(self.passes.pad_id, 0.0)] * len(answers)
        for k, token, row in zip(going, tokens, part, strict=True):
            found[k] = (token, 0.0)
            if answers[k].sampler.sampling.logprobs >= 0:
                answers[k].event.logprobs.append(logprob(token, answers[k].sampler.sampling.logprobs, row))
        self.metrics.add("llmops_completion_tokens_total", len(going))
        return found

    def _tell(self, ended: Iterable[Row], say: Callable[[Any, Any], None]) -> None:
        """Hand over what is new, and keep what ended answers computed."""
        over = {id(row) for row in ended}
        for place, row in enumerate(self.pool.rows):
            answer: Answer = row  # type: ignore[assignment]
            if id(row) in over:
                self._keep(place, answer)
                say(answer.tell, answer.ended())
            elif not row.done:
                event = answer.piece()
                if event:
                    say(answer.tell, event)

    def _keep(self, place: int, answer: Answer) -> None:
        """Remember the keys and values of a conversation that may go on."""
        state = self.pool.state
        if not self.prefixes.most_bytes or state is None or state.cache is None:
            return
        count = int(state.valid[place].sum())
        layers = [
            (layer.keys[place, :, -count:].clone(), layer.values[place, :, -count:].clone())
            for layer in state.cache.layers
        ]
        self.prefixes.keep(Prefix([*answer.prompt, *answer.ids][:count], layers))

    def _fewer(self, back: list[Answer], say: Callable[[Any, Any], None]) -> None:
        """After the device's memory did not suffice: fewer rows together from now on."""
        self.prefixes = Prefixes(self.prefixes.most_bytes)
        if len(back) == 1:
            error = ApiError(503, "the device's memory does not suffice for this request", code="memory")
            say(back[0].tell, Event(error=error))
        else:
            self.rows = max(1, len(back) // 2)
            log(f"out of memory with {len(back)} answers at once; going on with {self.rows}")
            self.waiting.extendleft(reversed(back))
        if self.passes.device.type == "cuda":
            torch.cuda.empty_cache()


class Engine:
    """The thread. `workers` take turns; what waits is counted and refused beyond the limits."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits = limits
        self.workers: list[Worker] = []
        self.lanes: dict[str, Lane] = {}
        self.alive = True
        self._inbox: deque[tuple[Lane, Answer]] = deque()
        self._outbox: list[tuple[Callable[[Any], None], Any]] = []
        self._wake = threading.Event()
        self._ending = False
        self._post: Callable[..., Any] | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.gauge("llmops_answers_running", "Answers that are being written.", lambda: self.running)
        metrics.gauge("llmops_answers_waiting", "Requests that wait for a place.", lambda: self.waiting)
        metrics.gauge("llmops_prefix_bytes", "Memory of known beginnings of prompts.",
            lambda: sum(lane.prefixes.bytes for lane in self.lanes.values()))  # fmt: skip

    def start(self, lanes: dict[str, Lane], others: Sequence[Worker] = ()) -> None:
        """Begin to work."""
        self.lanes = lanes
        self.workers = [*lanes.values(), *others]
        self._thread.start()

    @property
    def running(self) -> int:
        """How many answers are being written."""
        return sum(lane.pool.going for lane in self.lanes.values())

    @property
    def waiting(self) -> int:
        """How many requests wait for a place."""
        return len(self._inbox) + sum(len(lane.waiting) for lane in self.lanes.values())

    def submit(self, name: str, answers: Sequence[Answer], post: Callable[..., Any]) -> None:
        """Hand requests over; `post(function, argument)` runs a function on the side that waits.

        Raises ApiError when too many wait already.
        """
        self.check()
        free = self.limits.rows - self.running
        if self.waiting + len(answers) > self.limits.queue + max(0, free):
            raise ApiError(429, "too many requests wait already", code="queue", retry=RETRY_SECONDS)
        self._post = post
        self._inbox.extend((self.lanes[name], answer) for answer in answers)
        self.wake(post)

    def check(self) -> None:
        """Raise ApiError when the engine does not run."""
        if not self.alive or self._ending:
            raise ApiError(503, "the server is ending", code="ending", retry=RETRY_SECONDS)

    def wake(self, post: Callable[..., Any]) -> None:
        """There is something to do."""
        self._post = post
        self._wake.set()

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

    def _say(self, tell: Callable[[Any], None], event: Any) -> None:
        self._outbox.append((tell, event))

    @torch.inference_mode()
    def _run(self) -> None:
        whole = False
        try:
            while not self._ending:
                self._wake.clear()
                while self._inbox:
                    lane, answer = self._inbox.popleft()
                    lane.waiting.append(answer)
                worked = [worker.turn(self._say) for worker in self.workers]
                self._hand_over()
                if not any(worked) and not self._inbox:
                    self._wake.wait()
            whole = True
        finally:
            self.alive = whole
            if not whole:  # the traceback goes to stderr, and the server ends
                self._fail_all()

    def _fail_all(self) -> None:
        error = ApiError(500, "the server made a mistake; its log says which")
        for lane, answer in self._inbox:
            lane.waiting.append(answer)
        for worker in self.workers:
            worker.fail(error, self._say)
        self._hand_over()

    def _hand_over(self) -> None:
        """All events of a turn at once: each crossing of threads costs both sides."""
        if not self._outbox or not self._post:
            return
        events, self._outbox = self._outbox, []
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
            self._post(deliver, events)


def deliver(events: Sequence[tuple[Callable[[Any], None], Any]]) -> None:
    """Tell everybody what is new."""
    for tell, event in events:
        tell(event)
