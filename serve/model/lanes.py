"""Rows that are answered together, by model id: requests join and leave a running batch between two steps."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from llmops.console import UserError, log
from llmops.generation.continuous import Pool, Row
from llmops.generation.generator import PACE, STEPS_SHARE
from llmops.generation.passes import Passes
from llmops.generation.shared_prefix import NOTHING, Prefix, group_by_prefix, layers_of
from serve.answers import RETRY_SECONDS, ApiError
from serve.metrics import Metrics
from serve.model.prefixes import Prefixes, Room
from serve.model.sampling import Logprob, Sampler, choose, logprob
from serve.model.text import Detokenizer
from serve.settings import Limits

WORTH_A_PASS = 64  # tokens that new rows need not read each if what they share is read first
SOON = 256  # tokens of an answer that memory is kept for on a GPU, which says when it has too little
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


class Outbox:
    """Events on their way to those who wait, all of a turn at once: each crossing of threads costs both sides."""

    def __init__(self) -> None:
        self.post: Callable[..., Any] | None = None  # runs a function on the side that waits
        self._events: list[tuple[Callable[[Any], None], Any]] = []

    def say(self, tell: Callable[[Any], None], event: Any) -> None:
        """Put an event there."""
        self._events.append((tell, event))

    def send(self) -> None:
        """Hand them over."""
        if not self._events or not self.post:
            return
        events, self._events = self._events, []
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
            self.post(deliver, events)


def deliver(events: Sequence[tuple[Callable[[Any], None], Any]]) -> None:
    """Tell everybody what is new."""
    for tell, event in events:
        tell(event)


class Lane(ABC):
    """One model id: who waits for a place, and how the next tokens are chosen.

    `budget`: tokens of all rows together that memory holds. `activate` makes the weights this model's. `room` is what
    all lanes together have for beginnings of prompts.
    """

    def __init__(
        self, passes: Passes, stop_ids: Sequence[int], limits: Limits, budget: int, metrics: Metrics, room: Room,
        activate: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.passes = passes
        self.stop_ids = stop_ids
        self.limits = limits
        self.rows = limits.rows
        self.budget = budget
        self.metrics = metrics
        self.room = room
        self.activate = activate
        self.waiting: deque[Answer] = deque()
        self._well = 0  # answers that ended since `rows` changed

    @property
    @abstractmethod
    def going(self) -> list[Answer]:
        """The answers that are being written."""

    @property
    def known_bytes(self) -> int:
        """Memory of known beginnings of prompts."""
        return 0

    @abstractmethod
    def turn(self, out: Outbox) -> bool:
        """Do some work; whether there was any."""

    @abstractmethod
    def clear(self) -> list[Answer]:
        """Forget what runs; the answers that are not done."""

    def fail(self, error: ApiError, out: Outbox) -> None:
        """Refuse everything that waits or runs."""
        for answer in [*self.waiting, *self.clear()]:
            out.say(answer.tell, Event(error=error))
        self.waiting.clear()

    def _went_well(self, ended: int) -> None:
        """After answers ended: one row more, once so many have as go together."""
        self._well += ended
        if self._well >= self.rows:
            self.rows, self._well = min(self.rows + 1, self.limits.rows), 0

    def _expire(self, out: Outbox) -> None:
        """Who has hung up leaves; whose time is over is told what there is, or that there was no time for it."""
        now = time.monotonic()
        for answer in self.going:
            if answer.gone:
                answer.stopped = True
            elif now > answer.deadline:
                answer.stopped = True
                out.say(answer.tell, answer.ended())
        if any(answer.gone or now > answer.deadline for answer in self.waiting):
            for answer in self.waiting:
                if now > answer.deadline and not answer.gone:
                    error = ApiError(
                        503, "there was no time left for this request", code="timeout", retry=RETRY_SECONDS
                    )
                    out.say(answer.tell, Event(error=error))
            self.waiting = deque(a for a in self.waiting if not a.gone and now <= a.deadline)

    def _choose(self, answers: Sequence[Answer], logits: torch.Tensor) -> list[tuple[int, float]]:
        """The next token of every answer that is not done."""
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


class BatchLane(Lane):
    """The running batch of a model whose attention can be ours, and what is known of prompts."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.pool: Pool[Answer] = Pool(self.passes, self.stop_ids, self._choose, own_caches=True)
        self.prefixes = Prefixes(self.room)
        self.at_once, self.pass_cost = PACE.get(self.passes.device.type, PACE["cuda"])
        self.due = 0

    @property
    def known_bytes(self) -> int:
        """Memory of known beginnings of prompts."""
        return self.prefixes.bytes

    def clear(self) -> list[Answer]:
        """Forget what was computed; the answers that are not done."""
        return self.pool.clear()

    @property
    def going(self) -> list[Answer]:
        """The answers that are being written."""
        return [row for row in self.pool.rows if not row.done]

    def turn(self, out: Outbox) -> bool:
        """Take waiting rows in, or compute one more token for all; whether there was anything to do."""
        self._expire(out)
        if not self.waiting and not self.pool.going:
            self.pool.clear()
            return False
        self.activate()
        taken: list[Answer] = []
        ended: Sequence[Answer] | None = None
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
            self.waiting.extend(taken)
            self.fail(ApiError(500, str(error)), out)
            return True
        if ended is None:
            self._fewer([*self.clear(), *taken], out)
        self._tell(ended or [], out)
        return True

    def _admit(self, taken: list[Answer]) -> list[Answer]:
        """Take in what waits, as much as is read in one go; those that are done with their first token."""
        tokens, free = 0, self.rows - self.pool.going
        width = max(map(self._room, self.going), default=0)
        while self.waiting and len(taken) < free and tokens < self.at_once:
            answer = self.waiting[0]
            width = max(width, self._room(answer))
            if (self.pool.going + len(taken) + 1) * width > self.budget and (taken or self.pool.going):
                break
            if not answer.known.length and not answer.ids:
                answer.known = self.prefixes.longest(answer.prompt)
                answer.cached = answer.known.length
            left = len(answer.prompt) - answer.known.length
            if left > 2 * self.at_once:  # some of it now: others do not wait for all
                if not taken:
                    upto = answer.known.length + self.at_once
                    taken.append(self.waiting.popleft())  # whose it is if memory does not suffice
                    answer.known = self.passes.prefix(answer.prompt[:upto], answer.known)
                    self.waiting.appendleft(taken.pop())
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

    def _room(self, answer: Answer) -> int:
        """Tokens that are reckoned for an answer: all that it may get, or less where too much can be taken back."""
        more = answer.limit - len(answer.ids)
        return len(answer.prompt) + len(answer.ids) + (min(more, SOON) if self.passes.device.type == "cuda" else more)

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

    def _tell(self, ended: Iterable[Answer], out: Outbox) -> None:
        """Hand over what is new, and keep what ended answers computed."""
        over = {id(answer) for answer in ended}
        self._went_well(len(over))
        for place, answer in enumerate(self.pool.rows):
            if id(answer) in over:
                self._keep(place, answer)
                out.say(answer.tell, answer.ended())
            elif not answer.done:
                event = answer.piece()
                if event:
                    out.say(answer.tell, event)

    def _keep(self, place: int, answer: Answer) -> None:
        """Remember the keys and values of a conversation that may go on."""
        state = self.pool.state
        if not self.room.most_bytes or state is None or state.cache is None:
            return
        count = int(state.valid[place].sum())
        try:
            layers = [
                (layer.keys[place, :, -count:].clone(), layer.values[place, :, -count:].clone())
                for layer in layers_of(state.cache)
            ]
        except torch.OutOfMemoryError:  # the answer is there; room for the others comes first
            self.room.clear()
            return
        self.prefixes.keep(Prefix([*answer.prompt, *answer.ids][:count], layers))

    def _fewer(self, back: list[Answer], out: Outbox) -> None:
        """After the device's memory did not suffice: fewer rows together from now on, and nothing known of prompts."""
        held = self.room.bytes
        self.room.clear()
        for answer in [*back, *self.waiting]:
            answer.known = NOTHING
        for answer in back:  # a token that was chosen and not taken is chosen again
            del answer.event.logprobs[0 if answer.pieces else len(answer.ids) :]
        if len(back) == 1 and not held:
            error = ApiError(
                503, "the device's memory does not suffice for this request", code="memory", retry=RETRY_SECONDS
            )
            out.say(back[0].tell, Event(error=error))
        else:
            self.rows, self._well = max(1, len(back) // 2), 0
            log(f"out of memory with {len(back)} answers at once; going on with {self.rows}")
            self.waiting.extendleft(reversed(back))
        if self.passes.device.type == "cuda":
            torch.cuda.empty_cache()
