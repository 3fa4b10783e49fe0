"""The quick pass of LoRA layers beside PEFT's own: outputs, gradients, dropout, and what it leaves to PEFT."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from train.lora import quicken


def small(dropout: float = 0.0, **more: object) -> torch.nn.Module:
    """Two linear layers with LoRA whose B is not zero."""
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 16, bias=False))
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=["0", "2"], **more)
    model = get_peft_model(inner, config, autocast_adapter_dtype=False)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    return model


def learned(model: torch.nn.Module, inputs: torch.Tensor, seed: int = 1) -> list[torch.Tensor]:
    """The output and all gradients, the input's first."""
    given = inputs.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(given)
    out.square().sum().backward()
    assert given.grad is not None
    return [out.detach(), given.grad, *(w.grad for w in model.parameters() if w.requires_grad and w.grad is not None)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_quick_pass_learns_what_pefts_does(dropout: float) -> None:
    plain = small(dropout).train()
    quick = copy.deepcopy(plain)
    assert quicken(quick) == 2
    inputs = torch.randn(3, 7, 24)
    for mode in (True, False):
        pair = zip(learned(plain.train(mode), inputs), learned(quick.train(mode), inputs), strict=True)
        for one, other in pair:
            assert (one - other).abs().max() <= 2e-6 * one.abs().max()


def test_what_is_frozen_gets_no_gradient_and_no_grad_is_kept_without_need() -> None:
    model = small()
    quicken(model)
    model(torch.randn(5, 24)).sum().backward()
    assert all((weight.grad is not None) == weight.requires_grad for weight in model.parameters())
    with torch.no_grad():
        assert not model(torch.randn(5, 24)).requires_grad


def test_switched_off_merged_and_unfit_layers_are_pefts() -> None:
    model, inputs = small(), torch.randn(5, 24)
    before = copy.deepcopy(model)
    quicken(model)
    with model.disable_adapter(), before.disable_adapter():
        assert torch.equal(model(inputs), before(inputs))
    model.merge_adapter()
    assert (model(inputs) - before(inputs)).abs().max() < 1e-4
    model.unmerge_adapter()
    assert quicken(small().bfloat16()) == 0
    assert quicken(small(use_dora=True)) == 0
    assert quicken(small(lora_bias=True)) == 0
    unfrozen = small()
    for weight in unfrozen.parameters():
        weight.requires_grad_(True)
    assert quicken(unfrozen) == 0
