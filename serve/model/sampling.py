"""The next token of every row: the likeliest, or drawn as its request asks, by transformers' processors of logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serve.model.asked import Sampling

FEW = 512  # of the likeliest tokens, which mostly hold what top_p keeps: sorting a whole vocabulary takes milliseconds


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability by the model itself, and the likeliest (token, log-probability) beside it."""

    token: int
    value: float
    top: list[tuple[int, float]]


class Sampler:
    """One row's way to its next token. The same seed, prompt and model give the same answer."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.greedy = sampling.temperature == 0 or sampling.top_k == 1 or sampling.top_p == 0
        self.penalty = None
        if sampling.repetition_penalty != 1:
            self.penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        self.warm = TemperatureLogitsWarper(sampling.temperature) if sampling.temperature not in (0, 1) else None
        self.draw = torch.Generator()
        if sampling.seed is None:
            self.draw.seed()
        else:
            self.draw.manual_seed(sampling.seed % 2**63)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the logits as they are is the answer."""
        return self.greedy and self.penalty is None

    def next(self, seen: Sequence[int], logits: torch.Tensor) -> int:
        """The next token after `seen` (prompt and answer so far), by float32 logits [V]."""
        scores = logits[None]
        if self.penalty is not None:
            scores = self.penalty(torch.tensor([list(seen)], device=scores.device), scores)
        if self.greedy:
            return int(scores.argmax())
        if self.warm is not None:
            scores = self.warm(None, scores)
        scores, ids = self._few(scores)
        if self.sampling.top_p < 1 and (ids is None or self.sampling.top_k):
            scores = TopPLogitsWarper(self.sampling.top_p)(None, scores)
        place = drawn(scores[0].softmax(-1), self.draw)
        return place if ids is None else int(ids[0, place])

    def _few(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(scores [1, K], their tokens [1, K]) that hold all that top_k and top_p keep; no tokens: they are all."""
        sampling, size = self.sampling, scores.shape[-1]
        if 0 < sampling.top_k < size:
            if sampling.top_k > FEW:
                return TopKLogitsWarper(sampling.top_k)(None, scores), None
            return scores.topk(sampling.top_k)
        if sampling.top_p < 1 and size > FEW:  # what the warper keeps, told from the likeliest tokens alone
            few, ids = scores.topk(FEW)
            shares = (few - scores.logsumexp(-1, keepdim=True)).exp()
            before = shares.cumsum(-1) - shares
            if float(before[0, -1]) >= sampling.top_p:
                return few.masked_fill(before >= sampling.top_p, -math.inf), ids
        return scores, None


def drawn(shares: torch.Tensor, draw: torch.Generator) -> int:
    """One of the places of probabilities [K]. torch.multinomial takes ten times as long for one row of a vocabulary."""
    sums = shares.cpu().double().cumsum(-1)
    place = int(torch.searchsorted(sums, torch.rand(1, generator=draw, dtype=torch.float64) * sums[-1], right=True))
    return min(place, int(shares.nonzero()[-1]))


def choose(samplers: Sequence[Sampler], seen: Sequence[Sequence[int]], logits: torch.Tensor) -> list[int]:
    """The next token of every row, by logits [rows, V]."""
    best = logits.argmax(-1).tolist()
    return [
        best[k] if sampler.plain else sampler.next(seen[k], logits[k].float()) for k, sampler in enumerate(samplers)
    ]


def logprob(token: int, count: int, logits: torch.Tensor) -> Logprob:
    """What is told of a token that was taken, by logits [V]."""
    values = logits.float().log_softmax(-1)
    top = values.topk(min(count, len(values))) if count else None
    pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else []
    return Logprob(token, max(float(values[token]), -9999.0), [(k, max(v, -9999.0)) for k, v in pairs])
