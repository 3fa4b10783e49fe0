"""Continuous batching: rows leave a batch when their answer ends, and others take their places at once.

Rows that have ended stay in the batch, uncounted, until they are an eighth of it: then one copy of the cache drops them
and takes the new ones in. A row's answer is the same in whatever company it is computed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from llmops.generation.passes import Passes, State, in_own_caches, merge, own_prefixes
from llmops.generation.shared_prefix import Prefix

FEW_ALONE = 8  # rows that share nothing, but may go with others that do
IDLE = 8  # one of so many rows may have ended before the batch is packed anew


@dataclass
class Generated:
    """A greedy answer without its end token, and the probability of its tokens together.

    `ended` is False when the limit cut it.
    """

    ids: list[int]
    probability: float
    ended: bool = True


@dataclass
class Row:
    """A prompt that is answered: its place in what was asked, how much of it others share, its answer so far."""

    index: int
    prompt: Sequence[int]
    limit: int
    shared: int = 0
    ids: list[int] = field(default_factory=list)
    cost: float = 0.0
    stopped: bool = False

    @property
    def done(self) -> bool:
        """Whether its answer is complete."""
        return self.stopped or len(self.ids) >= self.limit

    def take(self, token: int, logp: float, stop_ids: frozenset[int]) -> None:
        """Add a token, or the end."""
        self.cost -= logp
        if token in stop_ids:
            self.stopped = True
        else:
            self.ids.append(token)

    @property
    def generated(self) -> Generated:
        """The answer."""
        return Generated(self.ids, math.exp(-self.cost), self.stopped)


R = TypeVar("R", bound=Row)


def likeliest(rows: Sequence[Row], logits: torch.Tensor) -> list[tuple[int, float]]:
    """The likeliest token of each row and its log-probability, by logits [rows, V]."""
    top = logits.float().log_softmax(-1).max(-1)
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


class Pool(Generic[R]):
    """The rows that are being answered together.

    `choose` takes the next token of each row. `own_caches`: what prefixes hold is copied into the rows' caches, for
    rows of which each has a prefix of its own. What runs out of memory changes no row; what was computed may be gone
    then (`state` None), or be half done.
    """

    def __init__(
        self, passes: Passes, stop_ids: Sequence[int],
        choose: Callable[[Sequence[R], torch.Tensor], list[tuple[int, float]]] = likeliest, own_caches: bool = False,
    ) -> None:  # fmt: skip
        self.passes = passes
        self.choose = choose
        self.own_caches = own_caches
        self.stop_ids = frozenset(stop_ids)
        self.rows: list[R] = []
        self.state: State | None = None

    @property
    def going(self) -> int:
        """How many rows are not done."""
        return sum(not row.done for row in self.rows)

    def has_room(self, size: int) -> bool:
        """Whether so many of `size` places are free that taking new rows in is worth packing the batch."""
        free = size - self.going
        return free == size or free * IDLE >= size

    def admit(self, rows: list[R], prefixes: list[Prefix]) -> list[R]:
        """Take rows in and compute their first token; those that are done with it."""
        new = self.passes.read([[*row.prompt, *row.ids] for row in rows], prefixes)
        tokens = self.choose(rows, new.logits)
        if self.own_caches:
            new = in_own_caches(new)
        kept = [k for k, row in enumerate(self.rows) if not row.done]
        if kept and self.state:
            mixed = any(prefix.length for prefix in self.state.prefixes) and not any(p.length for p in new.prefixes)
            if mixed and len(rows) <= FEW_ALONE:  # whole prompts beside short ends of others
                new = own_prefixes(new)
            old, self.state = self.state, None
            new = merge([(old, kept), (new, list(range(len(rows))))], consume=True)
        self.state = new
        self.rows = [self.rows[k] for k in kept] + rows
        return self._take(rows, tokens)

    def step(self) -> list[R]:
        """One more token for every row; those that are done with it."""
        assert self.state
        kept = [k for k, row in enumerate(self.rows) if not row.done]
        if (len(self.rows) - len(kept)) * IDLE >= len(self.rows):
            old, self.state = self.state, None
            self.state = merge([(old, kept)], consume=True)
            self.rows = [self.rows[k] for k in kept]
        logits = self.passes.step(self.state, [row.ids[-1:] or [self.passes.pad_id] for row in self.rows])
        return self._take(self.rows, self.choose(self.rows, logits))

    def clear(self) -> list[R]:
        """Forget what was computed; the rows that are not done, with their answers so far."""
        rows = [row for row in self.rows if not row.done]
        self.rows, self.state = [], None
        return rows

    def _take(self, rows: list[R], tokens: list[tuple[int, float]]) -> list[R]:
        """A token for each row; the rows that are done by it."""
        ended: list[R] = []
        for row, (token, logp) in zip(rows, tokens, strict=True):
            if not row.done:
                row.take(token, logp, self.stop_ids)
                if row.done:
                    ended.append(row)
        return ended
