"""What a run chooses by itself: from the memory that is free, from what was asked, from what an earlier start chose."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmops.generation.capacity import base_of
from llmops.models import chat_model, tiny
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from train import choices, deepspeed_file, estimates, session
from train.choices import Choices, Room, resolve
from train.config import Config
from train.course import USUAL
from train.steps import Split
from train.training_log import TokenCounter, TrainingLog

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Lengths:
    """A data set as far as choices look at it: 100 conversations of 100 to 1,000 tokens, half of them learned."""

    lengths = np.linspace(100, 1000, 100).astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {"learned": np.arange(self.lengths[i]) % 2 == 0}


@pytest.fixture
def config(tmp_path: Path, checkpoints: dict[str, Path]) -> Config:
    """A run of the tiny Llama."""
    return Config(model_name_or_path=str(checkpoints["llama"]), output_path=str(tmp_path), cpu_kernels="default")


def seven_billion(train_type: str) -> estimates.Shape:
    """A 7B model in bf16, with what LoRA keeps of its layers."""
    trained = 40_000_000 if train_type == "lora" else 6_738_000_000
    return estimates.Shape(6_738_000_000, trained, 4096, 32, 32000, 2, 35 * 4096, 16 * 4096)


@pytest.mark.parametrize(
    ("train_type", "gib", "recompute", "tokens"),
    [
        # a token keeps 4.86 MB, with one layer in four recomputed 3.8, in two 2.7, with all 0.54; LoRA: 13.2 GiB beside
        ("lora", 75, 0, 13600), ("lora", 40, 0, 5900), ("lora", 31, 4, 5050), ("lora", 26, 2, 5100),
        ("lora", 22, 1, 16384), ("all", 75, 1, 1000), ("all", 300, 0, 16384),
    ],
)  # fmt: skip
def test_as_few_layers_are_recomputed_as_fit(
    config: Config, train_type: str, gib: float, recompute: int, tokens: int
) -> None:
    config = replace(config, train_type=train_type, per_device_train_batch_size=32)
    room = Room(config, seven_billion(train_type), Lengths(), 1, gib * 2**30, True)
    best = room.best(None)
    assert best.recompute == recompute
    assert best.split.tokens == pytest.approx(tokens, rel=0.05)
    if train_type == "lora":
        parts = estimates.memory_parts(
            config, seven_billion("lora"), 1, best.split.tokens, best.split.tokens // 2, recompute, True
        )
        assert sum(parts.values()) <= gib * 2**30
    assert room.best(1).recompute == 1
    assert best.split.tokens >= Lengths.lengths.max()


def of_memory(*given: Any) -> Choices:
    """What `resolve` chooses, but for the course."""
    return replace(resolve(*given), course=USUAL)


def test_what_was_asked_and_what_was_chosen_before(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "free_memory", lambda _: 2.0**33)
    assert of_memory(config, torch.float32, Lengths(), CPU, 1) == Choices(0, Split(4, 2048))
    monkeypatch.setattr(choices, "free_memory", lambda _: 1.0)
    assert of_memory(config, torch.float32, Lengths(), CPU, 1) == Choices(1, Split(4, 2048))
    asked = replace(config, gradient_checkpointing="3", micro_batch_tokens=700)
    assert of_memory(asked, torch.float32, Lengths(), CPU, 1) == Choices(3, Split(0, 700))
    monkeypatch.setattr(choices, "free_memory", lambda _: 2.0**36)
    on_gpu = of_memory(config, torch.bfloat16, Lengths(), GPU, 1)
    assert on_gpu.recompute == 0
    assert on_gpu.split == Split(0, int(np.sort(Lengths.lengths)[-16:].sum()))  # a whole step, as it fits
    record = Choices(2, Split(0, 5000)).to_json()
    (Path(config.output_path) / "finetune_config.json").write_text(json.dumps({"resolved": record}))
    assert of_memory(config, torch.bfloat16, Lengths(), GPU, 1) == Choices(2, Split(0, 5000))
    assert of_memory(replace(config, gradient_checkpointing="true"), torch.float32, Lengths(), GPU, 1).recompute == 1
    anew = replace(config, overwrite_output_path=True)
    assert of_memory(anew, torch.bfloat16, Lengths(), GPU, 1) == on_gpu


def test_what_the_fullest_gpu_has_left_decides(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what is left on the first, where the choice is made."""
    monkeypatch.setattr(choices, "free_memory", lambda _: 2.0**36)
    assert of_memory(config, torch.float32, Lengths(), CPU, 2, 1.0) == Choices(1, Split(4, 2048))
    assert of_memory(config, torch.float32, Lengths(), CPU, 2) == Choices(0, Split(4, 2048))


