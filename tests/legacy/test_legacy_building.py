"""Configuration, building and loading of old checkpoints: each symptom there without its patch, gone with it.

`tests/check_checkpoint.sh` runs the same and more on the vendors' real code.
"""

from pathlib import Path

import pytest
import torch

from legacy.styles import CAUSAL, Make, close, direct, load, logits_of, prompt
from llmops.console import UserError
from llmops.legacy import patches


def test_names_that_the_library_expects(make: Make) -> None:
    folder = make("rotary", without="names_of_today_missing")
    with pytest.raises(AttributeError, match="use_cache"):
        logits_of(load(folder), prompt("rotary"))
    model = load(make("rotary"))
    assert model.config.num_hidden_layers == 2
    assert logits_of(model, prompt("rotary")).isfinite().all()


def test_settings_wrapped_in_a_tuple(make: Make) -> None:
    """(False,) is true: gradient checkpointing would be on whatever was asked for."""
    assert load(make("alibi", without="settings_wrapped_in_a_tuple")).model.gradient_checkpointing
    model = load(make("alibi"))
    assert model.model.gradient_checkpointing is False
    assert model.config.gradient_checkpointing is False


@pytest.mark.parametrize("style", ["rotary", "prefix"])
def test_a_model_without_post_init_loads(make: Make, style: str) -> None:
    with pytest.raises(UserError, match=r"AttributeError.*all_tied_weights_keys"):
        load(make(style, without="post_init_never_called"))
    assert load(make(style)).all_tied_weights_keys is not None


def test_max_length_is_there_while_building_only(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"AttributeError.*max_length"):
        load(make("rotary", without="max_length_read_while_building"))
    model = load(make("rotary"))
    assert model.max_sequence_length == 512
    model.save_pretrained(tmp_path / "saved")  # refused with a lasting max_length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("style", CAUSAL)
def test_every_weight_has_the_dtype_asked_for(make: Make, style: str, dtype: torch.dtype) -> None:
    model = load(make(style), dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits_of(model, prompt(style)).isfinite().all()


def test_half_precision_in_the_code_is_recast(make: Make) -> None:
    names = patches.auto_map(folder := make("prefix", without="half_precision_hard_coded"))
    patches.prepare_model(folder)
    kind = patches.load_class(names["AutoModel"], folder)
    config = patches.load_class(names["AutoConfig"], folder).from_pretrained(str(folder))
    assert kind(config).dtype == torch.float16
    patches.prepare_model(folder := make("prefix"))
    assert patches.load_class(names["AutoModel"], folder)(config).dtype == torch.float32


@pytest.mark.parametrize("style", CAUSAL)
def test_logits_and_loss_equal_the_module_built_directly(make: Make, style: str) -> None:
    folder = make(style)
    ids = prompt(style, 40)
    expected = direct(folder)(input_ids=torch.tensor([ids]), labels=torch.tensor([ids]), use_cache=False)
    found = load(folder)(input_ids=torch.tensor([ids]), labels=torch.tensor([ids]))
    assert close(found.logits, expected.logits)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)


@pytest.mark.parametrize("style", ["rotary", "prefix"])
def test_weight_files_without_inv_freq(make: Make, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not loaded starts as garbage; empty memory is made visibly so."""
    expected = logits_of(load(make(style)), prompt(style))
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(7.0))
    broken = logits_of(load(make(style, without="buffers_left_uninitialised", lacking="inv_freq")), prompt(style))
    assert not close(broken, expected)
    assert close(logits_of(load(make(style, lacking="inv_freq")), prompt(style)), expected)


def test_buffers_that_are_never_saved(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(7.0))
    assert load(make("rotary", without="buffers_left_uninitialised")).transformer.rotation.sign.tolist() == [7.0, 7.0]
    assert load(make("rotary")).transformer.rotation.sign.tolist() == [-1.0, 1.0]


def test_tables_that_are_no_buffers(make: Make) -> None:
    """Baichuan2-7B's frequencies are an attribute of their module."""

    def attribute(folder: Path) -> Path:
        path = folder / "modeling_rotary.py"
        text = path.read_text(encoding="utf-8").replace("self.sign[1].to(kind)", "1")
        lines = [line for line in text.splitlines() if 'register_buffer("sign"' not in line]
        (place,) = (i for i, line in enumerate(lines) if 'register_buffer("inv_freq", ' in line)
        lines[place] = lines[place].replace('self.register_buffer("inv_freq", ', "self.inv_freq = ")[:-1]
        path.write_text("\n".join(lines), encoding="utf-8")
        return folder

    expected = logits_of(load(make("rotary")), prompt("rotary"))
    left = load(attribute(make("rotary", without="tables_that_are_no_buffers", lacking="inv_freq")))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        logits_of(left, prompt("rotary"))
    assert close(logits_of(load(attribute(make("rotary", lacking="inv_freq"))), prompt("rotary")), expected)


def test_a_file_without_lm_head(make: Make) -> None:
    expected = logits_of(load(make("prefix")), prompt("prefix"))
    with pytest.raises(UserError, match=r"lack 1 of the tensors .* lm_head.weight"):
        load(make("prefix", without="head_no_longer_tied", lacking="lm_head"))
    assert close(logits_of(load(make("prefix", lacking="lm_head")), prompt("prefix")), expected)


def test_skip_init_stays_on_the_meta_device(make: Make) -> None:
    def device(folder: Path) -> str:
        patches.prepare_model(folder)
        names = patches.auto_map(folder)
        config = patches.load_class(names["AutoConfig"], folder).from_pretrained(str(folder))
        with torch.device("meta"):
            model = patches.load_class(names["AutoModelForCausalLM"], folder)(config)
        return model.transformer.embedding.weight.device.type

    assert device(make("rotary", without="weights_built_twice")) == "cpu"
    assert device(make("rotary")) == "meta"


@pytest.mark.parametrize("style", ["rotary", "prefix"])
def test_bf16_positions_beyond_256(make: Make, style: str) -> None:
    """bf16 has 8 bits of mantissa: position 400 is rounded, and so are its angles."""
    ids = prompt(style, 400)
    expected = logits_of(load(make(style)), ids)[-1]

    def error(folder: Path) -> float:
        found = logits_of(load(folder, torch.bfloat16), ids)[-1].float()
        return float((found - expected).norm() / expected.norm())

    assert error(make(style, without="rotary_angles_in_bfloat16")) > 2 * error(make(style))
    assert error(make(style)) < 0.2
