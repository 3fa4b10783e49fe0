"""Memory and time of a run before it begins, from the model's configuration and small measurements; no weight is read.

Memory of the weights' states: Rajbhandari et al. 2020 (ZeRO), section 3. Activations: what autograd keeps, counted on
the meta device with layers of the model's own class; for models whose attention cannot be replaced, Korthikanti et al.
2022 ("Reducing Activation Recomputation in Large Transformer Models"), section 4, without the attention matrix.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from llmops.generation.capacity import base_of, fixed_attention
from llmops.models.lora_layers import choose_lora_layers
from train.config import Config
from train.deepspeed_file import stage

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PROBE = "count_saved"  # the attention that keeps what fused kernels keep
PROBE_TOKENS = 64
GIB = 2**30
# weights that ZeRO 3 keeps whole at the turn from forward to backward pass: those that it needs again before another
# stage3_max_reuse_distance (DeepSpeed's 1e9) weights have gone by, half of them on each side of the turn
KEPT_WHOLE = 500_000_000
OPTIMIZER_BYTES = 16  # a trained weight's moments (8), its fp32 copy (4) and its fp32 gradient (4) while stepping


@dataclass(frozen=True)
class Shape:
    """What the estimates need to know of a model: numbers of weights, widths, and bytes that a token leaves behind.

    `per_layer`, `outside`: activations kept for the backward pass by one decoder layer and by the rest, per token.
    """

    weights: int
    trained: int
    hidden: int
    layers: int
    vocabulary: int
    width: int
    per_layer: float
    outside: float

    def activations(self, tokens: int, every: int) -> float:
        """Bytes of activations of a micro-batch when every `every`-th layer is recomputed (0: none)."""
        recomputed = self.layers // every if every else 0
        kept = (self.layers - recomputed) * self.per_layer + recomputed * self.hidden * self.width
        return tokens * (kept + self.outside + self.per_layer)  # and one layer while its gradients are computed

    def logits(self, learned: int, on_gpu: bool) -> float:
        """Bytes of logits and their gradient; on a CPU below fp32 of their softmax in fp32, too."""
        return learned * self.vocabulary * (2 * self.width + (0 if on_gpu or self.width == 4 else 8))


class _KeepsLikeFused(torch.autograd.Function):
    """Attention that computes nothing and keeps queries, keys, values, output and log-sum-exp, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        raise NotImplementedError


def _keeps_like_fused(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    return _KeepsLikeFused.apply(query, key, value).transpose(1, 2).contiguous(), None


def empty_model(
    config: Config, dtype: torch.dtype, layers: int | None = None, device: str | torch.device = "meta"
) -> torch.nn.Module:
    """The model as training builds it, with LoRA where that is trained, but without its weights: they are random.

    On the meta device it takes no memory; `layers`: that many decoder layers instead of its own number.
    """
    model = config.model.empty(dtype, layers, device)
    return add_lora(config, model) if config.train_type == "lora" else model


def add_lora(config: Config, model: "PreTrainedModel") -> "PeftModel":
    """LoRA layers on a model, in the model's own dtype (PEFT alone would make them fp32)."""
    from peft import LoraConfig, get_peft_model

    layers = choose_lora_layers(model, config.lora_module_name, config.checkpoint.lora_layers)
    lora = LoraConfig(
        r=config.lora_dim,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it by r, whatever number it is
        lora_dropout=config.lora_dropout, target_modules=layers,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return cast("PeftModel", get_peft_model(model, lora, autocast_adapter_dtype=False))


def model_shape(config: Config, dtype: torch.dtype) -> Shape:
    """The model's shape; tied weights count once."""
    model = empty_model(config, dtype)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    base = base_of(model)
    text = base.config.get_text_config()
    width = torch.empty((), dtype=dtype).element_size()
    layers = getattr(text, "num_hidden_layers", None) or text.num_layers
    if fixed_attention(base) is None:
        one, two = (saved_bytes(empty_model(config, dtype, n)) / PROBE_TOKENS for n in (1, 2))
        per_layer, outside = two - one, 2 * one - two
    else:
        per_layer, outside = 34 / 2 * width * text.hidden_size, 4 * text.hidden_size
    return Shape(
        sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained), text.hidden_size, layers,
        text.vocab_size, width, per_layer, outside,
    )  # fmt: skip


def saved_bytes(model: torch.nn.Module) -> int:
    """Bytes that autograd keeps of a forward pass over PROBE_TOKENS tokens, without the weights; on the meta device."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from transformers import AttentionInterface

    AttentionInterface.register(PROBE, _keeps_like_fused)
    base = base_of(model)
    base.set_attn_implementation(PROBE)
    weights = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    kept: dict[StorageWeakRef, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[StorageWeakRef(tensor.untyped_storage())] = tensor
        return tensor

    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device="meta")
    last = {} if "logits_to_keep" not in _parameters(base) else {"logits_to_keep": ids.new_zeros(1)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(input_ids=ids, position_ids=ids, use_cache=False, **last)
    del output
    return sum(t.untyped_storage().nbytes() for ref, t in kept.items() if ref not in weights)


def _parameters(model: torch.nn.Module) -> list[str]:
    import inspect

    return list(inspect.signature(model.forward).parameters)


def own_part(config: Config, weights: int, processes: int) -> float:
    """How many of the trained weights a process updates; without ZeRO each updates all of them."""
    return weights / (1 if stage(config) == "0" else processes)


def state_parts(config: Config, shape: Shape, processes: int) -> dict[str, float]:
    """Bytes per device of the weights and what belongs to them, wherever ZeRO 3 keeps them."""
    split = processes if stage(config).startswith("3") else 1
    return {
        "weights": shape.weights * shape.width / split,
        "gradients": shape.trained * shape.width / (processes if config.train_type == "all" else 1),
        "optimizer states": own_part(config, shape.trained, processes) * OPTIMIZER_BYTES,
    }


def memory_parts(
    config: Config, shape: Shape, processes: int, tokens: int, learned: int, every: int, on_gpu: bool
) -> dict[str, float]:
    """Peak memory per device in bytes, by part.

    `tokens`, `learned`: of the largest micro-batch; `every`: every so-manieth layer is recomputed, 0: none.
    """
    states, away = state_parts(config, shape, processes), stage(config) == "3_offload" and on_gpu
    if away:  # in the machine's memory; on a CPU that is the same
        states = dict.fromkeys(states, 0.0)
    if stage(config).startswith("3") and (away or processes > 1):
        states["gathered weights"] = min(shape.weights, KEPT_WHOLE) * shape.width
    return states | {
        "activations": shape.activations(tokens, every),
        "logits": shape.logits(learned, on_gpu),
    }
