"""Numerics on a GPU: attention in blocks, FlexAttention and a plain mask against float64, and the chunked loss."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_attention import plain_mask, random_tree
from test_batches import random_samples

from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from train import attention
from train.attention import Layout
from train.batches import PackedCollator, PaddedCollator, target_losses, to_device, token_losses

BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-2}  # float32: TF32 products in kernels


@pytest.fixture(scope="session", name="checkpoints")
def _checkpoints(wide_checkpoints: dict[str, Path]) -> dict[str, Path]:
    """Instead of the narrow ones, also for `train_run`."""
    return wide_checkpoints


def attended(
    kernel: str, layout: Layout, inputs: list[torch.Tensor], length: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """[output, three gradients], the padding left out."""
    more = len(layout.end) - length if kernel == "flex" else 0
    q, k, v = (torch.nn.functional.pad(t.to(dtype), (0, 0, 0, more)).requires_grad_() for t in inputs)
    groups = q.shape[1] // k.shape[1]
    if kernel == "plain":
        key, value = (t.repeat_interleave(groups, 1) for t in (k, v))
        mask = plain_mask(layout.end[:length].cpu()).to(q.device)
        out = torch.nn.functional.scaled_dot_product_attention(q, key, value, attn_mask=mask).transpose(1, 2)
    else:
        module = SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=True)
        out = attention.attention(module, q, k, v, None, layout=layout)[0]
    out = out[:, :length]
    weights = torch.linspace(-1, 1, length, device=q.device, dtype=torch.float64)[None, :, None, None]
    grads = torch.autograd.grad((out.double() * weights).sum(), (q, k, v))
    return [out, *(g[:, :, :length] for g in grads)]


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (8, 2, 64), (8, 2, 128), (9, 3, 64)])
@pytest.mark.parametrize("kernel", ["plain", "blocks", "flex"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_against_float64(
    gpu: torch.device, kernel: str, heads: int, kv_heads: int, width: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(0)
    for _ in range(4):
        roots, length = random_tree(rng)
        inputs = [
            torch.from_numpy(rng.standard_normal((1, n, length, width))).to(gpu).to(dtype)
            for n in (heads, kv_heads, kv_heads)
        ]
        exact = attended("plain", Layout(roots, length).to(gpu), [t.double() for t in inputs], length, torch.float64)
        found = attended(kernel, Layout(roots, length, flex=kernel == "flex").to(gpu), inputs, length, dtype)
        for a, b in zip(found, exact, strict=True):
            assert (a.double() - b).norm() <= BOUNDS[dtype] * b.norm()


def test_the_probe_takes_flex_on_ampere_and_newer(gpu: torch.device, checkpoints: dict[str, Path]) -> None:
    model = ChatModel(Checkpoint(checkpoints["llama"])).weights(torch.bfloat16, device=gpu)
    reason = attention.why_no_flex(model, gpu, torch.bfloat16)
    assert (reason is None) == (torch.cuda.get_device_capability(gpu) >= (8, 0)), reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_in_one_kernel(gpu: torch.device, dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(700, 32000, device=gpu)).to(dtype).requires_grad_()
    labels = torch.randint(32000, (700,), device=gpu)
    exact = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    found = token_losses(logits, labels)
    grads = [torch.autograd.grad(loss.sum(), logits)[0].double() for loss in (exact, found)]
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= 1e-5 * exact.norm()
    assert (grads[1] - grads[0]).norm() <= 1e-2 * grads[0].norm()


@pytest.mark.parametrize("flex", [True, False])
def test_a_packed_row_is_each_conversation_by_itself(
    gpu: torch.device, checkpoints: dict[str, Path], flex: bool
) -> None:
    model = ChatModel(Checkpoint(checkpoints["qwen2"])).weights(torch.float32, device=gpu).train()
    samples = random_samples("nested prefixes")
    with torch.no_grad():
        alone = torch.cat([target_losses(model, to_device(PaddedCollator(0)([one]), gpu)) for one in samples])
        model.set_attn_implementation(attention.NAME)
        packed = target_losses(model, to_device(PackedCollator(flex=flex)(samples), gpu))
    assert torch.allclose(packed, alone, rtol=1e-2)


def test_a_step_waits_for_nothing(gpu: torch.device, checkpoints: dict[str, Path]) -> None:
    """torch's own debug mode raises at every synchronisation that it knows."""
    model = ChatModel(Checkpoint(checkpoints["llama"])).weights(torch.bfloat16, device=gpu).train()
    model.set_attn_implementation(attention.NAME)
    batch = PackedCollator()(random_samples("nested prefixes"))
    batch["layout"] = batch["layout"].pin_memory()
    batch = {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    target_losses(model, to_device(batch, gpu)).sum().backward()  # what is compiled and allocated at the first time
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        target_losses(model, to_device(batch, gpu)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
