"""Baichuan2-13B: ALiBi without a mask for every position, and a head that normalises its weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmops.legacy.inspection import around_forward, names_used, own_classes


def alibi_buffer_of_every_position(cls: type[Any]) -> bool:
    """2.7 GB at the first evaluation: a mask for every head and every pair of 4,096 positions is made and kept.

    It is made for the length at hand, and while decoding for the new tokens only. Distances are counted from the
    query, which gives the same softmax and is more exact in bf16.
    """
    kinds = [c for c in own_classes(cls) if issubclass(c, PreTrainedModel) and "get_alibi_mask" in c.__dict__]
    kind: Any
    for kind in kinds:
        kind.get_alibi_mask = get_alibi_mask
        around_forward(kind, mask_of_new_tokens)
    return bool(kinds)


def get_alibi_mask(self: Any, tensor: torch.Tensor, seq_length_with_past: int) -> torch.Tensor:
    """ALiBi (Press et al. 2022) with the causal mask, [heads, new tokens, seq_length_with_past] in tensor's dtype."""
    length = seq_length_with_past
    rows = getattr(self, "_llmops_rows", None) or length
    key = (rows, length, tensor.dtype, tensor.device)
    kept = self.__dict__.get("_llmops_alibi")
    if kept is None or kept[0] != key:
        column = torch.arange(length, device=tensor.device)
        distance = (column - column[length - rows :, None]).float()
        ahead = distance > 0
        mask = torch.empty(self.n_head, rows, length, dtype=tensor.dtype, device=tensor.device)
        for head, slope in zip(mask, alibi_slopes(self.n_head), strict=True):
            head.copy_((distance * slope).masked_fill_(ahead, float("-inf")))
        kept = self.__dict__["_llmops_alibi"] = (key, mask)
    return kept[1]


def alibi_slopes(heads: int) -> list[float]:
    """One slope per head: a geometric series for a power of two, filled up from the next finer one otherwise."""
    whole = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    return slopes + [2 ** (-8 * (i + 0.5) / whole) for i in range(heads - whole)]


def mask_of_new_tokens(self: Any, inputs: dict[str, Any], forward: Callable[..., Any]) -> Any:
    """With a cache, hand over the mask of the new tokens' rows only."""
    ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    past, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
    new = ids.shape[1]
    self.alibi_mask = None  # the class keeps the last one by length alone, whatever its dtype and device
    self._llmops_rows = new if past else None
    if past and mask is not None and mask.dim() == 2:
        column = torch.arange(mask.shape[1], device=mask.device)
        seen = column <= column[mask.shape[1] - new :, None]
        inputs["attention_mask"] = (seen & (mask[:, None, :] != 0)).long()
    return forward(**inputs)


def weight_changed_by_evaluating(cls: type[Any]) -> bool:
    """Evaluating in mid-training changes the weights that are saved: the head normalises its weight in place.

    The products are divided by the norms of the weight's rows instead: the same logits, and no second weight.
    """
    kinds = [
        c
        for c in own_classes(cls)
        if issubclass(c, nn.Module) and "first_flag" in names_used(c.__dict__.get("__init__"))
    ]
    for kind in kinds:
        kind.forward = divide_by_norms
    return bool(kinds)


def divide_by_norms(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """hidden_states times the weight with rows of norm 1; the weight is not written."""
    norms = torch.linalg.vector_norm(self.weight, dim=1, dtype=torch.float32).clamp_min(1e-12)
    products = nn.functional.linear(hidden_states, self.weight)
    return (products / norms).to(products.dtype)  # norms rounded to bf16 would scale whole words up or down
