"""What prompts share, computed once: prefixes, attention over a prefix and a row's own keys, grouping of prompts."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from llmops.machine.cpu_kernels import small_products
from llmops.machine.fused_attention import fused_attention

NAME = "cached_prefix"
MIN_SHARED = 16  # a shorter common beginning is not worth a pass of its own
ROOM = 32  # columns that a cache grows by
# (query, key, value, dropout, causal) to what attention gives and the logarithm of its softmax's denominator
FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


@dataclass
class Prefix:
    """Keys and values of a prompt beginning `ids`: per layer two tensors [key/value heads, length, d].

    `NOTHING` is the empty one, of rows that share none.
    """

    ids: list[int]
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return len(self.ids)

    def cut(self, length: int) -> "Prefix":
        """Its first tokens: what comes later never reaches back."""
        return Prefix(self.ids[:length], [(key[:, :length], value[:, :length]) for key, value in self.layers])


NOTHING = Prefix([], [])
Segment = tuple[int, int, Prefix]  # rows from, rows up to, the prefix they share


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segments: Sequence[Segment] | None = None,
    own_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of rows over the prefix of their segment and each row's own keys.

    Shapes: query [B, heads, T, d], key and value [B, kv_heads, S, d] of the rows' own tokens, own_mask bool [B, T, S].
    Returns [B, T, heads, d]. Without segments it is transformers' SDPA.
    """
    if segments is None or own_mask is None:
        return fused_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if query.device.type == "cpu" and query.dtype != torch.float32 and FLASH is not None:
        return in_parts(module, query, key, value, segments, own_mask, scaling), None
    batch, heads, length, d = query.shape
    kv_heads, rows = key.shape[1], heads // key.shape[1] * length
    scale = d**-0.5 if scaling is None else scaling
    grouped = (query * scale).reshape(batch, kv_heads, rows, d)
    mask = own_mask[:, None, None].expand(-1, 1, rows // length, -1, -1).reshape(batch, 1, rows, -1)
    with small_products():  # of a row's few queries; a prefix's are of all rows together
        own = (grouped @ key.transpose(2, 3)).masked_fill(~mask, float("-inf"))
    layer: Any = module.layer_idx
    shared, own_weights = zip(
        *(attend_prefix(grouped[a:b], own[a:b], prefix, layer) for a, b, prefix in segments), strict=True
    )
    with small_products():
        out = torch.cat(shared) + torch.cat(own_weights) @ value
    return out.reshape(batch, heads, length, d).transpose(1, 2).contiguous(), None


def in_parts(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Sequence[Segment],
    own_mask: torch.Tensor, scaling: float | None,
) -> torch.Tensor:  # fmt: skip
    """`attention` by torch's fused kernel for processors, once over the rows' own keys and once over each prefix.

    Both come with the logarithm of their softmax's denominator, which says what part of the whole each of them is. The
    queries of the heads that share their keys go as rows of one head. In bf16 this takes a half of the time that
    single products take, and is nearer to the exact result; in fp32 it is neither.
    """
    batch, heads, length, d = query.shape
    kv_heads, rows = key.shape[1], heads // key.shape[1] * length
    layer: Any = module.layer_idx
    grouped = query.reshape(batch, kv_heads, rows, d)
    bias = torch.zeros_like(own_mask, dtype=query.dtype).masked_fill_(~own_mask, float("-inf"))
    bias = bias[:, None, None].expand(-1, 1, rows // length, -1, -1).reshape(batch, 1, rows, -1)
    with small_products():
        out, size = FLASH(grouped, key, value, 0.0, False, attn_mask=bias, scale=scaling)
        for a, b, prefix in segments:
            if not prefix.length:
                continue
            shared_key, shared_value = (tensor[None] for tensor in prefix.layers[layer])
            flat = grouped[a:b].transpose(0, 1).reshape(1, kv_heads, (b - a) * rows, d)
            shared, shared_size = FLASH(flat, shared_key, shared_value, 0.0, False, scale=scaling)
            shared, shared_size = (
                tensor.view(kv_heads, b - a, rows, -1).transpose(0, 1) for tensor in (shared[0], shared_size[0])
            )
            share = torch.sigmoid(shared_size - size[a:b, ..., None])
            out[a:b] = torch.lerp(out[a:b].float(), shared.float(), share).to(out.dtype)
    return out.reshape(batch, heads, length, d).transpose(1, 2).contiguous()


def attend_prefix(
    query: torch.Tensor, own: torch.Tensor, prefix: Prefix, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The prefix's part of one segment's attention in a layer, and the weights of the rows' own keys.

    Shapes: query [b, kv_heads, R, d], scaled; own scores [b, kv_heads, R, S].
    Returns [b, kv_heads, R, d] and [b, kv_heads, R, S].
    """
    if not prefix.length:
        return torch.zeros_like(query), own.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    shared_key, shared_value = prefix.layers[layer]
    batch, kv_heads, rows, d = query.shape
    flat = query.transpose(0, 1).reshape(kv_heads, batch * rows, d)
    shared = (flat @ shared_key.transpose(1, 2)).view(kv_heads, batch, rows, -1).transpose(0, 1)
    weights = torch.cat([shared, own], dim=-1).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    of_prefix, of_own = weights.split([shared.shape[-1], own.shape[-1]], dim=-1)
    flat = of_prefix.transpose(0, 1).reshape(kv_heads, batch * rows, -1)
    return (flat @ shared_value).view(kv_heads, batch, rows, d).transpose(0, 1), of_own


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class GrowingLayer(DynamicLayer):
    """A layer's keys and values with room to grow: a token more does not copy those before it."""

    keys: torch.Tensor
    values: torch.Tensor
    room: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, length: int) -> "GrowingLayer":
        """A layer that holds the first `length` columns of tensors [B, kv_heads, C, d]; the rest is its room."""
        layer = cls()
        layer.lazy_initialization(keys, values)
        layer.room = (keys, values)
        layer.keys, layer.values = keys[:, :, :length], values[:, :, :length]
        return layer

    def drop(self) -> None:
        """Let go of the tensors."""
        self.keys = self.values = self.keys.new_empty(0)
        self.room = (self.keys, self.values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, kv_heads, T, d]; all of them, as views."""
        before = self.keys.shape[2] if self.is_initialized else 0
        if self.is_initialized:
            self.room = (appended(self.room[0], before, key_states), appended(self.room[1], before, value_states))
        else:
            self.lazy_initialization(key_states, value_states)
            self.room = (key_states.contiguous(), value_states.contiguous())
        self.keys, self.values = (tensor[:, :, : before + key_states.shape[2]] for tensor in self.room)
        return self.keys, self.values


def appended(room: torch.Tensor, before: int, new: torch.Tensor) -> torch.Tensor:
    """`room` [B, kv_heads, C, d] with `new` after its first `before` columns; a larger one when it is full."""
    after = before + new.shape[2]
    if after > room.shape[2]:
        larger = room.new_empty(*room.shape[:2], after + ROOM, room.shape[3])
        larger[:, :, :before] = room[:, :, :before]
        room = larger
    room[:, :, before:after] = new
    return room


def empty_cache() -> Cache:
    """A cache without keys yet."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def layers_of(cache: Cache | None) -> list[GrowingLayer]:
    """The layers of a cache that was made here; none without one."""
    return cast(list[GrowingLayer], cache.layers) if cache else []


def segments_of(prefixes: Sequence[Prefix]) -> list[Segment]:
    """Runs of rows that have the same prefix."""
    found: list[Segment] = []
    for row, prefix in enumerate(prefixes):
        if found and found[-1][2] is prefix:
            found[-1] = (found[-1][0], row + 1, prefix)
        else:
            found.append((row, row + 1, prefix))
    return found


def group_by_prefix(prompts: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], int]]:
    """Groups of rows as (rows, length of the beginning they share); rows that share too little come last, with 0.

    Groups come in lexicographic order, so that neighbours share as much as possible: the few-shot examples of all,
    then each passage. Among rows that share a beginning, those that share at least as much again, and at least
    MIN_SHARED tokens, are a group of their own: a smaller batch has to pay for itself.
    """
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    common = [common_length(prompts[a], prompts[b]) for a, b in itertools.pairwise(order)]
    alone: list[int] = []
    # runs of order[low:high] that share `shared` tokens, still to be taken apart; the last one is next
    runs = [(0, len(order), 0)]
    while runs:
        low, high, shared = runs.pop()
        enough = max(MIN_SHARED, 2 * shared)
        rest, inside, i = [], [], low
        while i < high:
            end = i + 1
            while end < high and common[end - 1] >= enough:
                end += 1
            if end - i > 1:
                inside.append((i, end, min(common[i : end - 1])))
            else:
                rest.append(order[i])
            i = end
        if shared and rest and (len(rest) > 1 or inside):
            yield rest, shared
        else:
            alone += rest
        runs += reversed(inside)
    if alone:
        yield alone, 0


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning of two token sequences, one token less than the shorter one at most."""
    limit = min(len(a), len(b)) - 1
    return next((i for i in range(limit) if a[i] != b[i]), limit)
