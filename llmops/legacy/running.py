"""Patches of forward, gradient checkpointing and generation."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.cache_utils import Cache

from llmops.legacy.inspection import (
    around_forward,
    has_two_positions,
    names_used,
    own_classes,
    own_definition,
    own_modules,
    parameters_of,
)


def nothing_is_recomputed(cls: type[Any]) -> bool:
    """Gradient checkpointing is refused, ignored, or runs in the reentrant way that LoRA and ZeRO stumble over.

    The old protocol was `_set_gradient_checkpointing(module, value)`, or a gradient_checkpointing_enable that does
    nothing. Now the layers themselves recompute, with the function and the settings that the library hands over.
    """
    owner = own_definition(cls, "_set_gradient_checkpointing")
    blocked: Any = own_definition(cls, "gradient_checkpointing_enable")
    old = owner is not None and "value" in parameters_of(owner.__dict__["_set_gradient_checkpointing"])
    names = set(getattr(cls, "_no_split_modules", None) or ())
    kinds = tuple(c for c in own_classes(cls) if c.__name__ in names)
    if not kinds or (not old and blocked is None):
        return False
    for kind in kinds:
        recompute_when_asked(kind)

    def _set_gradient_checkpointing(
        self: Any,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = torch.utils.checkpoint.checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        self._llmops_recomputes = enable
        layers: list[Any] = [module for module in self.modules() if isinstance(module, kinds)]
        for i, layer in enumerate(layers):
            layer.gradient_checkpointing = enable and i % every_n_layers == 0
            layer._gradient_checkpointing_func = gradient_checkpointing_func

    if blocked is not None:
        del blocked.gradient_checkpointing_enable
    cls._set_gradient_checkpointing = _set_gradient_checkpointing

    def no_cache_while_recomputing(self: Any, inputs: dict[str, Any], forward: Callable[..., Any]) -> Any:
        if self.training and getattr(self, "_llmops_recomputes", False):
            inputs["use_cache"] = False
        return forward(**inputs)

    around_forward(cls, no_cache_while_recomputing)
    return True


def recompute_when_asked(kind: Any) -> None:
    """Let a layer class run under the checkpointing function that was set on it, while training."""
    inner = kind.forward

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and self.gradient_checkpointing):
            return inner(self, *args, **kwargs)
        return self._gradient_checkpointing_func(functools.partial(inner, self, **kwargs), *args)

    kind.forward = forward
    kind.gradient_checkpointing = False


class TupleCache(tuple[Any, ...]):
    """Keys and values of old models, one pair per layer, and last what is needed to go on from them.

    The last element is (hidden,): bool [rows, tokens seen], true for padding. ChatGLM-6B adds the two positions of the
    next token, int64 [rows]. It stands among the tensors, not in attributes, because DeepSpeed builds a new tuple of
    every output.
    """

    is_compileable = False

    @property
    def pairs(self) -> tuple[Any, ...]:
        """Keys and values alone, as the model made them."""
        return tuple(self[:-1])

    @property
    def hidden(self) -> torch.Tensor:
        """Which columns are padding."""
        return self[-1][0]

    @property
    def next_positions(self) -> tuple[torch.Tensor, ...]:
        """ChatGLM-6B's positions of the next token; empty for other models."""
        return tuple(self[-1][1:])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self.hidden.shape[1]


def generate_is_gone(cls: type[Any]) -> bool:
    """`no attribute generate`: models no longer inherit it."""
    if issubclass(cls, GenerationMixin):
        return False
    cls.__bases__ = (*cls.__bases__, GenerationMixin)
    return True


def cache_is_a_tuple(cls: type[Any]) -> bool:
    """Generation fails, or is wrong, because the library hands over a Cache object to models that keep tuples.

    The library makes no cache for them, and what they return is handed back to them. Also cured: a token's position
    when there is a cache and no position_ids, and a first step that is not told from the next.
    """
    reorder = getattr(cls, "_reorder_cache", None)
    if reorder is None or any("Cache" in vars(m) or "DynamicCache" in vars(m) for m in own_modules(cls)):
        return False
    accepted = set(parameters_of(cls.forward))

    def _prepare_cache_for_generation(self: Any, *args: Any, **kwargs: Any) -> None:
        """No cache: the first forward makes one."""

    def _reorder_cache(past: TupleCache, beam_idx: torch.Tensor) -> TupleCache:
        return TupleCache([*reorder(past.pairs, beam_idx), tuple(state[beam_idx] for state in past[-1])])

    cls._prepare_cache_for_generation = _prepare_cache_for_generation
    cls.prepare_inputs_for_generation = next_inputs(accepted)
    cls._update_model_kwargs_for_generation = GenerationMixin._update_model_kwargs_for_generation
    cls._reorder_cache = staticmethod(_reorder_cache)
    around_forward(cls, keep_tuples("position_ids" in accepted and not has_two_positions(cls)))
    return True


