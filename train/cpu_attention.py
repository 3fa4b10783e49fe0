"""Attention of a packed row on a CPU by plain matrix products, some queries at a time.

torch's fused kernel multiplies small tiles by itself, at a tenth of what the processor's matrix product does. Here the
products are whole ones, and what the fused kernel is there for holds as well: no T x T matrix is kept for the backward
pass, which computes the weights anew from queries and keys (as Dao et al. 2022, "FlashAttention", with blocks as large
as the cache and whole rows of scores).
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from train.attention import Block

MOST_QUERIES = 128  # at a time: fewer compute less that is hidden
SCORES = 1 << 22  # that are worked on at a time, so that they stay in the cache
LONGEST = 1024  # tokens of a block; the fused kernel computes nothing that is hidden, which pays for longer ones
HIDDEN = float("-inf")


def is_faster(query: torch.Tensor, blocks: "Sequence[Block]", dropout: float) -> bool:
    """Whether this way is to be taken for queries [1, heads, T, d]; it knows no dropout."""
    if query.device.type != "cpu" or query.dtype != torch.float32 or dropout:
        return False
    return max(block.stop - block.start for block in blocks) <= LONGEST


class Part:
    """Queries [start, stop) of a row, the runs of keys that they see, and which of them each one does not see.

    `hidden` is bool [queries, keys], or None: the last keys are the queries' own, seen causally.
    """

    def __init__(self, start: int, stop: int, runs: Sequence[tuple[int, int]], hidden: torch.Tensor | None) -> None:
        self.start, self.stop, self.runs, self.hidden = start, stop, runs, hidden

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """[heads, keys, d] of the runs, of [heads, T, d]."""
        if len(self.runs) == 1:
            return tensor[:, slice(*self.runs[0])]
        return torch.cat([tensor[:, slice(*run)] for run in self.runs], dim=1)

    def add_to(self, whole: torch.Tensor, found: torch.Tensor) -> None:
        """Add [heads, keys, d] to the places of the runs in [heads, T, d]."""
        done = 0
        for start, stop in self.runs:
            whole[:, start:stop] += found[:, done : done + stop - start]
            done += stop - start

    def hide(self, scores: torch.Tensor) -> None:
        """Write -inf where a query does not see a key; scores [kv_heads, group * queries, keys]."""
        count = self.stop - self.start
        by_head = scores.view(-1, count, scores.shape[-1])
        if self.hidden is not None:
            by_head.masked_fill_(self.hidden, HIDDEN)
        else:
            above = torch.ones(count, count, dtype=torch.bool).triu_(1)
            by_head[:, :, -count:].masked_fill_(above, HIDDEN)


def parts_of(blocks: "Sequence[Block]", heads: int) -> Iterator[Part]:
    """The blocks cut so that the scores of a part stay in the cache."""
    for block in blocks:
        before = sum(stop - start for start, stop in block.runs)
        start = block.start
        while start < block.stop:
            seen = before + start - block.start + MOST_QUERIES
            stop = min(block.stop, start + max(32, min(MOST_QUERIES, SCORES // (heads * seen))))
            own = slice(start - block.start, stop - block.start)
            hidden = None if block.mask is None else ~block.mask[own, : before + own.stop]
            yield Part(start, stop, [*block.runs, (block.start, stop)], hidden)
            start = stop


class BlockAttention(torch.autograd.Function):
    """query [heads, T, d], key and value [kv_heads, T, d] to [heads, T, d], float32, for the blocks of a layout."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: "Sequence[Block]", scale: float
    ) -> torch.Tensor:
        """Softmax(q k' scale) v."""
        heads, length, _ = query.shape
        groups = heads // key.shape[0]
        out = query.new_empty(heads, length, value.shape[2])
        for part in parts_of(blocks, heads):
            own = slice(part.start, part.stop)
            scores = torch.bmm(by_group(query[:, own] * scale, groups), part.gathered(key).transpose(1, 2))
            part.hide(scores)
            found = torch.bmm(scores.softmax(-1), part.gathered(value))
            out[:, own] = found.view(heads, -1, found.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Gradients of query, key and value."""
        query, key, value, out = ctx.saved_tensors
        heads = query.shape[0]
        groups = heads // key.shape[0]
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        inner = (gradient * out).sum(-1, keepdim=True)
        for part in parts_of(ctx.blocks, heads):
            own = slice(part.start, part.stop)
            queries, above = by_group(query[:, own] * ctx.scale, groups), by_group(gradient[:, own], groups)
            keys = part.gathered(key)
            scores = torch.bmm(queries, keys.transpose(1, 2))
            part.hide(scores)
            weights = scores.softmax(-1)
            part.add_to(d_value, torch.bmm(weights.transpose(1, 2), above))
            slopes = torch.bmm(above, part.gathered(value).transpose(1, 2))
            slopes.sub_(by_group(inner[:, own], groups)).mul_(weights)
            d_query[:, own] = torch.bmm(slopes, keys).view(heads, -1, query.shape[2]).mul_(ctx.scale)
            part.add_to(d_key, torch.bmm(slopes.transpose(1, 2), queries))
        return d_query, d_key, d_value, None, None


def by_group(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[heads, n, d] as [kv_heads, groups * n, d]: the query heads that share keys and values, one after the other."""
    heads, count, width = tensor.shape
    return tensor.reshape(heads // groups, groups * count, width)
