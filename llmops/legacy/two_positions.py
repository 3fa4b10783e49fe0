"""ChatGLM-6B: a prompt that is read in both directions, and two positions per token."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin

from llmops.legacy.inspection import around_forward, has_two_positions
from llmops.legacy.running import TupleCache, hidden_columns


def masks_only_in_four_dimensions(cls: type[Any]) -> bool:
    """A 2-D attention mask crashes, and generate refuses the 4-D masks that the tokenizer makes.

    Masks and positions are made from the token ids and a 2-D mask, padding on either side. The prompt up to `<sop>`
    is visible to every token; the answer is causal. The cache keeps what the next token's positions need.
    """
    if not has_two_positions(cls):
        return False

    def make_masks(self: Any, inputs: dict[str, Any], forward: Callable[..., Any]) -> Any:
        ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        past = inputs.get("past_key_values")
        if ids is None or not getattr(self, "position_encoding_2d", True):
            return forward(**inputs)
        hidden = hidden_columns(ids, mask, past or None)
        if past:
            anchor, block = past.next_positions
            made, blocked = go_on_from(anchor, block, hidden, ids.shape[1])
        else:
            made, blocked, anchor, block = read_prompt(ids, hidden, self.config)
        inputs["attention_mask"] = mask if mask is not None and mask.dim() == 4 else blocked
        inputs["position_ids"] = positions if positions is not None and positions.dim() == 3 else made
        output = forward(**inputs)
        cache = getattr(output, "past_key_values", None)
        if isinstance(cache, TupleCache):
            after = block + (ids.shape[1] if past else 0)
            output.past_key_values = TupleCache([*cache.pairs, (cache.hidden, anchor, after)])
        return output

    @functools.wraps(GenerationMixin.generate)
    def generate(self: Any, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        return GenerationMixin.generate(self, inputs, *args, **in_two_dimensions(kwargs))

    stream = getattr(cls, "stream_generate", None)
    if stream is not None:

        @functools.wraps(stream)
        def stream_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            return stream(self, *args, **in_two_dimensions(kwargs))

        cls.stream_generate = stream_generate
    cls.generate = generate
    around_forward(cls, make_masks)
    return True


def in_two_dimensions(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a generation with the tokenizer's 4-D mask as a 2-D one, and without its positions."""
    inputs = dict(inputs)
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and mask.dim() == 4:
        inputs["attention_mask"] = (~mask[:, 0, -1]).long()
    if positions is not None and positions.dim() == 3:
        del inputs["position_ids"]
    return inputs


MASKS = (("gmask_token_id", 150001), ("mask_token_id", 150000))  # before "slim" the code had these ids, not the config


def read_prompt(
    ids: torch.Tensor, hidden: torch.Tensor, config: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions [rows, 2, T], blocked attention [rows, 1, T, T], and the anchor and block of the next token [rows].

    Raises ValueError for a row without `<sop>` or without a mask token.
    """
    column = torch.arange(ids.shape[1], device=ids.device)
    start = (~hidden).int().argmax(1)
    sop = first_column(ids, config.bos_token_id)
    gmask, single = (first_column(ids, getattr(config, name, fixed)) for name, fixed in MASKS)
    place = torch.where(gmask >= 0, gmask, single)
    if (sop < 0).any() or (place < 0).any():
        raise ValueError("every row must hold [gMASK] (or [MASK]) and <sop>: the prompt ends with them")
    in_prompt = column < sop[:, None]
    anchor = place - start
    position = torch.where(in_prompt, (column - start[:, None]).clamp(min=0), anchor[:, None])
    block = torch.where(in_prompt, 0, column - sop[:, None] + 1)
    seen = (column[:, None] >= column) | in_prompt[:, None, :]
    return torch.stack([position, block], 1), ~(seen & ~hidden[:, None, :])[:, None], anchor, ids.shape[1] - sop + 1


def first_column(ids: torch.Tensor, token: int) -> torch.Tensor:
    """Where each row has a token first; -1 where it has none."""
    found = ids == token
    return torch.where(found.any(1), found.int().argmax(1), -1)


def go_on_from(
    anchor: torch.Tensor, block: torch.Tensor, hidden: torch.Tensor, new: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [rows, 2, new] and blocked attention [rows, 1, new, columns] of tokens that follow a cache."""
    step = torch.arange(new, device=hidden.device)
    positions = torch.stack([anchor[:, None].expand(-1, new), block[:, None] + step], 1)
    column = torch.arange(hidden.shape[1], device=hidden.device)
    ahead = column > (hidden.shape[1] - new + step)[:, None]
    return positions, (hidden[:, None, :] | ahead)[:, None]
