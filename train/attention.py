"""Exact attention over conversations that share their prompt prefixes, without padding and without a T x T mask.

A layout is a tree written in depth-first order: a node is a run of tokens, its children continue it. A token sees the
tokens before it in its own node and everything in the nodes above. With `end[k]`, the position where the subtree of
k's node ends, that is: q sees k when k <= q < end[k].

Ways to compute it, of equal result:

- blocks: `Layout.blocks` cuts the tree into runs of queries with the contiguous runs of keys they see, so the cost
  follows the tree and not the square of its length. Each block goes through transformers' own SDPA function, or on a
  CPU through plain products (`cpu_attention`).
- flex: one FlexAttention kernel per layer with the rule above as its mask (Dong et al. 2024, "Flex Attention"). Which
  tiles of 128 x 128 it looks at follows from the least and the greatest end[k] of every tile, without a T x T mask.
"""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llmops.generation.capacity import config_of, fixed_attention
from train import cpu_attention

NAME = "shared_prefix"
BLOCK_TOKENS = 128  # sibling branches are attended together up to this many tokens
TILE = 128  # tokens along each side of FlexAttention's tiles
VARIANTS = 64  # of FlexAttention's kernel in one run: shapes, with gradients and without; Dynamo's own limit is 8


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
    """How the tokens of one packed row of `length` see each other; `to` moves it with the batch.

    With `flex` it holds the tiles of FlexAttention, and tokens that pad the row to a multiple of TILE, which see only
    themselves; else the blocks.
    """

    def __init__(
        self, roots: Sequence[Node], length: int, block_tokens: int = BLOCK_TOKENS, flex: bool = False
    ) -> None:
        self.length = length
        self.block_tokens = block_tokens
        self.end = torch.empty(length, dtype=torch.int64)
        self.blocks: list[Block] = []
        self.tiles: BlockMask | None = None
        if flex:
            self._fill_end(roots)
            self.end = padded_ends(self.end)
            self.tiles = tiles_of(self.end)
        else:
            self._cover(roots, ())

    def to(self, device: torch.device | str, non_blocking: bool = False, **_: Any) -> "Layout":
        """The same layout with its masks on `device` (the protocol that accelerate moves batches with)."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Layout":
        """The same layout in page-locked memory (the protocol of torch's DataLoader)."""
        return self._moved(torch.Tensor.pin_memory)

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Layout":
        moved = object.__new__(Layout)
        moved.length, moved.block_tokens, moved.end = self.length, self.block_tokens, self.end
        moved.blocks = [
            Block(b.start, b.stop, b.runs, move(b.mask) if b.mask is not None else None) for b in self.blocks
        ]
        moved.tiles = None
        if self.tiles is not None:
            moved.end = move(self.end)
            moved.tiles = block_mask({name: move(getattr(self.tiles, name)) for name in TILE_PARTS}, moved.end)
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


TILE_PARTS = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
)  # fmt: skip


def padded_ends(end: torch.Tensor) -> torch.Tensor:
    """`end` for a row that is padded to a multiple of TILE; a padding token is seen by itself alone."""
    more = -len(end) % TILE
    return torch.cat([end, torch.arange(len(end), len(end) + more) + 1])


def tiles_of(end: torch.Tensor) -> BlockMask:
    """FlexAttention's tiles for `end` int64 [T], T a multiple of TILE.

    With lo and hi the least and the greatest end[k] in tile j of keys, tile i of queries sees some of it when j <= i
    and hi > TILE i, and all of it when j < i and lo >= TILE (i + 1).
    """
    per_tile = end.numpy().reshape(-1, TILE)
    low, high = per_tile.min(1), per_tile.max(1)
    i, j = np.ogrid[: len(low), : len(low)]
    whole = (j < i) & (low[None, :] >= TILE * (i + 1))
    partly = (j <= i) & (high[None, :] > TILE * i) & ~whole
    parts = {}
    for name, seen in (("", partly), ("full_", whole)):
        for side, dense in (("kv", seen), ("q", seen.T)):
            order = np.argsort(~dense, axis=1, kind="stable").astype(np.int32)
            parts[f"{name}{side}_num_blocks"] = torch.from_numpy(dense.sum(1, dtype=np.int32))[None, None]
            parts[f"{name}{side}_indices"] = torch.from_numpy(order)[None, None]
    return block_mask(parts, end)


def block_mask(parts: dict[str, torch.Tensor], end: torch.Tensor) -> BlockMask:
    """FlexAttention's mask of these tiles; within a tile the rule decides: q sees k when k <= q < end[k]."""

    def sees(row: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < end[k])

    given: dict[str, Any] = {"seq_lengths": (len(end), len(end)), "BLOCK_SIZE": (TILE, TILE), "mask_mod": sees, **parts}
    return BlockMask(**given)


