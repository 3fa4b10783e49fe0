"""What a model and its device can take: our attention in place of its own, so many tokens of a cache."""

from typing import Any, cast

import psutil
import torch
from transformers import PreTrainedModel


def config_of(model: torch.nn.Module) -> Any:
    """A model's configuration."""
    return model.config


def base_of(model: torch.nn.Module) -> PreTrainedModel:
    """The model of transformers that a model is, or that its adapters lie on."""
    inner: Any = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, inner() if inner else model)


def vocabulary_of(model: torch.nn.Module) -> int:
    """How many tokens a model has embeddings for."""
    embeddings: Any = base_of(model).get_input_embeddings()
    return int(embeddings.weight.shape[0])


def fixed_attention(model: torch.nn.Module) -> str | None:
    """Why a model's attention cannot be replaced by ours, or None when it can.

    It must route attention through transformers' interface, with full attention in every layer.
    """
    config = config_of(model).get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention is not replaceable"
    if not getattr(model, "_supports_sdpa", True):
        return "its attention is more than SDPA computes"  # such as sinks
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"it has layers of the kinds {', '.join(sorted(kinds - {'full_attention'}))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "its attention has a sliding window"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps its attention scores"
    return None


def cache_bytes(model: torch.nn.Module) -> int:
    """Bytes of one token's keys and values: 2 x layers x key/value heads x head width x bytes of a number."""
    config = config_of(model).get_text_config(decoder=True)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * width * next(model.parameters()).element_size()


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
