"""Choosing among candidate answers: a prefix tree over their tokens, and an exact best-first search through it."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


class Tree:
    """Candidate answers as a prefix tree over their tokens; each leaf is one candidate.

    Raises ValueError when a candidate is the beginning of another: candidates end with an end token.
    """

    def __init__(self, candidates: Sequence[Sequence[int]]) -> None:
        self.candidates = [tuple(ids) for ids in candidates]
        self.children: dict[tuple[int, ...], list[int]] = {}
        for ids in dict.fromkeys(self.candidates):
            for i, token in enumerate(ids):
                known = self.children.setdefault(ids[:i], [])
                if token not in known:
                    known.append(token)
        self.index = {ids: i for i, ids in enumerate(self.candidates)}
        if any(ids in self.children for ids in self.candidates):
            raise ValueError("a candidate is the beginning of another one; end each with an end token")

    def down(self, path: tuple[int, ...]) -> tuple[int, ...]:
        """Follow tokens that have no alternative: to the next choice, or to a leaf."""
        while len(self.children.get(path, ())) == 1:
            path = (*path, self.children[path][0])
        return path


@dataclass
class Choice:
    """The best candidates of one prompt as (index, probability), most probable first."""

    ranked: list[tuple[int, float]]


@dataclass
class Search:
    """Best-first search through one prompt's tree: exact, because probabilities only fall on the way down."""

    tree: Tree
    wanted: int
    heap: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    found: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wanted = min(self.wanted, len(self.tree.index))
        self.heap = [(0.0, self.tree.down(()))]
        self.settle()

    def settle(self) -> None:
        """Take complete candidates off the top; what is then on top is the next choice to look at."""
        while self.heap and len(self.found) < self.wanted and self.heap[0][1] in self.tree.index:
            cost, path = heapq.heappop(self.heap)
            self.found.append((self.tree.index[path], math.exp(-cost)))

    @property
    def next_path(self) -> tuple[int, ...] | None:
        """The tokens after which the model is asked next; None when all wanted candidates are found."""
        return self.heap[0][1] if len(self.found) < self.wanted and self.heap else None

    @property
    def next_tokens(self) -> list[int]:
        """The tokens that may follow `next_path`."""
        return self.tree.children[self.heap[0][1]]

    def advance(self, logits: torch.Tensor) -> None:
        """Continue with the model's logits of `next_tokens`, in their order, renormalised over them."""
        cost, path = heapq.heappop(self.heap)
        for token, logp in zip(self.tree.children[path], logits.float().log_softmax(-1).tolist(), strict=True):
            heapq.heappush(self.heap, (cost - logp, self.tree.down((*path, token))))
        self.settle()


def logits_of_tokens(logits: torch.Tensor, tokens: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Of each row of logits [rows, V] those of its tokens, on the CPU; gathered first where the logits are."""
    width = max(map(len, tokens))
    index = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in tokens], device=logits.device)
    return [row[: len(ids)] for row, ids in zip(logits.gather(1, index).cpu(), tokens, strict=True)]