def test_tied_weights_count_once_and_lora_has_the_models_dtype(tmp_path: Path, config: Config) -> None:
    texts = ["some text to make a tokenizer of, and some more"]
    folder = tiny.write_checkpoint(tmp_path / "tied", texts, "llama", 400, hidden=32, tie_word_embeddings=True)
    model = ChatModel(Checkpoint(folder)).weights(torch.bfloat16)
    config = replace(config, model_name_or_path=str(folder))
    shape = estimates.model_shape(replace(config, train_type="all"), torch.bfloat16)
    assert shape.weights == shape.trained == sum(p.numel() for p in model.parameters())
    adapted = estimates.add_lora(config, model)
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16}
    with_lora = estimates.model_shape(config, torch.bfloat16)
    assert with_lora.trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert with_lora.per_layer > shape.per_layer  # the adapter's own activations
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(tmp_path / "adapter")
    again = ChatModel(Checkpoint(tmp_path / "adapter")).load(torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    merged = chat_model.merged(again)
    assert sum(p.numel() for p in merged.parameters()) == shape.weights


def test_loading_onto_a_device_gives_the_same_weights(checkpoints: dict[str, Path]) -> None:
    """device_map as it is used for a GPU, onto the one device that is here."""
    from transformers import AutoModelForCausalLM

    plain = ChatModel(Checkpoint(checkpoints["qwen2"])).weights(torch.float32)
    placed = AutoModelForCausalLM.from_pretrained(checkpoints["qwen2"], dtype=torch.float32, device_map={"": CPU})
    for (name, a), (other, b) in zip(plain.named_parameters(), placed.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)


def test_log_lines_are_strict_json_after_an_overflow(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    log = TrainingLog(tmp_path, True, True, TokenCounter(), Choices(0, Split(4)).to_json())
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    state = TrainerState(global_step=0, max_steps=2)
    log.on_train_begin(arguments, state, TrainerControl())
    log.bar.close()
    state.global_step = 1
    log.on_log(arguments, state, TrainerControl(), {"loss": 2.5, "grad_norm": float("inf"), "learning_rate": 1e-4})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines[0]["chosen"] == {
        "num_train_epochs": 3, "epochs_between_evaluations": 1, "learning_rate": 1e-4,
        "gradient_checkpointing": 0, "micro_batch_rows": 4, "micro_batch_tokens": 0, "cpu_kernels": "default",
    }  # fmt: skip
    assert lines[1]["grad_norm"] is None
    assert lines[1]["not_finite"] == {"grad_norm": "inf"}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_model_of_two_layers_is_estimated_with_three(checkpoints: dict[str, Path], architecture: str) -> None:
    """The time of a layer is the difference of two depths, and a small model may have fewer than the larger one."""
    config = Config(model_name_or_path=str(checkpoints[architecture]))
    model = estimates.empty_model(config, torch.float32, layers=3)
    assert model.config.num_hidden_layers == 3
    assert len(getattr(model.config, "layer_types", None) or [0, 0, 0]) == 3


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "2"), ({"stage": 3}, "3"), ({}, "0"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "3_offload"),
        ({"stage": 3, "offload_param": {"device": "none"}}, "3"),
    ],
)  # fmt: skip
def test_the_stage_of_a_file_of_ones_own_is_reckoned_with(
    checkpoints: dict[str, Path], tmp_path: Path, zero: dict[str, Any], expected: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    own = Config(model_name_or_path=str(checkpoints["llama"]), train_type="all", ds_file=str(path))
    named = replace(own, ds_file="", zero_stage=expected)
    assert deepspeed_file.stage(own) == expected == deepspeed_file.stage(named)
    shape = estimates.model_shape(own, torch.float32)
    assert estimates.state_parts(own, shape, 4) == estimates.state_parts(named, shape, 4)


def test_what_zero_3_gathers_needs_memory_too(config: Config) -> None:
    """At the turn from forward to backward pass the last half billion weights are whole, or all of a smaller model."""
    small, large = (replace(seven_billion("all"), weights=count) for count in (100_000_000, 6_738_000_000))
    third, away = (replace(config, train_type="all", zero_stage=stage) for stage in ("3", "3_offload"))

    def parts(given: Config, shape: estimates.Shape, processes: int, on_gpu: bool) -> dict[str, float]:
        return estimates.memory_parts(given, shape, processes, 0, 0, 0, on_gpu)

    assert "gathered weights" not in parts(config, large, 8, True)
    assert "gathered weights" not in parts(third, large, 1, True)  # each is whole where it lies
    assert parts(third, large, 8, True)["gathered weights"] == 1e9
    assert parts(third, small, 8, True)["gathered weights"] == 2e8
    assert sum(parts(away, large, 1, True).values()) == 1e9
    assert sum(parts(away, large, 1, False).values()) == sum(parts(third, large, 1, False).values())
    rooms = [Room(away, large, Lengths(), 1, 125 * 2**30, on_gpu) for on_gpu in (True, False)]  # type: ignore[arg-type]
    assert rooms[0].tokens(0) > 0
    assert rooms[1].tokens(0) == 0  # states of 125.5 GiB


def test_the_dry_run_pads_where_the_run_does(checkpoints: dict[str, Path]) -> None:
    """A sliding window takes no packed rows."""
    config = Config(model_name_or_path=str(checkpoints["llama"]))
    model = estimates.empty_model(config, torch.float32, 1)
    assert session.why_padded(config, base_of(model)) is None
    assert session.why_padded(replace(config, packing=False), base_of(model)) == "that was asked for"
    assert "NEFTune" in (session.why_padded(replace(config, neftune_noise_alpha=5.0), base_of(model)) or "")
    base_of(model).config.sliding_window = 64
    assert "sliding window" in (session.why_padded(config, base_of(model)) or "")
