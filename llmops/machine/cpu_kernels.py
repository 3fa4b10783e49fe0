"""Which kernel multiplies float32 matrices on this CPU: torch's default, or oneDNN's where it is as exact and faster.

torch hands float32 products to MKL, which uses AVX-512 on Intel's processors alone. oneDNN, which is built into torch,
uses it everywhere, and takes over linear, matmul, addmm and bmm, forward and backward, when it is allowed to compute
in bfloat16. Where the processor has no unit for that (AMX), it computes in float32 all the same, at twice the default's
rate on a Zen 5. Where it has one, it rounds. So nothing is assumed of a processor: a few products are multiplied at the
start, compared with the same products in float64, and timed.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from llmops.console import log

if TYPE_CHECKING:
    import torch

SETTINGS = ("auto", "default")
HELP = "float32 products on a CPU: auto takes oneDNN's where they are as exact as torch's and faster; default: torch's"
DEFAULT, ONEDNN = "default", "oneDNN"
ROWS, WIDTH = 256, 768  # of the products that are tried
TIMES, SECONDS = 5, 0.02  # each at most; the fastest counts
KEPT_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"  # one for each size of a product, 1 MB; 1,024 unless it is told
EXACT = 1e-5  # of the largest value; float32 sums differ by 1e-6, TF32 by 3e-4, bfloat16 by 3e-3


class Process:
    """What this process was told: one of SETTINGS. The kernel is a process's, and so is the setting."""

    setting = "auto"


def settle(setting: str) -> None:
    """Tell this process its setting, before anything is chosen."""
    Process.setting = setting


def settled() -> str:
    """The setting of this process."""
    return Process.setting


@dataclass(frozen=True)
class Kernel:
    """What a kernel does with the products of a linear layer: forward, towards its input, towards its weights.

    `error` is the largest difference from float64, in parts of the largest value; `rate` is in FLOP/s.
    """

    error: float
    rate: float


def allow(kernel: str) -> None:
    """Let `kernel` (DEFAULT or ONEDNN) multiply from here on, in this process."""
    import torch

    backend: Any = torch.backends.mkldnn
    backend.matmul.fp32_precision = "bf16" if kernel == ONEDNN else "none"


@contextmanager
def small_products() -> Iterator[None]:
    """Products by torch's default within the block, whatever multiplies outside: those of a head, not of a layer.

    oneDNN prepares every product anew. torch's fused attention multiplies tiles of few rows by thousands: with oneDNN
    a step of 16 answers spends 20 times as long in it.
    """
    import torch

    backend: Any = torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    if before == "none":
        yield
        return
    allow(DEFAULT)
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before


def try_kernel(multiply: "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]") -> Kernel:
    """Error and rate of `multiply`, which is given [m, k] and [k, n] in the layouts of a linear layer's products."""
    import torch

    draw = torch.Generator().manual_seed(0)
    inputs, gradient = (torch.randn(ROWS, WIDTH, generator=draw) for _ in range(2))
    weight = torch.randn(WIDTH, WIDTH, generator=draw)
    errors, seconds = [], 0.0
    with torch.inference_mode():
        for left, right in ((inputs, weight.t()), (gradient, weight), (gradient.t(), inputs)):
            exact = left.double() @ right.double()
            found = multiply(left, right).double()
            errors.append(float((found - exact).abs().max() / exact.abs().max()))
            times: list[float] = []
            while len(times) < TIMES and sum(times) < SECONDS:
                start = time.perf_counter()
                multiply(left, right)
                times.append(time.perf_counter() - start)
            seconds += min(times)
    return Kernel(max(errors), 3 * 2 * ROWS * WIDTH * WIDTH / seconds)


def better(default: Kernel, other: Kernel) -> bool:
    """Whether `other` is to be taken: its error is a float32 sum's (NaN is none), and it is faster."""
    return other.error <= EXACT and other.rate > default.rate


@cache
def probe() -> tuple[Kernel, Kernel] | None:
    """(the default, oneDNN) as they do on this machine with torch's threads as they are; None: torch has no oneDNN."""
    import torch

    backend: Any = torch.backends.mkldnn
    if not backend.is_available() or not backend.enabled:
        return None
    os.environ.setdefault(KEPT_KERNELS, "256")
    before = backend.matmul.fp32_precision
    try:
        found = []
        for kernel in (DEFAULT, ONEDNN):
            allow(kernel)
            found.append(try_kernel(torch.matmul))
    finally:
        backend.matmul.fp32_precision = before
    return found[0], found[1]


def choose(device: "torch.device", dtype: "torch.dtype", earlier: str = "") -> str:
    """The kernel for a model of `dtype` on `device`: DEFAULT or ONEDNN; one line on stderr says why.

    `earlier` is what the same work had when it was begun, which is kept unless it is not exact here. Nothing is tried,
    and nothing said, where there is no choice.
    """
    import torch

    if DEFAULT in (settled(), earlier) or device.type != "cpu" or dtype != torch.float32:
        return DEFAULT
    kernels = probe()
    if kernels is None:
        return DEFAULT
    default, other = kernels
    taken = other.error <= EXACT if earlier else better(default, other)
    name = "oneDNN" if taken else "torch's default"
    log(
        f"matrix products by {name}: oneDNN does {other.rate / 1e9:,.0f} GFLOP/s "
        f"and torch's default {default.rate / 1e9:,.0f}, with errors of {other.error:.0e} and {default.error:.0e} of "
        "the largest value"
    )
    return ONEDNN if taken else DEFAULT


def use(device: "torch.device", dtype: "torch.dtype") -> None:
    """Let the kernel for a model of `dtype` on `device` multiply, where it multiplies float32 on the CPU at all."""
    import torch

    if device.type == "cpu" and dtype == torch.float32:
        allow(choose(device, dtype))
