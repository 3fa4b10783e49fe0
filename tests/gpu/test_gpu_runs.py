"""Whole runs on a GPU: LoRA and full under every ZeRO stage in bf16 and fp16, resume, merge, memory that runs out."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import read_log, train_losses
from safetensors import safe_open

from llmops.generation.generator import Generator
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from train import checkpointing

Run = Callable[..., subprocess.CompletedProcess[str]]
KINDS = {"bf16": "BF16", "fp16": "F16"}


@pytest.fixture(scope="session", name="checkpoints")
def _checkpoints(wide_checkpoints: dict[str, Path]) -> dict[str, Path]:
    """Instead of the narrow ones, also for `train_run`."""
    return wide_checkpoints


@pytest.mark.parametrize("train_type", ["lora", "all"])
@pytest.mark.parametrize("zero_stage", ["2", "3", "3_offload"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_way_to_train(train_run: Run, small_data: Path, train_type: str, zero_stage: str, dtype: str) -> None:
    if dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")
    if zero_stage == "3_offload" and shutil.which("g++") is None:
        pytest.skip("CPUAdam is compiled with g++, which is not here")
    merge = ["--merge_lora", "true"] if train_type == "lora" else []
    done = train_run(
        "--train_type", train_type, "--zero_stage", zero_stage, "--dtype", dtype, "--num_processes", "1",
        "--learning_rate", "1e-3", *merge,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    output = small_data / "output_path"
    results = json.loads((output / "train_results.json").read_text())
    assert results["eval_loss"] < results["eval_loss_before"]
    for line in (output / "log.txt").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    with safe_open(next(output.glob("*.safetensors")), "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {KINDS[dtype]}  # noqa: SIM118
    assert (output / "merged" / "config.json").is_file() == bool(merge)
    chosen = read_log(output)[0]["chosen"]
    assert chosen["micro_batch_tokens"] > 0
    if torch.cuda.get_device_capability() >= (8, 0):
        assert "FlexAttention" in chosen["attention"]


def test_a_resumed_run_reaches_the_same_loss(train_run: Run, tmp_path: Path) -> None:
    flags = ("--num_processes", "1", "--eval_steps", "2", "--num_train_epochs", "2", "--lora_dropout", "0.1")
    outputs = [tmp_path / "alone", tmp_path / "resumed"]
    for output in outputs:
        done = train_run("--output_path", str(output), *flags)
        assert done.returncode == 0, done.stderr[-3000:]
    expected = train_losses(outputs[0])
    newest = checkpointing.list_checkpoints(outputs[1])[-1]
    shutil.rmtree(newest)
    (outputs[1] / "train_results.json").unlink()
    done = train_run("--output_path", str(outputs[1]), *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continuing from" in done.stderr
    found = train_losses(outputs[1])
    assert found[max(found)] == pytest.approx(expected[max(expected)], rel=1e-2)


def test_a_batch_that_does_not_fit_is_halved(gpu: torch.device, taught: Path, capsys: pytest.CaptureFixture) -> None:
    model = ChatModel(Checkpoint(taught)).weights(torch.float32, device=gpu)
    chat = ChatModel(Checkpoint(taught)).chat
    prompts = [chat.prompt([{"role": "user", "content": "图书馆几点开门"}])] * 512
    expected = dict(Generator(model, 0, 4).generate(prompts[:4], 8, chat.stop_ids()))
    total = torch.cuda.get_device_properties(gpu).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**25) / total)
    try:
        generator = Generator(model, 0, 512, reuse_prefix=False)
        found = dict(generator.generate(prompts, 8, chat.stop_ids()))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with" in capsys.readouterr().err
    assert generator.batch_size < 512
    assert all(answer.ids == expected[0].ids for answer in found.values())


def test_training_that_does_not_fit_says_what_to_pass(train_run: Run) -> None:
    done = train_run(
        "--num_processes", "1", PYTORCH_ALLOC_CONF="per_process_memory_fraction:0.0001"
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    assert "out of memory" in done.stderr
    assert "--micro_batch_tokens" in done.stderr


def test_two_processes(train_run: Run, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL takes one process per GPU and torch sees one GPU; two CPU processes are tested elsewhere")
    losses = []
    for count in ("1", "2"):
        output = tmp_path / count
        steps = str(4 // int(count))
        done = train_run(
            "--output_path", str(output), "--num_processes", count, "--per_device_train_batch_size", "2",
            "--gradient_accumulation_steps", steps, "--dtype", "fp32",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append(list(train_losses(output).values()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
