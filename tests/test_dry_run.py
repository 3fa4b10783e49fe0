"""The dry run's estimates: for the processes that the launcher would start, and beside what a real run takes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, FAST, ROOT, environment, read_messages, write_jsonl

from llmops.models import tiny
from train import attention, dry_run, estimates, session
from train.config import Config
from train.course import Course
from train.dry_run import Processes, Rates, Sample
from train.session import Data
from train.steps import Split

PEAK = (  # of the largest process below a command, in KiB
    "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)
CPU = torch.device("cpu")
ALIKE = [{"role": "user", "content": "你好 one two three"}, {"role": "assistant", "content": "four five six"}]


@pytest.fixture
def config(tmp_path: Path, checkpoints: dict[str, Path]) -> Config:
    """A run of 8 equal conversations."""
    data = write_jsonl(tmp_path / "data" / "train.jsonl", [ALIKE] * 8)
    return Config(
        model_name_or_path=str(checkpoints["llama"]), output_path=str(tmp_path / "out"), train_file=str(data),
        test_file=str(data), retention_file=str(data), per_device_train_batch_size=1, gradient_accumulation_steps=1,
        train_type="all", packing=False,
    )  # fmt: skip


@pytest.fixture
def data(config: Config) -> Data:
    """Its data."""
    return session.prepare_data(config, encodes=True)


def told(config: Config, data: Data, processes: Processes, on_gpu: bool, capsys: pytest.CaptureFixture) -> list[float]:
    """[training, evaluation] in seconds of 10 steps of 8 conversations, at 10 s a token; 100 s in an evaluation.

    A process's whole update takes 1,000 s.
    """
    config = replace(config, per_device_train_batch_size=8 // processes.all, per_device_eval_batch_size=2, max_steps=10)
    model = estimates.empty_model(config, torch.float32, 1)
    collate, _ = session.choose_collator(config, model, data.model.tokenizer, CPU, torch.float32)
    sample = Sample(config, data, Split(8), processes.all, collate)
    rates = Rates(10.0, 100.0, estimates.own_part(config, 1000, processes.all), "a test")
    dry_run.tell_time(config, data, Course(3, 1, 1e-5), sample, rates, processes, on_gpu)
    said = re.search(r"about (\d+):(\d+):(\d+), and (\d+):(\d+):(\d+) for", capsys.readouterr().err)
    assert said
    numbers = [int(number) for number in said.groups()]
    return [numbers[i] * 3600 + numbers[i + 1] * 60 + numbers[i + 2] for i in (0, 3)]


def test_processes_share_a_step_and_its_update(config: Config, data: Data, capsys: pytest.CaptureFixture) -> None:
    length = int(data.train.lengths[0])
    one, two, eight = (told(config, data, Processes(count, count), True, capsys) for count in (1, 2, 8))
    assert one[0] == 10 * (8 * length * 10 + 1000)
    assert two[0] == 10 * (4 * length * 10 + 500)
    assert eight[0] == 10 * (length * 10 + 125)
    rounds = one[1] / (8 * length * 100)  # evaluations, of two sets
    assert two[1] / (4 * length * 100) == eight[1] / (2 * length * 100) == rounds  # in the last 4 processes have none
    without = replace(config, ds_file=str(write_stage(Path(config.output_path).parent, 0)))
    assert told(without, data, Processes(2, 2), True, capsys)[0] == 10 * (4 * length * 10 + 1000)


def write_stage(folder: Path, stage: int) -> Path:
    """A DeepSpeed file."""
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}), encoding="utf-8")
    return path


def test_processes_that_have_nothing_to_do_make_nothing_faster(config: Config, data: Data) -> None:
    """Conversations are not cut: with one in a step, one process computes, and the others repeat it for the count."""
    model = estimates.empty_model(config, torch.float32, 1)
    collate, _ = session.choose_collator(config, model, data.model.tokenizer, CPU, torch.float32)
    sizes = [Sample(replace(config, per_device_train_batch_size=1), data, Split(1), n, collate) for n in (1, 4)]
    assert sizes[0].busiest == sizes[1].busiest == data.train.lengths[0]
    assert sizes[1].per_step == 4 * data.train.lengths[0]


def test_processes_of_a_cpu_share_its_cores(config: Config, data: Data, capsys: pytest.CaptureFixture) -> None:
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    one = told(config, data, Processes(1, 1), False, capsys)
    eight = told(config, data, Processes(8, 8), False, capsys)
    elsewhere = told(config, data, Processes(8, 1), False, capsys)
    crowding = max(1.0, 8 * threads / cores)
    assert eight[0] == pytest.approx(elsewhere[0] * crowding, abs=2)
    assert elsewhere[0] == pytest.approx(one[0] / 8, abs=2)
    assert crowding > 1 or cores >= 8


def test_the_attention_of_the_run_is_timed_and_named(
    config: Config, data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """FlexAttention is chosen on a GPU only, so here it is said to be there: torch computes it without a kernel."""
    packed = replace(config, packing=True, num_train_epochs=1)
    for reason, how in ((None, "FlexAttention"), ("there is no GPU", "in blocks, because there is no GPU")):
        monkeypatch.setattr(attention, "why_no_flex", lambda *_, reason=reason: reason)
        seen: list[Any] = []
        monkeypatch.setattr(dry_run, "learn", lambda model, batch, seen=seen: seen.append(batch["layout"].tiles))
        dry_run.estimate(packed, data)
        said = capsys.readouterr().err
        assert f"packed rows, {'attention ' if reason else ''}{how})" in said
        assert {tiles is None for tiles in seen} == {reason is not None}


def test_a_model_is_padded_for_any_of_its_layers(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Qwen2's first layers see everything; those from max_window_layers on have a window."""
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    folder = tiny.write_checkpoint(tmp_path / "window", ["some text"], "qwen2", 400, hidden=16, layers=2, **window)
    mixed = replace(
        config, packing=True, num_train_epochs=1, model_name_or_path=str(folder), output_path=str(tmp_path / "mixed")
    )
    dry_run.estimate(mixed, session.prepare_data(mixed, encodes=True))
    said = capsys.readouterr().err
    assert "padded batches of similar lengths; packing is off: it has layers of the kinds sliding_attention)" in said


