"""Passes of a model over rows of tokens: with prefixes and a cache, or plainly over whole prompts."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers.cache_utils import Cache

from llmops.console import UserError
from llmops.generation import shared_prefix
from llmops.generation.capacity import base_of, fixed_attention
from llmops.generation.shared_prefix import NOTHING, ROOM, GrowingLayer, Prefix, empty_cache, layers_of, segments_of

T = TypeVar("T")
WORTH_A_PASS = 512  # tokens of padding that cost less than a pass more
MOST_TOKENS = 8192  # tokens in one pass: more are no faster, only need more memory


def check_numbers(logits: torch.Tensor) -> None:
    """Raise UserError for logits that are no numbers: every answer would be the first one, at a probability of NaN."""
    if logits.isnan().any():
        raise UserError(
            "the model gives no numbers (NaN): its weights are damaged or too large for their type; copy the "
            "checkpoint again, or try --dtype fp32"
        )


@dataclass
class State:
    """A batch after its prompts: the logits that predict the next token, and what is needed to go on.

    `logits` [B, V]; `prompts` the ids after the prefix; `prefixes` one per row; `cache` per layer two tensors
    [B, kv_heads, S, d], None when the model goes the plain way; `valid` bool [B, S] which columns are tokens.
    """

    logits: torch.Tensor
    prompts: list[Sequence[int]]
    prefixes: list[Prefix]
    cache: Cache | None
    valid: torch.Tensor


class Passes:
    """A model, and how its attention can be used: with prefixes, or plainly, for the reason `plain_because`."""

    def __init__(self, model: torch.nn.Module, pad_id: int, reuse_prefix: bool) -> None:
        self.model = model.eval()
        self.pad_id = pad_id
        base = base_of(model)
        self.plain_because = fixed_attention(base) if reuse_prefix else "that was asked for"
        if self.plain_because is None:
            base.set_attn_implementation(shared_prefix.NAME)
        takes = inspect.signature(base.forward).parameters
        self.one_logit = "logits_to_keep" in takes
        # the padding on the left of a row counts for nothing; code of a checkpoint's own has rules of its own
        self.told_positions = "position_ids" in takes and type(base).__module__.startswith("transformers.")
        self.device = next(model.parameters()).device

    def read(self, prompts: list[Sequence[int]], prefixes: list[Prefix]) -> State:
        """Put whole prompts through the model, except what their prefixes hold already.

        Rows of about one length go through together; their keys and values are put side by side afterwards.
        """
        if self.plain_because is not None:
            return State(self._plain(prompts), prompts, prefixes, None, torch.empty(0))
        own = [prompt[prefix.length :] for prompt, prefix in zip(prompts, prefixes, strict=True)]
        parts, states = [], []
        for sharing in (True, False):
            candidates = [k for k, prefix in enumerate(prefixes) if bool(prefix.length) == sharing]
            parts += [[candidates[k] for k in part] for part in similar_lengths([len(own[k]) for k in candidates])]
        for rows in parts:
            empty = torch.zeros(len(rows), 0, dtype=torch.bool, device=self.device)
            state = State(torch.empty(0), [own[k] for k in rows], [prefixes[k] for k in rows], empty_cache(), empty)
            state.logits = self.step(state, state.prompts)
            states.append(state)
        if any(prefix.length for prefix in prefixes):  # whole prompts beside short ends of others
            states = [state if state.prefixes[0].length else own_prefixes(state) for state in states]
        if len(parts) == 1:
            return states[0]
        order = [row for rows in parts for row in rows]
        joined = merge([(state, list(range(len(state.prompts)))) for state in states], order)
        joined.logits = side_by_side([state.logits for state in states], order)
        return joined

    def prefix(self, ids: Sequence[int], known: Prefix) -> Prefix:
        """The prefix of these tokens, of which `known` holds the beginning (NOTHING: none of it)."""
        if known.length == len(ids):
            return known
        state = self.read([ids], [known])
        own = [(layer.keys[0], layer.values[0]) for layer in layers_of(state.cache)]
        if known.length:
            own = [
                (torch.cat([key, more_key], dim=1), torch.cat([value, more_value], dim=1))
                for (key, value), (more_key, more_value) in zip(known.layers, own, strict=True)
            ]
        return Prefix(list(ids), own)

    def ask(self, state: State, rows: list[int], paths: Sequence[tuple[int, ...]], keep: int = 0) -> torch.Tensor:
        """Logits [rows, V] after these rows' prompts and paths; the state stays as it was.

        With `keep`, the logits after each of the last `keep` columns [rows, keep, V].
        """
        if state.cache is None:
            return self._plain([[*state.prompts[k], *path] for k, path in zip(rows, paths, strict=True)], keep)
        return self.step(merge([(state, rows)]), list(paths), keep)

    def step(self, state: State, new: Sequence[Sequence[int]], keep: int = 0) -> torch.Tensor:
        """Append tokens to every row of a state with a cache; the logits after them, as `_ask`."""
        ids, own = self.left_padded(new)
        ahead = torch.tensor([[prefix.length] for prefix in state.prefixes], device=self.device)
        positions = (ahead + state.valid.sum(1, keepdim=True) + own.cumsum(1) - 1).clamp(min=0)
        state.valid = torch.cat([state.valid, own], dim=1)
        extra: dict[str, Any] = {"attention_mask": state.valid.long()}
        if any(prefix.length for prefix in state.prefixes):
            order = torch.arange(state.valid.shape[1], device=self.device)
            causal = order[None, :] <= order[-ids.shape[1] :, None]
            mask = causal[None] & state.valid[:, None, :]
            extra = {"segments": segments_of(state.prefixes), "own_mask": mask}
        return self._forward(ids, keep, position_ids=positions, past_key_values=state.cache, use_cache=True, **extra)

    def _plain(self, prompts: Sequence[Sequence[int]], keep: int = 0) -> torch.Tensor:
        parts, logits = similar_lengths(list(map(len, prompts))), []
        for rows in parts:
            ids, valid = self.left_padded([prompts[k] for k in rows])
            places = {"position_ids": (valid.cumsum(1) - 1).clamp(min=0)} if self.told_positions else {}
            logits.append(self._forward(ids, keep, attention_mask=valid.long(), use_cache=False, **places))
        return side_by_side(logits, [row for rows in parts for row in rows], 1 if keep else None)

    def left_padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids int64 [B, T], which of them are tokens, bool [B, T])."""
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad_id] * (width - len(row)) + list(row) for row in rows])
        valid = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
        return ids.to(self.device), valid.to(self.device)

    def _forward(self, ids: torch.Tensor, keep: int = 0, **inputs: Any) -> torch.Tensor:
        """Logits after the last column [B, V], or after the last `keep` columns [B, keep, V]."""
        if self.one_logit:
            inputs["logits_to_keep"] = keep or 1
        logits = self.model(input_ids=ids, **inputs).logits
        check_numbers(logits[:, -1])
        return logits[:, -keep:] if keep else logits[:, -1]