def next_inputs(accepted: set[str]) -> Callable[..., dict[str, Any]]:
    """A prepare_inputs_for_generation for a forward that accepts these: what the cache does not hold yet."""

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: torch.Tensor,
        past_key_values: TupleCache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        length = input_ids.shape[1]
        seen = past_key_values.get_seq_length() if past_key_values else 0
        # under ZeRO 3 a process that has finished goes on in step with the others: its cache outgrows its tokens
        tokens = input_ids[:, min(seen, length - 1) :]
        total = seen + tokens.shape[1]
        inputs = {
            "input_ids": tokens,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask[:, :total] if attention_mask is not None else None,
            "position_ids": position_ids[..., :total][..., -tokens.shape[1] :] if position_ids is not None else None,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        # generate may keep its bookkeeping on another device than the model
        moved = {name: value.to(self.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        return {name: value for name, value in moved.items() if name in accepted}

    return prepare_inputs_for_generation


def keep_tuples(positions: bool) -> Callable[..., Any]:
    """What goes around a forward so that its tuples come back to it; `positions`: it also needs position_ids."""

    def forward_with_tuples(self: Any, inputs: dict[str, Any], forward: Callable[..., Any]) -> Any:
        past = inputs.get("past_key_values")
        if isinstance(past, Cache) and past.get_seq_length():
            raise TypeError(
                f"{type(self).__name__} goes on from a cache that it returned, not from a {type(past).__name__}"
            )
        if isinstance(past, Cache) or not past:
            past = inputs["past_key_values"] = None
        if inputs.get("return_dict") is None:
            inputs["return_dict"] = self.config.return_dict
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None or (past is not None and not isinstance(past, TupleCache)):
            return forward(**inputs)
        hidden = hidden_columns(ids, mask, past)
        if past is not None:
            inputs["past_key_values"] = past.pairs
        if positions and inputs.get("position_ids") is None:
            inputs["position_ids"] = ((~hidden).cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = forward(**inputs)
        if getattr(output, "past_key_values", None) is not None:
            output.past_key_values = TupleCache([*output.past_key_values, (hidden,)])
        return output

    return forward_with_tuples


def hidden_columns(ids: torch.Tensor, mask: torch.Tensor | None, past: TupleCache | None) -> torch.Tensor:
    """Which columns, of those in the cache and of the new ones, are padding: bool [rows, columns]."""
    new = ids.shape[1]
    if mask is None:
        now = torch.zeros_like(ids, dtype=torch.bool)
    elif mask.dim() == 4:  # bool, true where attention is blocked
        now = mask[:, 0, -1, -new:].expand(ids.shape)
    else:
        now = mask[:, -new:] == 0
    return now if past is None else torch.cat([past.hidden.to(now.device), now], dim=1)


def logits_at_every_position(cls: type[Any]) -> bool:
    """Memory for logits that nobody reads: the forward has no logits_to_keep.

    The head's input is cut to the positions asked for: the last N, or those of an index tensor.
    """
    forward = cls.forward
    if "logits_to_keep" in parameters_of(forward) or "input_ids" not in parameters_of(forward):
        return False

    def at_chosen_positions(self: Any, inputs: dict[str, Any], forward: Callable[..., Any]) -> Any:
        wanted = inputs.pop("logits_to_keep", None)
        if wanted is None or (isinstance(wanted, int) and wanted == 0) or inputs.get("labels") is not None:
            return forward(**inputs)
        index = slice(-wanted, None) if isinstance(wanted, int) else wanted
        shape = tuple(inputs["input_ids"].shape)
        head = self.get_output_embeddings()
        if shape[0] == shape[1] or head is None:  # which axis of the head's input is which cannot be told
            output = forward(**inputs)
            output.logits = output.logits[:, index]
            return output

        def cut(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = arguments[0]
            hidden = hidden[:, index] if tuple(hidden.shape[:2]) == shape else hidden[index]
            return (hidden, *arguments[1:])

        hook = head.register_forward_pre_hook(cut)
        try:
            return forward(**inputs)
        finally:
            hook.remove()

    around_forward(cls, at_chosen_positions)
    signature = inspect.signature(forward)
    extra = inspect.Parameter("logits_to_keep", inspect.Parameter.KEYWORD_ONLY, default=None)
    known = list(signature.parameters.values())
    place = len(known) - (known[-1].kind is inspect.Parameter.VAR_KEYWORD)
    cls.forward.__signature__ = signature.replace(parameters=[*known[:place], extra, *known[place:]])
    return True


def streaming_asks_for_what_is_gone(cls: type[Any]) -> bool:
    """`no attribute _get_logits_warper`, then `no attribute _eos_token_tensor`, in the vendors' `stream_chat`.

    The library's processors hold what the warpers did, and want the end token's id as a tensor, which its own
    `generate` makes before.
    """
    if "_get_logits_warper" not in names_used(getattr(cls, "stream_generate", None)):
        return False

    def _get_logits_warper(self: Any, generation_config: GenerationConfig) -> LogitsProcessorList:
        return LogitsProcessorList()

    def _get_logits_processor(
        self: Any, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> LogitsProcessorList:
        if not hasattr(generation_config, "_eos_token_tensor"):
            self._prepare_special_tokens(generation_config, device=self.device)
        return GenerationMixin._get_logits_processor(self, generation_config, *args, **kwargs)

    cls._get_logits_warper = _get_logits_warper
    cls._get_logits_processor = _get_logits_processor
    return True