def test_a_full_runs_memory_is_near_its_estimate(tmp_path: Path) -> None:
    """Of every weight under ZeRO 2: states, activations and all libraries, as the kernel counts them at the peak."""
    conversations = read_messages(DEMO / "train.jsonl")[:16]
    texts = [message["content"] for messages in conversations for message in messages]
    model = tiny.write_checkpoint(tmp_path / "model", texts, "llama", 600, hidden=640, layers=4, heads=10)
    data = write_jsonl(tmp_path / "data" / "train.jsonl", conversations)
    held = write_jsonl(tmp_path / "data" / "test.jsonl", read_messages(DEMO / "test.jsonl")[:4])
    flags = [
        "--model_name_or_path", str(model), "--train_file", str(data), "--test_file", str(held), "--train_type", "all",
        "--retention_file", str(held), "--output_path", str(tmp_path / "out"), *FAST, "--max_steps", "1",
        "--cpu_kernels", "default",
    ]  # fmt: skip
    dry, real = (
        subprocess.run(
            [sys.executable, "-c", PEAK, "bash", str(ROOT / "chat_main.sh"), *flags, "--dry_run", asked],
            env=environment(), capture_output=True, text=True, check=False,
        )
        for asked in ("true", "false")
    )  # fmt: skip
    assert (dry.returncode, real.returncode) == (0, 0), dry.stderr[-2000:] + real.stderr[-2000:]
    said = re.search(r"micro-batches of [\d,]+ tokens: ([\d.]+) GiB\n.*, framework ([\d.]+) GiB", dry.stderr)
    assert said
    estimated, framework = map(float, said.groups())
    peak = int(real.stdout.splitlines()[-1]) / 2**20
    assert estimated - framework > 0.4  # else this shows little
    assert 0.8 <= estimated / peak <= 1.25, (estimated, framework, peak)
