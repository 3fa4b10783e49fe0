"""Which kernel multiplies: a trial against float64 and against the clock, kept when a run goes on."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llmops.generation import shared_prefix
from llmops.machine import cpu_kernels, fused_attention
from llmops.machine.cpu_kernels import DEFAULT, EXACT, ONEDNN, Kernel, allow, better, choose, settle, try_kernel, use

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """The process as it was."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before
    settle("auto")


def rounded(bits: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A product of operands with `bits` bits of their significand kept, as units for bfloat16 (8) and TF32 (11) do."""

    def keep(values: torch.Tensor) -> torch.Tensor:
        fraction, exponent = torch.frexp(values)
        return torch.ldexp((fraction * 2**bits).round() / 2**bits, exponent)

    return lambda left, right: keep(left) @ keep(right)


def test_a_kernel_that_rounds_is_refused_however_fast_it_is() -> None:
    exact = try_kernel(torch.matmul)
    assert exact.error < 2e-6
    for bits, least in ((8, 1e-3), (11, 1e-4), (15, EXACT)):
        found = try_kernel(rounded(bits))
        assert found.error > least, bits
        assert not better(exact, Kernel(found.error, exact.rate * 100))
    as_bfloat16 = try_kernel(lambda left, right: (left.bfloat16() @ right.bfloat16()).float())
    assert not better(exact, Kernel(as_bfloat16.error, exact.rate * 100))


def test_an_exact_kernel_is_taken_when_it_is_faster_and_nothing_when_it_is_no_number() -> None:
    default = Kernel(4e-7, 200e9)
    assert better(default, Kernel(9e-7, 201e9))
    assert not better(default, Kernel(9e-7, 199e9))
    assert not better(default, Kernel(float("nan"), 400e9))


def test_the_trial_leaves_the_process_as_it_was_and_says_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    cpu_kernels.probe.cache_clear()
    kernel = choose(CPU, FP32)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    said = capfd.readouterr().err.strip().splitlines()
    kernels = cpu_kernels.probe()
    assert (kernels is None) == (not said)
    if kernels is not None:
        assert len(said) == 1
        assert kernel == (ONEDNN if better(*kernels) else DEFAULT)


def test_nothing_is_tried_where_there_is_no_choice(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(CPU, torch.bfloat16) == DEFAULT
    assert choose(torch.device("cuda"), FP32) == DEFAULT
    assert choose(CPU, FP32, earlier=DEFAULT) == DEFAULT
    settle("default")
    assert choose(CPU, FP32) == DEFAULT
    settle("auto")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    cpu_kernels.probe.cache_clear()
    assert choose(CPU, FP32) == DEFAULT
    assert not capfd.readouterr().err
    cpu_kernels.probe.cache_clear()


@pytest.mark.parametrize(
    ("error", "rate", "earlier", "expected"),
    [
        (9e-7, 100.0, "", DEFAULT),
        (9e-7, 100.0, ONEDNN, ONEDNN),  # a run that goes on keeps its kernel, although it is slower just now
        (3e-3, 900.0, ONEDNN, DEFAULT),  # but not on a machine where it rounds
        (9e-7, 900.0, "", ONEDNN),
        (9e-7, 900.0, DEFAULT, DEFAULT),
    ],
)
def test_what_a_run_began_with_is_kept_where_it_is_exact(
    monkeypatch: pytest.MonkeyPatch, error: float, rate: float, earlier: str, expected: str
) -> None:
    monkeypatch.setattr(cpu_kernels, "probe", lambda: (Kernel(4e-7, 200.0), Kernel(error, rate)))
    assert choose(CPU, FP32, earlier) == expected


def test_a_layer_learns_the_same_with_either() -> None:
    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(384, 256), torch.randn(200, 384, requires_grad=True)
    found = {}
    for kernel in (DEFAULT, ONEDNN):
        allow(kernel)
        inputs.grad = layer.weight.grad = None
        layer(inputs).square().mean().backward()
        assert inputs.grad is not None
        assert layer.weight.grad is not None
        found[kernel] = (inputs.grad, layer.weight.grad)
    if cpu_kernels.probe() is None or cpu_kernels.probe()[1].error > EXACT:
        pytest.skip("oneDNN rounds on this processor, and is not taken")
    for one, other in zip(found[DEFAULT], found[ONEDNN], strict=True):
        assert (one - other).abs().max() < 1e-5 * one.abs().max()


def test_a_model_elsewhere_or_of_another_type_changes_nothing_for_the_one_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "probe", lambda: (Kernel(4e-7, 200.0), Kernel(9e-7, 400.0)))
    use(CPU, FP32)
    allowed = torch.backends.mkldnn.matmul.fp32_precision
    use(torch.device("cuda"), FP32)
    use(CPU, torch.bfloat16)
    assert torch.backends.mkldnn.matmul.fp32_precision == allowed == "bf16"


def test_attention_multiplies_small_tiles_by_torchs_default_and_layers_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    sdpa = fused_attention.sdpa_attention_forward

    def watched(*given: Any, **named: Any) -> Any:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return sdpa(*given, **named)

    monkeypatch.setattr(fused_attention, "sdpa_attention_forward", watched)
    query, key, value = torch.randn(3, 2, 4, 1, 8)
    for kernel, setting in ((ONEDNN, "bf16"), (DEFAULT, "none")):
        allow(kernel)
        shared_prefix.attention(torch.nn.Module(), query, key, value, None)
        assert torch.backends.mkldnn.matmul.fp32_precision == setting
    assert seen == ["none", "none"]


def test_a_block_of_small_products_that_fails_leaves_the_kernel_as_it_was() -> None:
    allow(ONEDNN)
    with pytest.raises(ZeroDivisionError), cpu_kernels.small_products():
        _ = 1 // 0
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
