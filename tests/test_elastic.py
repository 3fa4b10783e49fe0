"""A run goes on with another number of processes and another split of its steps: the losses of the undisturbed run."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DEMO, FAST, ROOT, Messages, environment, read_log, read_messages, train_losses, write_jsonl
from deepspeed.ops.adam import DeepSpeedCPUAdam
from safetensors.torch import load_file

from llmops.console import UserError
from llmops.models import tiny
from train import checkpointing, elastic, run_folder, states
from train.choices import Choices, read_record
from train.config import Config
from train.shards import FP32, Shards
from train.steps import Split

TEN = ("--per_device_train_batch_size", "5", "--gradient_accumulation_steps", "2")
STEPS = 6  # of 8 conversations: 2 epochs of 24
# each start: processes, the step in which the machine is taken back (0: never), flags that may change
FOUR_TWO_THREE_ONE = [
    (4, 1, []),
    (2, 2, ["--micro_batch_tokens", "300"]),
    (3, 4, ["--gradient_checkpointing", "true"]),
    (1, 0, ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]),
]
STAGES_TOO = [(4, 1, []), (4, 2, ["--zero_stage", "3"]), (1, 4, []), (2, 0, ["--zero_stage", "3"])]
SUBGROUPS = [(4, 2, []), (3, 0, [])]  # stage 3 as with a large model, whose weights are in several groups by their size
WAYS = [("2", "lora"), ("2", "all"), ("3", "lora"), ("3", "all")]


def run(folder: Path, argv: list[str], world: int, stop: int = 0, killed: bool = False) -> dict[str, Any]:
    """A run for tests/elastic_driver.py; its messages are beside its output folder."""
    argv = [*argv, "--output_path", str(folder)]
    return {"argv": argv, "world": world, "stop": stop, "killed": killed, "log": f"{folder}.err"}


def drive(folder: Path, runs: list[dict[str, Any]], ends: list[list[int]]) -> None:
    """Run these one after the other by tests/elastic_driver.py; `ends`: their processes' exit codes."""
    (folder / "runs.json").write_text(json.dumps(runs))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "elastic_driver.py"), str(folder / "runs.json")], env=environment(),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for (codes, said), expected, one in zip(json.loads(done.stdout), ends, runs, strict=True):
        assert codes == expected, (one, said[-4000:])


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory, conversations: list[Messages]) -> Path:
    """A folder with each way's run of one process that nobody disturbs, and its run that is taken back three times.

    In one way it is also started with steps of another size, and killed while states are cut anew.
    """
    folder = tmp_path_factory.mktemp("elastic")
    texts = [message["content"] for messages in conversations for message in messages]
    model = tiny.write_checkpoint(folder / "model", texts, "llama", vocab_size=900, hidden=32, layers=1, heads=4)
    train = write_jsonl(folder / "train.jsonl", conversations[:24])
    test = write_jsonl(folder / "test.jsonl", read_messages(DEMO / "test.jsonl")[:2])
    common = [
        "--model_name_or_path", str(model), "--train_file", str(train), "--test_file", str(test),
        "--retention_file", str(test), *FAST, "--per_device_train_batch_size", "2", "--cpu_kernels", "default",
        "--save_total_limit", "9",
    ]  # fmt: skip
    runs, ends = [], []
    for stage, kind in WAYS:
        way = [*common, "--zero_stage", stage, "--train_type", kind]
        runs.append(run(folder / f"{stage} {kind}", [*way, "--per_device_train_batch_size", "8"], 1))
        ends.append([0])
        for place, (world, stop, more) in enumerate(FOUR_TWO_THREE_ONE):
            elastic = folder / f"{stage} {kind} elastic"
            if place == 1 and (stage, kind) == ("3", "all"):
                runs += [run(elastic, [*way, *TEN], world), run(elastic, way, world, killed=True)]
                ends += [[2] * world, [-9, *[70] * (world - 1)]]
            runs.append(run(elastic, [*way, *more], world, stop))
            ends.append([143 if stop else 0] * world)
    for world, stop, more in STAGES_TOO:
        way = [*common, "--zero_stage", "2", "--train_type", "all", *more]
        runs.append(run(folder / "stages", way, world, stop))
        ends.append([143 if stop else 0] * world)
    large = json.loads((ROOT / "train" / "ds_zero3.json").read_text())
    large["zero_optimization"]["sub_group_size"] = 600
    (folder / "large.json").write_text(json.dumps(large))
    for world, stop, _ in SUBGROUPS:
        way = [*common, "--ds_file", str(folder / "large.json"), "--train_type", "all"]
        runs.append(run(folder / "subgroups", way, world, stop))
        ends.append([143 if stop else 0] * world)
    drive(folder, runs, ends)
    return folder


