"""Linear layers of a model that only answers on a CPU, their weights laid out once as oneDNN reads them.

torch.nn.Linear hands its weights to MKL as they lie, which is slow for the few rows of a step of answers. With oneDNN's
own layout a step of 16 rows of a model of 135M weights takes 0.63 of the time in float32 and 0.71 in bf16, one of 64
rows 0.8, reading prompts 0.9. torch.compile's inference uses the same two operators.
"""

import torch

from llmops.machine import cpu_kernels

ROWS = 16  # that the layout is chosen for; others are as fast with it


class PackedLinear(torch.nn.Module):
    """What a linear layer computes, rounded differently; it cannot learn or be saved."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight.detach().new_empty(0)  # for code that asks for its dtype or device
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes with weights of this kind here: bf16 needs a processor with AVX-512 or newer."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(model: torch.nn.Module) -> int:
    """Pack the plain linear layers of a model on the CPU, in place; how many. For inference alone.

    Adapters that read the weights under them (DoRA) leave them as they are.
    """
    if cpu_kernels.settled() == cpu_kernels.DEFAULT:
        return 0
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or not can_pack(parameter.dtype):
        return 0
    if any(getattr(module, "lora_magnitude_vector", None) for module in model.modules()):
        return 0
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, PackedLinear(child))
                count += 1
    return count
