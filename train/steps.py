"""An optimizer step as micro-batches: which conversations go through the model together, on which process.

The loss is normalised by the learned tokens of the whole step, so how a step's conversations are split changes how
long it takes and how much memory it needs, and nothing else (but rounding, and which numbers dropout draws). Every
process plans the whole step from the conversations alone, so all agree without a word: as many micro-batches each,
because ZeRO exchanges gradients (and in stage 3 weights) in every one of them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch

from train.batches import MIN_SHARED, PackedCollator, PaddedCollator, Sample, common_length, first_learned

Group = list[int]


@dataclass(frozen=True)
class Split:
    """The largest micro-batch: at most `rows` conversations and `tokens` tokens of them; 0 is no limit.

    A conversation that is longer than `tokens` is a micro-batch by itself.
    """

    rows: int = 0
    tokens: int = 0


class Order(Protocol):
    """Indices in an order whose length is known."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[int]: ...


class StepSampler(torch.utils.data.Sampler[list[int]]):
    """The conversations of each optimizer step, in the order of another sampler; the last step may have fewer.

    `replay` gives `replayed` of each step's `size` conversations, in the last step their share.
    """

    def __init__(
        self, order: Order, size: int, replay: Iterable[int] = (),
        replayed: int = 0,
    ) -> None:  # fmt: skip
        self.order, self.own, self.replay, self.replayed = order, size - replayed, replay, replayed

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.own)

    def __iter__(self) -> Iterator[list[int]]:
        indices, again = list(self.order), iter(self.replay)
        for start in range(0, len(indices), self.own):
            step = indices[start : start + self.own]
            share = math.ceil(self.replayed * len(step) / self.own)
            yield step + list(islice(again, share))


class StepCollator:
    """The samples of a whole step (all processes) to what this process does in it.

    Returns {"batches": this process's micro-batches, "learned": learned tokens of the whole step}. A process that has
    fewer micro-batches than another ends with some whose `weight` is 0.
    """

    def __init__(self, collate: PackedCollator | PaddedCollator, split: Split, rank: int, world: int) -> None:
        self.collate, self.split, self.rank, self.world = collate, split, rank, world

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        share = isinstance(self.collate, PackedCollator) and self.collate.share_prefixes
        padded = isinstance(self.collate, PaddedCollator)
        plan = plan_step(samples, self.split, self.world, share, padded)
        shortest = min(range(len(samples)), key=lambda i: len(samples[i]["ids"]))
        batches = []
        for group in plan[self.rank]:
            batch = self.collate([samples[i] for i in group or [shortest]])
            batches.append(batch if group else batch | {"weight": 0.0, "tokens": 0})
        return {"batches": batches, "learned": sum(int(sample["learned"][1:].sum()) for sample in samples)}


class Ahead:
    """The items of an iterator, of which a thread makes the next one ready while this one is in use.

    A thread and no process: what it makes need not be pickled (FlexAttention's masks cannot be), no signal reaches it,
    and tensors pass without a file descriptor each. What it raises is raised for the item that was being made.
    """

    def __init__(self, items: Iterator[dict[str, Any]], device: torch.device) -> None:
        self.items = items
        begin: dict[str, Any] = {}
        if device.type == "cuda":  # a new thread would lock its pages for the first GPU
            begin = {"initializer": torch.cuda.set_device, "initargs": (device,)}
        self._thread = ThreadPoolExecutor(1, "ahead", **begin)
        self._next = self._thread.submit(next, items)

    def __next__(self) -> dict[str, Any]:
        item = self._next.result()
        self._next = self._thread.submit(next, self.items)
        return item

    def close(self) -> None:
        """End the thread; an item that it has ready is lost."""
        self._thread.shutdown(cancel_futures=True)


def plan_step(samples: Sequence[Sample], split: Split, world: int, share: bool, padded: bool) -> list[list[Group]]:
    """Indices of `samples`, as [process][micro-batch][conversation]; the same number of micro-batches for each.

    Neighbours in a plan begin alike where prefixes are shared, and are alike in length where rows are padded.
    """
    order, cost = (by_length if padded else by_prompt)(samples, *(() if padded else (share,)))
    most = math.ceil(len(samples) / world) if split.rows else 0  # else a process could need a micro-batch more
    parts = balanced(0, len(samples), cost, Split(most), world)
    counts = [len(cut(*part, cost, split.tokens or math.inf, split.rows)) for part in parts]
    number = max(counts)
    plan = []
    for start, stop in parts:
        groups = [order[a:b] for a, b in balanced(start, stop, cost, split, number)]
        plan.append(groups + [[]] * (number - len(groups)))
    return plan + [[[]] * number] * (world - len(plan))


def by_prompt(samples: Sequence[Sample], share: bool) -> tuple[Group, Callable[[int, int], int]]:
    """The order that puts equal prompt beginnings side by side, and the packed length of a run of that order.

    The length is exact but for beginnings that are too short to be shared twice.
    """
    order = list(range(len(samples)))
    lengths = np.asarray([len(sample["ids"]) for sample in samples])
    more = lengths.copy()
    if share:
        prompts = [sample["ids"][: first_learned(sample)] for sample in samples]
        order.sort(key=lambda i: prompts[i].astype(">u4").tobytes())
        lengths, more = lengths[order], lengths[order]
        for place in range(1, len(order)):
            common = common_length(prompts[order[place - 1]], prompts[order[place]])
            more[place] -= common if common >= MIN_SHARED else 0
    ends = np.concatenate([[0], np.cumsum(more)])
    return order, lambda start, stop: int(lengths[start] + ends[stop] - ends[start + 1])


def by_length(samples: Sequence[Sample]) -> tuple[Group, Callable[[int, int], int]]:
    """The order from long to short, and what a run of that order takes when all are padded to the first."""
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i]["ids"]))
    return order, lambda start, stop: (stop - start) * len(samples[order[start]]["ids"])


def cut(start: int, stop: int, cost: Callable[[int, int], int], tokens: float, rows: int) -> list[tuple[int, int]]:
    """[start, stop) cut into runs of at most `tokens` and `rows` (0: any number), each as long as it may be."""
    runs, first = [], start
    for place in range(start + 1, stop):
        if (rows and place - first >= rows) or cost(first, place + 1) > tokens:
            runs.append((first, place))
            first = place
    return [*runs, (first, stop)] if stop > start else []


def balanced(
    start: int, stop: int, cost: Callable[[int, int], int], split: Split, number: int
) -> list[tuple[int, int]]:
    """[start, stop) cut into at most `number` runs within the split, the costliest as cheap as can be."""
    if start == stop:
        return []
    high = cost(start, stop)
    if split.tokens:
        high = min(high, max(split.tokens, *(cost(i, i + 1) for i in range(start, stop))))
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        fits = len(cut(start, stop, cost, middle, split.rows)) <= number
        low, high = (low, middle) if fits else (middle, high)
    return cut(start, stop, cost, high, split.rows)