def merge(
    pieces: Sequence[tuple[State, list[int]]], order: Sequence[int] | None = None, consume: bool = False
) -> State:
    """One state of some rows of several, with a cache of its own; without the logits.

    The rows follow one another, or row i stands at place `order[i]`. Columns that none of them needs are left out. The
    pieces stay as they were, unless they are consumed: layer by layer, so that memory never holds everything twice.
    """
    states = [state for state, _ in pieces]
    count = sum(len(rows) for _, rows in pieces)
    order = range(count) if order is None else order
    device = states[0].valid.device
    index = [torch.tensor(rows, device=device) for _, rows in pieces]
    places = torch.tensor(list(order), device=device).split([len(rows) for _, rows in pieces])
    valid = [state.valid[rows] for state, rows in zip(states, index, strict=True)]
    width = max((int(columns.sum(1).max()) for columns in valid if columns.numel()), default=0)

    def gathered(tensors: list[torch.Tensor], room: int = 0) -> torch.Tensor:
        """Rows [count, ..., width + room, ...] of tensors whose columns are dimension -2, aligned on the right."""
        shape = list(tensors[0].shape)
        shape[0], shape[-2] = count, width + room
        whole = tensors[0].new_zeros(shape)
        for tensor, rows, at in zip(tensors, index, places, strict=True):
            used = min(width, tensor.shape[-2])
            whole[at, ..., width - used : width, :] = tensor[rows, ..., tensor.shape[-2] - used :, :]
        return whole

    layers = []
    for same in zip(*(layers_of(state.cache) for state in states), strict=True):
        both = (gathered([layer.keys for layer in same], ROOM), gathered([layer.values for layer in same], ROOM))
        layers.append(GrowingLayer.of(*both, width))
        for layer in same if consume else ():
            layer.drop()
    prompts = in_order([state.prompts[k] for state, rows in pieces for k in rows], order)
    prefixes = in_order([state.prefixes[k] for state, rows in pieces for k in rows], order)
    columns = gathered([state.valid[:, :, None] for state in states])[:, :, 0]
    return State(torch.empty(0), prompts, prefixes, Cache([*layers]), columns)


