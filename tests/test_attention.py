"""FlexAttention with the analytic tiles, SDPA in blocks and a plain mask are one and the same attention."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as flex_module
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from test_batches import loss_and_gradients, random_samples
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig

from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from train import attention
from train.attention import TILE, Layout, Node, flex_kernel, padded_ends, tiles_of
from train.batches import PackedCollator, PaddedCollator

HEADS = ((4, 4, 16), (8, 2, 16), (9, 3, 64))


@pytest.fixture(autouse=True)
def _flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention has no compiled backward pass on the CPU and refuses it; uncompiled it is right, only slow."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def random_tree(rng: np.random.Generator) -> tuple[list[Node], int]:
    """A forest of 1 to 6 roots, up to 3 levels deep, and its length."""
    length = 0

    def grow(depth: int) -> Node:
        nonlocal length
        node = Node(length, length := length + int(rng.choice([1, 2, 20, 60])))
        if depth < 3 and rng.random() < 0.6:
            node.children = [grow(depth + 1) for _ in range(int(rng.integers(1, 4)))]
        node.end = length
        return node

    return [grow(0) for _ in range(int(rng.integers(1, 7)))], length


def plain_mask(end: torch.Tensor) -> torch.Tensor:
    """The rule itself, [T, T]: q sees k when k <= q < end[k]."""
    place = torch.arange(len(end))
    return (place[None, :] <= place[:, None]) & (place[:, None] < end[None, :])


def run(kernel: str, layout: Layout, inputs: list[torch.Tensor], length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """[output, three gradients] of one way to compute it, the padding left out."""
    more = len(layout.end) - length if kernel == "flex" else 0
    q, k, v = (torch.nn.functional.pad(t.to(dtype), (0, 0, 0, more)).requires_grad_() for t in inputs)
    groups = q.shape[1] // k.shape[1]
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=True)
    if kernel == "plain":
        mask = plain_mask(layout.end)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups > 1)
        out = out.transpose(1, 2)
    else:
        out = attention.attention(module, q, k, v, None, layout=layout)[0]
    out = out[:, :length]
    weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
    gradients = torch.autograd.grad((out * weights).sum(), (q, k, v))
    return [out, *(g[:, :, :length] for g in gradients)]


@pytest.mark.parametrize(("heads", "kv_heads", "width"), HEADS)
def test_flex_equals_blocks_equals_plain(heads: int, kv_heads: int, width: int) -> None:
    rng = np.random.default_rng(heads)
    for _ in range(10):
        roots, length = random_tree(rng)
        inputs = [
            torch.from_numpy(rng.standard_normal((1, count, length, width))) for count in (heads, kv_heads, kv_heads)
        ]
        blocks = Layout(roots, length, block_tokens=int(rng.choice([1, 64, 256])))
        expected = run("plain", blocks, inputs, length, torch.float64)
        for kernel, layout in (("blocks", blocks), ("flex", Layout(roots, length, flex=True))):
            found = run(kernel, layout, inputs, length, torch.float32)
            for a, b in zip(found, expected, strict=True):
                assert (a - b).norm() <= 2e-6 * b.norm(), (kernel, length)


def test_tiles_cover_exactly_what_is_seen() -> None:
    """Per pair of tiles: not looked at means nothing is seen, whole means all is, partly means something is."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        roots, length = random_tree(rng)
        end = Layout(roots, length, flex=True).end
        assert torch.equal(end, padded_ends(Layout(roots, length, block_tokens=1).end))
        seen = plain_mask(end)
        tiles = tiles_of(end)
        count = len(end) // TILE
        per_tile = seen.view(count, TILE, count, TILE).transpose(1, 2).flatten(2)
        for numbers, indices, expected in (
            (tiles.kv_num_blocks, tiles.kv_indices, per_tile.any(2) & ~per_tile.all(2)),
            (tiles.full_kv_num_blocks, tiles.full_kv_indices, per_tile.all(2)),
            (tiles.q_num_blocks, tiles.q_indices, (per_tile.any(2) & ~per_tile.all(2)).T),
            (tiles.full_q_num_blocks, tiles.full_q_indices, per_tile.all(2).T),
        ):
            dense = torch.zeros(count, count, dtype=torch.bool)
            for row in range(count):
                dense[row, indices[0, 0, row, : numbers[0, 0, row]].long()] = True
            assert torch.equal(dense, expected)