@pytest.mark.parametrize(("stage", "kind"), WAYS)
def test_four_two_three_one(driven: Path, stage: str, kind: str) -> None:
    """Taken back in steps 1, 2 and 4, with another split of the steps each time."""
    name = f"{stage} {kind}"
    expected, found = train_losses(driven / name), train_losses(driven / f"{name} elastic")
    assert list(expected) == list(range(1, STEPS + 1))
    assert found == pytest.approx(expected, rel=1e-4)
    results = [json.loads((driven / one / "train_results.json").read_text()) for one in (name, f"{name} elastic")]
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], rel=1e-4)
    told = (driven / f"{name} elastic.err").read_text()
    for step, before, now in ((1, 4, 2), (2, 2, 3), (4, 3, 1)):
        word = f"{before} processes in ZeRO stage {stage} and this start has {now} in stage {stage}"
        assert f"checkpoint-{step} was written by {word}: its optimizer states are cut anew" in told
    assert told.count("the optimizer states are in place") == 3
    assert "the run's steps keep their 8 conversations, now dealt to 3" in told
    chosen = read_log(driven / f"{name} elastic")[0]["chosen"]
    assert (chosen["conversations_per_step"], chosen["processes"]) == (8, 1)


def test_a_kill_and_a_refusal_leave_the_checkpoint_as_it_was(driven: Path) -> None:
    """Two starts from the same checkpoint: one killed while its states were cut anew, one that goes on."""
    told = (driven / "3 all elastic.err").read_text()
    assert told.count("checkpoint-1 was written by 4 processes") == 2
    assert "a step of the run in" in told
    assert "pass 2 and 1 as before" in told
    left = [path.name for path in (driven / "3 all elastic").iterdir() if path.name.startswith(".")]
    assert left == [".lock"]
    assert checkpointing.damage(driven / "3 all elastic" / "checkpoint-1") is None


def test_another_stage_goes_on_too(driven: Path) -> None:
    """ZeRO 2 -> 3 with the same four processes, 3 -> 2 with one, 2 -> 3 with two."""
    assert train_losses(driven / "stages") == pytest.approx(train_losses(driven / "2 all"), rel=1e-4)
    assert (driven / "stages.err").read_text().count("optimizer states are cut anew") == 3


def test_a_large_model_in_several_groups_goes_on(driven: Path) -> None:
    """Other weights are together in a group of 4 processes than in one of 3."""
    with states.loadable():
        folder = driven / "subgroups"
        both = [Shards(folder / f"checkpoint-{step}", world) for step, world in ((2, 4), (STEPS, 3))]
    groups = [[list(shapes) for shapes in shards.model["param_shapes"]] for shards in both]
    assert min(map(len, groups)) > 2
    assert groups[0] != groups[1]
    assert train_losses(driven / "subgroups") == pytest.approx(train_losses(driven / "2 all"), rel=1e-4)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_states_are_read_by_weight(driven: Path, stage: str) -> None:
    """Whole and in pieces: the fp32 copies that four processes wrote are the model that was saved beside them."""
    checkpoint = driven / f"{stage} all elastic" / "checkpoint-1"
    saved = load_file(checkpoint / "model.safetensors")
    with states.loadable():
        shards = Shards(checkpoint, 4)
    assert saved.keys() == shards.pieces.keys()
    for name, weight in saved.items():
        flat = torch.empty(weight.numel())
        for start in range(0, len(flat), 700):
            shards.copy(FP32, name, start, flat[start : start + 700])
        assert torch.equal(flat.view_as(weight), weight)
    with states.loadable(), pytest.raises(UserError, match=r"0 files .* where one should be\); start with 5 again"):
        Shards(checkpoint, 5)


@pytest.mark.parametrize("stage", ["2", "3"])
@pytest.mark.parametrize(("of_cpu", "written", "expected"), [(False, 4, "whole"), (True, 4, "cut"), (False, 2, "cut")])
def test_states_of_another_adam_are_cut_anew(
    driven: Path, monkeypatch: pytest.MonkeyPatch, stage: str, of_cpu: bool, written: int, expected: str
) -> None:
    """--zero_stage 3_offload after 3, as a run that lacks memory is told: no process more or less, and no such step."""
    adam = torch.optim.AdamW([torch.zeros(1)])
    if of_cpu:
        adam = object.__new__(DeepSpeedCPUAdam)  # without its operator, which would be compiled
        adam.opt_id, adam.ds_opt_adam = 0, SimpleNamespace(destroy_adam=lambda _: None)
    engine = SimpleNamespace(
        optimizer=SimpleNamespace(optimizer=adam), zero_optimization=lambda: True,
        zero_optimization_partition_weights=lambda: stage == "3",
    )  # fmt: skip
    checkpoint = str(driven / f"{stage} all elastic" / "checkpoint-1")
    done: list[str] = []
    monkeypatch.setattr(elastic.dist, "get_world_size", lambda: written)
    monkeypatch.setattr(elastic, "cut_anew", lambda *_: done.append("cut"))
    monkeypatch.setattr(elastic.hf_trainer, "deepspeed_load_checkpoint", lambda *_, **__: done.append("whole"))
    with states.loadable(), elastic.loading(checkpoint):
        elastic.hf_trainer.deepspeed_load_checkpoint(engine, checkpoint)
    assert done == [expected]


