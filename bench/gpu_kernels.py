"""Parts of bench/gpu.sh on single kernels, attention and the loss: their errors and their times."""

import itertools
from collections.abc import Callable
from typing import Any

from gpu_bench import Bench


def numerics(bench: Bench) -> None:
    """Every kernel's output and gradients against float64, relative norms; bf16's own rounding is 4e-3."""
    import torch

    if not bench.gpu:
        flex_without_compiler()
    lengths = (300,) if bench.small else (1000, 4096)
    for heads, kv_heads, width in ((4, 4, 64), (8, 2, 64), (8, 2, 128), (9, 3, 64)):
        for length in lengths:
            for kernel in ("plain", "blocks", "flex"):
                bench.each(
                    f"{kernel}, {heads}/{kv_heads} heads of {width}, {length} tokens",
                    lambda h=heads, k=kv_heads, w=width, n=length, name=kernel: against_float64(
                        bench, h, k, w, n, name
                    ),
                )
    from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

    def cross_entropy() -> dict[str, Any]:
        logits = torch.randn(512, 32000, device=bench.device, dtype=bench.dtype, requires_grad=True)
        labels = torch.randint(32000, (512,), device=bench.device)
        exact = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
        found = chunked_cross_entropy(logits, labels, reduction="none")
        grads = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (exact, found)]
        return {"forward": relative(found, exact), "backward": relative(grads[1], grads[0])}

    bench.each("chunked cross entropy", cross_entropy)


def kernels(bench: Bench) -> None:
    """Forward and backward of attention and of the loss, in milliseconds."""
    import torch
    from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

    from train.attention import Layout

    if not bench.gpu:
        flex_without_compiler()
    for length in (256,) if bench.small else (4096, 16384):
        for kernel in ("blocks", "flex"):

            def attention(n: int = length, name: str = kernel) -> dict[str, Any]:
                layout = Layout(tree(n), n, flex=name == "flex").to(bench.device)
                shape = (1, 4 if bench.small else 32, len(layout.end), 64)
                inputs = [torch.randn(shape, device=bench.device).to(bench.dtype).requires_grad_() for _ in range(3)]
                slope = torch.randn(shape, device=bench.device).to(bench.dtype).transpose(1, 2).contiguous()
                return {"milliseconds": 1e3 * bench.seconds(lambda: there_and_back(layout, inputs, slope), 3)}

            bench.each(f"attention in {kernel}, {length} tokens", attention)
    rows, vocabulary = (64, 2000) if bench.small else (8192, 128000)
    logits = torch.randn(rows, vocabulary, device=bench.device, dtype=bench.dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (rows,), device=bench.device)
    losses = {
        "chunked": lambda: chunked_cross_entropy(logits, labels, reduction="sum"),
        "plain": lambda: torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum"),
    }
    for name, loss in losses.items():

        def cost(work: Callable[[], Any] = loss) -> dict[str, Any]:
            bench.memory_gib(start=True)
            seconds = bench.seconds(lambda: torch.autograd.grad(work(), logits), 3)
            return {"milliseconds": 1e3 * seconds, "peak_gib": bench.memory_gib()}

        bench.each(f"{name} cross entropy, {rows} x {vocabulary}", cost)


def there_and_back(layout: Any, inputs: list[Any], slope: Any) -> None:
    """Forward and backward pass of attention and nothing beside it; `slope`: the output's gradient."""
    from types import SimpleNamespace

    import torch

    from train import attention

    module = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=True)
    out = attention.attention(module, *inputs, None, layout=layout)[0]
    torch.autograd.grad(out, inputs, slope)


def flex_without_compiler() -> None:
    """On a CPU FlexAttention refuses gradients, for want of a compiled backward pass; uncompiled it has one."""
    import torch.nn.attention.flex_attention as module

    module._validate_device = lambda *_: None
    module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True


def relative(found: Any, exact: Any) -> float:
    """The norm of the difference over the norm."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def tree(length: int, branches: int = 6) -> list[Any]:
    """A prompt that `branches` answers continue, and a conversation of its own."""
    from train.attention import Node

    trunk, rest = length // 3, length - length // 3
    cuts = [trunk + rest * i // (branches + 1) for i in range(branches + 1)]
    children = [Node(a, b, b) for a, b in itertools.pairwise(cuts)]
    return [Node(0, trunk, cuts[-1], children), Node(cuts[-1], length, length)]


def against_float64(bench: Bench, heads: int, kv_heads: int, width: int, length: int, kernel: str) -> dict[str, Any]:
    """Relative errors of one kernel on a small tree."""
    import torch

    from train.attention import Layout

    torch.manual_seed(0)
    layout = Layout(tree(length), length, flex=kernel == "flex").to(bench.device)
    inputs = [
        torch.randn(1, n, length, width, device=bench.device).to(bench.dtype) for n in (heads, kv_heads, kv_heads)
    ]
    exact = attend(bench, "plain", layout, [t.double() for t in inputs], length)
    found = attend(bench, kernel, layout, inputs, length)
    return {"forward": relative(found[0], exact[0])} | {
        f"d{name}": relative(a, b) for name, a, b in zip("qkv", found[1:], exact[1:], strict=True)
    }


def attend(bench: Bench, kernel: str, layout: Any, inputs: list[Any], length: int) -> list[Any]:
    """[output, three gradients] without padding."""
    from types import SimpleNamespace

    import torch

    from train import attention

    more = len(layout.end) - length if kernel == "flex" else 0
    q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, more)).requires_grad_() for t in inputs)
    groups = q.shape[1] // k.shape[1]
    if kernel == "plain":
        place, end = torch.arange(length, device=bench.device), layout.end[:length].to(bench.device)
        mask = (place[None, :] <= place[:, None]) & (place[:, None] < end[None, :])
        key, value = (t.repeat_interleave(groups, 1) for t in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, key, value, attn_mask=mask).transpose(1, 2)
    else:
        module = SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=True)
        out = attention.attention(module, q, k, v, None, layout=layout)[0]
    out = out[:, :length]
    weights = torch.linspace(-1, 1, length, device=bench.device, dtype=torch.float64)[None, :, None, None]
    grads = torch.autograd.grad((out.double() * weights).sum(), (q, k, v))
    return [out, *(g[:, :, :length] for g in grads)]