@pytest.mark.parametrize("shape", ["nested prefixes", "longer than a block"])
def test_a_model_with_flex_is_exact(checkpoints: dict[str, Path], shape: str) -> None:
    model = ChatModel(Checkpoint(checkpoints["qwen2"])).weights(torch.float32).train()
    samples = random_samples(shape)
    expected_loss, expected = loss_and_gradients(model, [PaddedCollator(0)([one]) for one in samples])
    model.set_attn_implementation(attention.NAME)
    batch = PackedCollator(flex=True)(samples)
    assert batch["input_ids"].shape[1] % TILE == 0
    batch["layout"] = batch["layout"].to("cpu", non_blocking=True)
    loss, found = loss_and_gradients(model, [batch])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm().clamp(min=1e-6)


def test_the_probe_compares_and_falls_back_with_a_reason(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ChatModel(Checkpoint(checkpoints["llama"])).weights(torch.float32)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert attention.why_no_flex(model, cpu, torch.float32) == "there is no GPU"
    assert attention.flex_difference(4, 2, 16, cpu, torch.float32) < 1e-5
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "older than Ampere" in str(attention.why_no_flex(model, gpu, torch.float16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def no_compiler(*_: object) -> float:
        raise RuntimeError("Failed to find C compiler.\nMore of it")

    monkeypatch.setattr(attention, "flex_difference", no_compiler)
    reason = str(attention.why_no_flex(model, gpu, torch.bfloat16))
    assert reason == "it does not run here (RuntimeError: Failed to find C compiler.)"
    monkeypatch.setattr(attention, "flex_difference", lambda *_: 1e-3)
    assert attention.why_no_flex(model, gpu, torch.bfloat16) is None
    monkeypatch.setattr(attention, "flex_difference", lambda *_: float("nan"))
    assert "differs by nan" in str(attention.why_no_flex(model, gpu, torch.bfloat16))
    model.config.attention_dropout = 0.1
    assert "drops out" in str(attention.why_no_flex(model, gpu, torch.bfloat16))
    assert flex_kernel("cpu") is flex_module.flex_attention


def test_the_compiled_kernel_has_more_variants_than_dynamos_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each count of heads is a variant; the ninth was computed without a kernel, one beyond our limit is an error."""
    compiled = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiled))
    kernel = flex_kernel.__wrapped__("cuda")
    layout = Layout([Node(0, 128, 128)], 128, flex=True)

    def attend(heads: int) -> torch.Tensor:
        inputs = [torch.ones(1, heads, 128, 16) for _ in range(3)]
        return kernel(*inputs, block_mask=layout.tiles, scale=0.25, enable_gqa=False)

    torch.compiler.reset()
    try:
        assert all(attend(heads).shape[1] == heads for heads in range(1, 11))
        assert compiled.frame_count == 10
        torch.compiler.reset()
        monkeypatch.setattr(attention, "VARIANTS", 2)
        kernel = flex_kernel.__wrapped__("cuda")
        attend(1)
        attend(2)
        with pytest.raises(FailOnRecompileLimitHit):
            attend(3)
    finally:
        torch.compiler.reset()


def test_the_checkpoints_of_the_gpu_tests_have_heads_that_flex_takes(wide_checkpoints: dict[str, Path]) -> None:
    """torch/_inductor/kernel/flex/flex_attention.py refuses heads narrower than 16."""
    for folder in wide_checkpoints.values():
        config = AutoConfig.from_pretrained(folder)
        assert (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) >= 16


def test_chunked_cross_entropy_equals_the_plain_one() -> None:
    draw = torch.Generator().manual_seed(0)
    for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 2e-6)):
        logits = (5 * torch.randn(300, 1000, generator=draw)).to(dtype).requires_grad_()
        labels = torch.randint(1000, (300,), generator=draw)
        plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        ours = chunked_cross_entropy(logits, labels, reduction="none", block_rows=64)
        weights = torch.linspace(0, 1, 300)
        grads = [torch.autograd.grad((loss.float() * weights).sum(), logits)[0] for loss in (plain, ours)]
        assert (ours - plain).norm() <= bound * plain.norm()
        assert (grads[1] - grads[0]).norm() <= bound * grads[0].norm()