def own_prefixes(state: State) -> State:
    """The same state, with what each row has in its cache as a prefix of its own."""
    layers = layers_of(state.cache)
    found, cache = [], empty_cache()
    for k, prompt in enumerate(state.prompts):
        own = [(layer.keys[k, :, -len(prompt) :], layer.values[k, :, -len(prompt) :]) for layer in layers]
        found.append(Prefix(list(prompt), own))
    for number, layer in enumerate(layers):
        cache.update(layer.keys[:, :, :0], layer.values[:, :, :0], number)
    return State(state.logits, [() for _ in found], found, cache, state.valid[:, :0])


def in_own_caches(state: State) -> State:
    """The same state after its prompts were read, with what a row's prefix holds in the cache of the row itself.

    Then rows with many different prefixes cost no more than rows without any. The caches end with the prompts.
    """
    if not any(prefix.length for prefix in state.prefixes):
        return state
    whole = [prefix.length + len(own) for prefix, own in zip(state.prefixes, state.prompts, strict=True)]
    width = max(whole)
    layers = []
    for number, layer in enumerate(layers_of(state.cache)):
        pair = []
        for which, tensor in enumerate((layer.keys, layer.values)):
            rows, heads, _, d = tensor.shape
            room = tensor.new_zeros(rows, heads, width + ROOM, d)
            for k, (prefix, own) in enumerate(zip(state.prefixes, state.prompts, strict=True)):
                begin = width - len(own)
                room[k, :, begin:width] = tensor[k, :, tensor.shape[2] - len(own) :]
                if prefix.length:
                    room[k, :, begin - prefix.length : begin] = prefix.layers[number][which]
            pair.append(room)
        layers.append(GrowingLayer.of(pair[0], pair[1], width))
    order = torch.arange(width, device=state.valid.device)
    valid = order[None, :] >= width - torch.tensor(whole, device=order.device)[:, None]
    pairs = zip(state.prefixes, state.prompts, strict=True)
    prompts: list[Sequence[int]] = [[*prefix.ids, *own] for prefix, own in pairs]
    return State(state.logits, prompts, [NOTHING] * len(whole), Cache([*layers]), valid)


def similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Rows parted, in their order, so that no part is mostly padding or has more than MOST_TOKENS."""
    parts: list[list[int]] = []
    longest = total = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        count = len(parts[-1]) + 1 if parts else 1
        padding = longest * count - total - lengths[row]
        if not parts or padding > max(WORTH_A_PASS, (total + lengths[row]) / 2) or longest * count > MOST_TOKENS:
            parts.append([])
            longest, total = lengths[row], 0
        parts[-1].append(row)
        total += lengths[row]
    return [sorted(part) for part in parts]


def in_order(items: Sequence[T], order: Sequence[int]) -> list[T]:
    """Item i at place `order[i]`."""
    return [item for _, item in sorted(zip(order, items, strict=True), key=lambda pair: pair[0])]


def side_by_side(pieces: list[torch.Tensor], order: list[int], columns: int | None = None) -> torch.Tensor:
    """The rows of all pieces as one tensor, row i at place `order[i]`; dimension `columns` is padded on the left."""
    if columns is not None:
        width = max(piece.shape[columns] for piece in pieces)
        ahead = [0, 0] * (pieces[0].dim() - 1 - columns)
        pieces = [torch.nn.functional.pad(piece, [*ahead, width - piece.shape[columns], 0]) for piece in pieces]
    whole = torch.cat(pieces)
    return whole if order == sorted(order) else whole[torch.tensor(order, device=whole.device).argsort()]
