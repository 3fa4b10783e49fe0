"""Exact attention over conversations that share their prompt prefixes, without padding and without a T x T mask.

A layout is a tree written in depth-first order: a node is a run of tokens, its children continue it. A token sees the
tokens before it in its own node and everything in the nodes above. With `end[k]`, the position where the subtree of
k's node ends, that is: q sees k when k <= q < end[k].

`Layout.blocks` cuts the tree into runs of queries with the contiguous runs of keys they see, so the cost follows the
tree and not the square of its length. Each block goes through transformers' own SDPA function.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llmops.checkpoints import fixed_attention

NAME = "shared_prefix"
BLOCK_TOKENS = 256  # sibling branches are attended together up to this many tokens


@dataclass
class Node:
    """A run of tokens [start, stop) in the packed row, and where its subtree ends."""

    start: int
    stop: int
    end: int = 0
    children: list["Node"] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    """Queries [start, stop) and the key runs before them in which each of them sees (some of) its node's ancestors.

    `mask` is None for plain causal attention, else bool [queries, keys of the runs and of the block itself].
    """

    start: int
    stop: int
    runs: tuple[tuple[int, int], ...]
    mask: torch.Tensor | None


class Layout:
    """The blocks of one packed row of `length` tokens; `to` moves the masks with the batch."""

    def __init__(self, roots: Sequence[Node], length: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self.length = length
        self.block_tokens = block_tokens
        self.end = torch.empty(length, dtype=torch.int64)
        self.blocks: list[Block] = []
        self._cover(roots, ())

    def to(self, device: torch.device | str, **kwargs: Any) -> "Layout":
        """The same layout with its masks on `device` (the protocol that accelerate moves batches with)."""
        moved = object.__new__(Layout)
        moved.length, moved.block_tokens, moved.end = self.length, self.block_tokens, self.end
        moved.blocks = [
            Block(b.start, b.stop, b.runs, b.mask.to(device, **kwargs) if b.mask is not None else None)
            for b in self.blocks
        ]
        return moved

    def _cover(self, nodes: Sequence[Node], runs: tuple[tuple[int, int], ...]) -> None:
        group: list[Node] = []
        for node in nodes:
            if group and node.end - group[0].start > self.block_tokens:
                self._block(group, runs)
                group = []
            if node.end - node.start > self.block_tokens and node.children:
                if group:
                    self._block(group, runs)
                    group = []
                self._block([Node(node.start, node.stop, node.stop)], runs)
                self.end[node.start : node.stop] = node.end
                self._cover(node.children, (*runs, (node.start, node.stop)))
            else:
                group.append(node)
        if group:
            self._block(group, runs)

    def _block(self, nodes: Sequence[Node], runs: tuple[tuple[int, int], ...]) -> None:
        start, stop = nodes[0].start, nodes[-1].end
        if start == stop:
            return
        plain = len(nodes) == 1 and not nodes[0].children
        if plain:
            self.end[start:stop] = stop
        else:
            self._fill_end(nodes)
        mask = None
        if runs or not plain:
            keys = torch.arange(start, stop)
            own = (keys[None, :] <= keys[:, None]) & (keys[:, None] < self.end[start:stop][None, :])
            before = torch.ones(stop - start, sum(b - a for a, b in runs), dtype=torch.bool)
            mask = torch.cat([before, own], dim=1)
        self.blocks.append(Block(start, stop, runs, mask))

    def _fill_end(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            self.end[node.start : node.stop] = node.end
            self._fill_end(node.children)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed row, block by block. Shapes [1, heads, T, d]; returns [1, T, heads, d].

    Without a layout (generation, evaluation of single rows) it is transformers' SDPA.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if len(layout.blocks) == 1:
        return sdpa_attention_forward(module, query, key, value, layout.blocks[0].mask, **kwargs)
    sizes = [block.stop - block.start for block in layout.blocks]
    queries, keys, values = (t.split(sizes, dim=2) for t in (query, key, value))
    position = {block.start: i for i, block in enumerate(layout.blocks)}
    outputs = []
    for i, block in enumerate(layout.blocks):
        seen = [position[start] for start, _ in block.runs] + [i]
        k = keys[i] if len(seen) == 1 else torch.cat([keys[j] for j in seen], dim=2)
        v = values[i] if len(seen) == 1 else torch.cat([values[j] for j in seen], dim=2)
        outputs.append(sdpa_attention_forward(module, queries[i], k, v, block.mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(NAME, attention)


def supports_packing(model: torch.nn.Module) -> str | None:
    """Why a model cannot take packed rows, or None when it can.

    It must let its attention be replaced, and compute logits at chosen positions only.
    """
    import inspect

    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return "it cannot compute logits at chosen positions"
    return fixed_attention(model)
