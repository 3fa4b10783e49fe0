"""LoRA's forward and backward pass of a frozen linear layer on a CPU, without arrays of the layer's size in between.

PEFT computes y = W x, then B A x, its product with the scaling, and the sum; autograd does as much backwards. Each is
an array of the layer's output, and on a CPU that is mostly time for memory. Here the small products add themselves to
the large one: y += s B (A x), and backwards dx += A' (s B' dy) (Hu et al. 2021, "LoRA", equation 3).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class FrozenWithLora(torch.autograd.Function):
    """x [n, in] to [n, out]: W x + b + s B (A d); `d` [n, in] is x after the dropout, or None where there is none."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, d: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None,
        a: torch.Tensor, b: torch.Tensor, scaling: float,
    ) -> torch.Tensor:  # fmt: skip
        """Weight [out, in], a [r, in], b [out, r]."""
        seen = x if d is None else d
        inner = seen @ a.t()
        ctx.save_for_backward(seen, inner, weight, a, b)
        ctx.scaling, ctx.drops = scaling, d is not None
        return torch.nn.functional.linear(x, weight, bias).addmm_(inner, b.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: torch.Tensor) -> tuple[Any, ...]:
        """Gradients of x, d, a and b; the weight and its bias are frozen."""
        seen, inner, weight, a, b = ctx.saved_tensors
        inner_above = (above @ b).mul_(ctx.scaling)
        d_b = (above.t() @ inner).mul_(ctx.scaling)
        d_a = inner_above.t() @ seen
        d_x = above @ weight if ctx.needs_input_grad[0] else None
        if ctx.drops:
            return d_x, inner_above @ a if ctx.needs_input_grad[1] else None, None, None, d_a, d_b, None
        return d_x if d_x is None else d_x.addmm_(inner_above, a), None, None, None, d_a, d_b, None


def forward(layer: Any, plain: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A PEFT layer's forward pass; `plain` is its own, for everything but training and evaluating one adapter."""
    if args or kwargs or layer.disable_adapters or layer.merged or list(layer.active_adapters) != ["default"]:
        return plain(x, *args, **kwargs)
    base, flat = layer.base_layer, x.reshape(-1, x.shape[-1])
    dropout = layer.lora_dropout["default"]
    dropped = dropout(flat) if layer.training and not isinstance(dropout, torch.nn.Identity) else None
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    out = FrozenWithLora.apply(flat, dropped, base.weight, base.bias, a, b, layer.scaling["default"])
    return out.view(*x.shape[:-1], -1)


def quicken(model: torch.nn.Module) -> int:
    """Give the LoRA layers that this fits the pass above, in place; how many.

    It fits vanilla LoRA on plain frozen linear layers in float32 on a CPU. Not for ZeRO 3, which gathers a layer's
    weights when the layer itself is called.
    """
    from peft.tuners.lora import Linear

    count = 0
    for layer in model.modules():
        if not isinstance(layer, Linear) or type(layer.base_layer) is not torch.nn.Linear:
            continue
        weight = layer.base_layer.weight
        small = [layer.lora_A["default"], layer.lora_B["default"]]
        fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.requires_grad
        if fits and not layer.lora_variant and all(s.bias is None and s.weight.dtype == weight.dtype for s in small):
            layer.forward = partial(forward, layer, layer.forward)
            count += 1
    return count