def shorter_table(state: dict[str, Any]) -> None:
    """One process says that it has less of a weight."""
    next(iter(state["optimizer_state_dict"]["param_slice_mappings"][0].values())).numel -= 1


def shorter_state(state: dict[str, Any]) -> None:
    """One process has less of all weights than it says."""
    groups = state["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    groups[0] = groups[0][:-9].clone()


@pytest.mark.parametrize(
    ("harm", "phrase"), [(shorter_table, "are not the whole of it"), (shorter_state, "shorter than its table says")]
)
def test_states_that_are_not_whole_are_one_sentence(
    driven: Path, tmp_path: Path, harm: Callable[[dict[str, Any]], None], phrase: str
) -> None:
    copy = shutil.copytree(driven / "2 all elastic" / "checkpoint-1", tmp_path / "checkpoint-1")
    victim = next(copy.glob("global_step*/*zero_pp_rank_1_*"))
    with states.loadable():
        state = torch.load(victim, weights_only=True)
        harm(state)
        torch.save(state, victim)
        with pytest.raises(UserError, match=rf"{phrase}.*\); start with 4 again, or begin anew"):
            Shards(copy, 4)


@pytest.fixture
def config(tmp_path: Path, checkpoints: dict[str, Path]) -> Config:
    """A run of steps of 16 conversations that 2 processes began, and its record in output_path."""
    data = write_jsonl(tmp_path / "train.jsonl", read_messages(DEMO / "train.jsonl")[:4])
    config = Config(
        model_name_or_path=str(checkpoints["llama"]), train_file=str(data), test_file=str(data),
        output_path=str(tmp_path / "out"), per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    write_record(config, {"conversations_per_step": 16, "processes": 2, **Choices(0, Split(0, 700)).to_json()})
    return config


def write_record(config: Config, resolved: dict[str, Any]) -> None:
    """finetune_config.json as a run writes it."""
    settings = config.to_json() | {"train_sha256": run_folder.data_digest(config), "resolved": resolved}
    (Path(config.output_path) / "finetune_config.json").write_text(json.dumps(settings))
    (Path(config.output_path) / "run_manifest.json").write_text(json.dumps({"names": ["finetune_config.json"]}))


@pytest.mark.parametrize(
    ("size", "accumulation", "processes", "good"),
    [
        (4, 2, None, True), (4, 2, 1, True), (4, 2, 3, True), (4, 2, 64, True),  # as it began
        (4, 1, None, True), (4, 1, 4, True), (16, 1, 1, True), (1, 1, 16, True),  # together the same step
        (4, 1, 2, False), (4, 1, 3, False), (5, 2, None, False), (5, 2, 1, False), (8, 2, 2, False),
    ],
)  # fmt: skip
def test_a_step_keeps_its_size(config: Config, size: int, accumulation: int, processes: int | None, good: bool) -> None:
    """`processes` is None in --check, before the launcher."""
    now = replace(config, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    if good:
        assert run_folder.earlier_run(now, processes) is None
        assert run_folder.step_size(now, processes or 1) == 16
    else:
        with pytest.raises(UserError, match=r"has 16 conversations.* do not make; pass 4 and 2 as before"):
            run_folder.earlier_run(now, processes)


def test_an_earlier_version_wrote_no_step_size(config: Config) -> None:
    """It follows from the processes of the newest checkpoint; before there is one, the settings may not change."""
    write_record(config, {})
    halved = replace(config, gradient_accumulation_steps=1)
    with pytest.raises(UserError, match="gradient_accumulation_steps was 2, is 1"):
        run_folder.earlier_run(halved, 6)
    staged = Path(config.output_path) / checkpointing.STAGING / "checkpoint-7"
    staged.mkdir(parents=True)
    (staged / "state.pt").write_bytes(b"state")
    checkpointing.publish(staged, Path(config.output_path) / "checkpoint-7", world_size=3)
    names = ["finetune_config.json", "checkpoint-7"]
    (Path(config.output_path) / "run_manifest.json").write_text(json.dumps({"names": names}))
    assert run_folder.step_size(config, 2) == 24
    assert run_folder.earlier_run(halved, 6) is None


def test_choices_are_kept_with_the_same_processes(config: Config) -> None:
    lasting = {"cpu_kernels": "default", "num_train_epochs": 3, "epochs_between_evaluations": 1, "learning_rate": 1e-4}
    assert read_record(config, 2)["micro_batch_tokens"] == 700
    assert read_record(config, 3) == lasting
    assert read_record(replace(config, per_device_train_batch_size=2), 2) == lasting
    assert read_record(replace(config, overwrite_output_path=True), 2) == {}
