"""torch's fused attention as transformers calls it, with a kernel for its small products."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmops.machine.cpu_kernels import small_products

NAME = "fused"


@small_products()
def fused_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Query [B, heads, T, d], key and value [B, kv_heads, S, d] to [B, T, heads, d]."""
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, fused_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