@cache
def flex_kernel(device: str) -> Callable[..., Any]:
    """FlexAttention, compiled on a GPU. Shapes may change from batch to batch, so `dynamic` stays torch's choice.

    With `fullgraph` a variant too many is an error; without it that one would make the T x T matrix, without a word.
    """
    if device != "cuda":
        return flex_attention
    compiler: Any = torch.compile  # whose declared types lack the limit
    return compiler(flex_attention, fullgraph=True, recompile_limit=VARIANTS)


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
    if layout.tiles is not None:
        kernel = flex_kernel(query.device.type)
        out = kernel(
            query, key, value, block_mask=layout.tiles, scale=kwargs.get("scaling"),
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None
    if cpu_attention.is_faster(query, layout.blocks, kwargs.get("dropout", 0.0)):
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        out = cpu_attention.BlockAttention.apply(query[0], key[0], value[0], layout.blocks, scale)
        return out.transpose(0, 1)[None], None
    if len(layout.blocks) == 1:
        return sdpa_attention_forward(module, query, key, value, four_dimensional(layout.blocks[0].mask), **kwargs)
    sizes = [block.stop - block.start for block in layout.blocks]
    queries, keys, values = (t.split(sizes, dim=2) for t in (query, key, value))
    position = {block.start: i for i, block in enumerate(layout.blocks)}
    outputs = []
    for i, block in enumerate(layout.blocks):
        seen = [position[start] for start, _ in block.runs] + [i]
        k = keys[i] if len(seen) == 1 else torch.cat([keys[j] for j in seen], dim=2)
        v = values[i] if len(seen) == 1 else torch.cat([values[j] for j in seen], dim=2)
        mask = four_dimensional(block.mask)
        outputs.append(sdpa_attention_forward(module, queries[i], k, v, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def four_dimensional(mask: torch.Tensor | None) -> torch.Tensor | None:
    """[1, 1, queries, keys]: transformers' SDPA takes a single query with shared key/value heads apart by these."""
    return None if mask is None else mask[None, None]


AttentionInterface.register(NAME, attention)


def supports_packing(model: torch.nn.Module) -> str | None:
    """Why a model cannot take packed rows, or None when it can.

    It must let its attention be replaced, and compute logits at chosen positions only.
    """
    import inspect

    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return "it cannot compute logits at chosen positions"
    return fixed_attention(model)


def why_no_flex(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why FlexAttention is not used for a packed model on this device, or None when it is.

    On a GPU a tiny forward and backward pass with the model's heads tells; it also compiles the kernel.
    """
    if device.type != "cuda":
        return "there is no GPU"
    config = config_of(model).get_text_config()
    if getattr(config, "attention_dropout", 0):
        return "the model drops out attention weights"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere"
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    try:
        worst = flex_difference(heads, getattr(config, "num_key_value_heads", None) or heads, width, device, dtype)
    except compile_errors() as error:
        return does_not_run(error)
    if not worst < 0.05:
        return f"its result differs by {worst:.1e} here"
    return None


def compile_errors() -> tuple[type[Exception], ...]:
    """What compiling and starting a kernel can raise; Triton's own errors are no RuntimeError."""
    known = (RuntimeError, ImportError, OSError, subprocess.SubprocessError)
    try:
        from triton.errors import TritonError
    except ImportError:  # a torch for the CPU comes without it
        return known
    return (*known, TritonError)


def does_not_run(error: Exception) -> str:
    """What a probe says of a kernel that cannot be compiled or started."""
    return f"it does not run here ({type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]})"


def flex_difference(heads: int, kv_heads: int, width: int, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference between FlexAttention and SDPA with the whole mask, over the largest value.

    Of the output and the gradients, on a small tree of two branches.
    """
    inner = [Node(200, 260, 260), Node(260, 300, 300)]
    layout = Layout([Node(0, 200, 300, inner)], 300, flex=True).to(device)
    draw = torch.Generator(device=device).manual_seed(0)
    shapes = [(1, count, len(layout.end), width) for count in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(s, generator=draw, device=device, dtype=dtype).requires_grad_() for s in shapes]
    place = torch.arange(len(layout.end), device=device)
    mask = (place[None, :] <= place[:, None]) & (place[:, None] < layout.end[None, :])
    found = []
    kernels: tuple[tuple[Callable[..., Any], dict[str, Any]], ...] = (
        (flex_kernel(device.type), {"block_mask": layout.tiles}),
        (torch.nn.functional.scaled_dot_product_attention, {"attn_mask": mask}),
    )
    for kernel, how in kernels:
        out = kernel(*inputs, enable_gqa=heads != kv_heads, scale=width**-0.5, **how)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    pairs = [(a.detach(), b.detach()) for a, b in zip(*found, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
