"""Whole runs through chat_main.sh: LoRA and full, ZeRO 2 and 3, one or two processes, two nodes, resume and faults."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAST, ROOT, chat_main, environment, read_log, read_messages, train_losses
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_elastic import drive, run

from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from train import checkpointing
from train.batches import PaddedCollator, target_losses
from train.source import Source
from train.token_cache import load_or_encode

Run = Callable[..., subprocess.CompletedProcess[str]]
SAME_STEP = ("--per_device_train_batch_size", "2", "--num_train_epochs", "2")


def eval_loss_of(folder: Path, data: Path, base: Path) -> float:
    """The loss of the saved model, loaded afresh and computed the plain way, on a jsonl file."""
    opened = ChatModel(Checkpoint(folder))
    chat, model = opened.chat, opened.load(torch.float32).eval()
    samples = load_or_encode(Source((data,), base, "auto", 256, False), chat, data.parent / "cache")
    with torch.no_grad():
        return float(target_losses(model, PaddedCollator(0)([samples[i] for i in range(len(samples))])).mean())


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("llama", ["--train_type", "lora", "--zero_stage", "2", "--report_to", "mlflow"]),
        ("qwen2", ["--train_type", "all", "--zero_stage", "3", "--num_processes", "2", "--learning_rate", "1e-3"]),
        ("qwen2", ["--train_type", "lora", "--zero_stage", "3", "--num_processes", "2", "--merge_lora", "true"]),
        (
            "llama",
            ["--train_type", "all", "--zero_stage", "2", "--num_processes", "2", "--learning_rate", "1e-3",
             "--gradient_checkpointing", "true"],
        ),
    ],
)  # fmt: skip
def test_a_run_leaves_what_it_promises(
    train_run: Run, small_data: Path, checkpoints: dict[str, Path], tmp_path: Path, architecture: str,
    arguments: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the one that needs no database
    tracked = f"file:{tmp_path / 'mlruns'}"
    done = train_run(*arguments, architecture=architecture, MLFLOW_ALLOW_FILE_STORE="true", MLFLOW_TRACKING_URI=tracked)
    assert done.returncode == 0, done.stderr[-3000:]
    output = small_data / "output_path"
    assert (output / ("adapter_config.json" if "lora" in arguments else "config.json")).is_file()
    lines = read_log(output)
    evaluations = [line for line in lines if "eval_loss" in line]
    steps = max(line["step"] for line in lines)
    assert evaluations[0]["step"] == 0
    assert len(evaluations) == 3  # before the first step, and at both epochs
    assert all("retention_loss" in line for line in evaluations)
    assert set(train_losses(output)) == set(range(1, steps + 1))
    for line in lines[1:]:
        assert {"step", "epoch", "elapsed", "remaining"} <= line.keys()
        if "loss" in line:
            assert {"learning_rate", "grad_norm", "tokens_per_second"} <= line.keys()
    assert (output / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    assert {"train/loss", "eval/loss"} <= set(events.Tags()["scalars"])
    results = json.loads((output / "train_results.json").read_text())
    assert results["eval_loss"] == min(line["eval_loss"] for line in evaluations[1:]) < results["eval_loss_before"]
    found = eval_loss_of(output, small_data / "datasets" / "test.jsonl", checkpoints[architecture])
    assert found == pytest.approx(results["eval_loss"], rel=1e-4)
    assert json.loads((output / "finetune_config.json").read_text())["train_type"] in arguments
    if "--report_to" in arguments:
        client = MlflowClient(tracked)
        (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        told = {value.step: value.value for value in client.get_metric_history(run.info.run_id, "loss")}
        assert told == pytest.approx(train_losses(output), rel=1e-6)
    if "--merge_lora" in arguments:
        merged = eval_loss_of(output / "merged", small_data / "datasets" / "test.jsonl", checkpoints[architecture])
        assert merged == pytest.approx(found, rel=1e-4)
    again = train_run(*arguments, architecture=architecture)
    assert again.returncode == 0
    assert "this run is finished" in again.stderr
    other = train_run(*arguments, "--seed", "7", architecture=architecture)
    assert other.returncode == 2
    assert "seed was 42, is 7" in other.stderr


def test_processes_accumulation_packing_and_nodes_give_the_same_losses(
    small_data: Path, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    """One process with four micro-batches, two with two, padded instead of packed, two nodes of one process each."""
    data = small_data / "datasets"
    common = [
        "--train_file", str(data / "train.jsonl"), "--test_file", str(data / "test.jsonl"),
        "--model_name_or_path", str(checkpoints["llama"]), *FAST, *SAME_STEP,
    ]  # fmt: skip
    at_once = ["--per_device_train_batch_size", "24", "--gradient_accumulation_steps", "1"]
    runs = [
        run(tmp_path / "one", [*common, "--gradient_accumulation_steps", "4"], 1),
        run(tmp_path / "two", [*common, "--gradient_accumulation_steps", "2"], 2),
        run(tmp_path / "padded", [*common, *at_once, "--packing", "false"], 1),
        run(tmp_path / "packed", [*common, *at_once], 1),
    ]
    drive(tmp_path, runs, [[0] * one["world"] for one in runs])
    expected, two, padded, packed = (
        list(train_losses(tmp_path / name).values()) for name in ("one", "two", "padded", "packed")
    )
    assert len(expected) == 6
    assert two == pytest.approx(expected, rel=1e-4)
    assert padded == pytest.approx(packed, rel=1e-4)

    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node-a slots=1\nnode-b slots=1\n")
    shared = [
        "--mount_path", str(small_data), "--model_name_or_path", str(checkpoints["llama"]), *FAST, *SAME_STEP,
        "--gradient_accumulation_steps", "2", "--output_path", str(tmp_path / "nodes"), "--hostfile", str(hostfile),
        "--no_ssh", "true", "--master_addr", "127.0.0.1", "--master_port", "29611",
    ]  # fmt: skip
    nodes = [
        subprocess.Popen(["bash", str(ROOT / "chat_main.sh"), *shared, "--node_rank", str(rank)], env=environment(),
                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]  # fmt: skip
    errors = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert "progress is on the first node" in errors[1]
    assert list(train_losses(tmp_path / "nodes").values()) == pytest.approx(two, rel=1e-4)


ENDLESS = ("--num_train_epochs", "500", "--eval_steps", "0")  # outlives what the test does beside it
LONG_RUN = (
    "--num_train_epochs",
    "12",
    "--eval_steps",
    "4",
    "--per_device_train_batch_size",
    "4",
    "--replay_ratio",  # two of the four: what is replayed has an order to go on with, too
    "0.5",
    "--lora_dropout",
    "0.1",
)


def start(small_data: Path, model: Path, output: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start a run in its own process group, its messages in a file."""
    arguments = [
        "--mount_path",
        str(small_data),
        "--model_name_or_path",
        str(model),
        "--output_path",
        str(output),
        *FAST,
        *LONG_RUN,
        *more,
    ]
    log = open(output.with_suffix(".err"), "ab")  # noqa: SIM115 - the child keeps it
    return subprocess.Popen(
        ["bash", str(ROOT / "chat_main.sh"), *arguments], env=environment(), stdin=subprocess.DEVNULL,
        stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], timeout: float = 280) -> None:
    """Wait until a condition holds; the process must not end before."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < end
        time.sleep(0.01)


def steps_done(output: Path) -> int:
    """The last step in log.txt."""
    text = (output / "log.txt").read_text() if (output / "log.txt").exists() else ""
    return max((json.loads(line)["step"] for line in text.splitlines() if line.endswith("}")), default=0)


def test_killed_at_any_moment_it_resumes_to_the_same_end(
    small_data: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """SIGKILL to the whole group, in mid-step and in mid-save, again and again; then the loss of the undisturbed run.

    LLMOPS_TEST_KILLS sets how often (3).
    """
    model = checkpoints["llama"]
    undisturbed = start(small_data, model, tmp_path / "undisturbed")
    assert undisturbed.wait(240) == 0
    expected = train_losses(tmp_path / "undisturbed")
    output = tmp_path / "killed"
    rng = random.Random(0)
    kills = int(os.environ.get("LLMOPS_TEST_KILLS", "3"))
    for i in range(kills):
        process = start(small_data, model, output)
        target = (i + 1) * (len(expected) - 6) // kills
        if i % 2:  # while a checkpoint is being written
            staging = output / checkpointing.STAGING
            wait_for(lambda: steps_done(output) >= target and staging.exists() and any(staging.iterdir()), process)  # noqa: B023
            time.sleep(rng.random() * 0.05)
        else:
            wait_for(lambda: steps_done(output) >= target, process)  # noqa: B023
            time.sleep(rng.random() * 0.3)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = start(small_data, model, output)
    assert last.wait(240) == 0, output.with_suffix(".err").read_text()[-3000:]
    assert "continuing from" in output.with_suffix(".err").read_text()
    found = train_losses(output)
    assert found.keys() == expected.keys()
    final = max(expected)
    assert found[final] == pytest.approx(expected[final], rel=1e-3)
    ends = [
        json.loads((folder / "train_results.json").read_text())["eval_loss"]
        for folder in (tmp_path / "undisturbed", output)
    ]
    assert ends[1] == pytest.approx(ends[0], rel=1e-3)


def test_a_stop_file_ends_the_run_in_good_order(small_data: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(small_data, checkpoints["llama"], output)
    wait_for(lambda: steps_done(output) >= 2, process)
    (output / "STOP").touch()
    assert process.wait(120) == 143
    assert checkpointing.newest_whole(output) is not None
    assert not (output / "train_results.json").exists()


def test_a_terminal_that_is_closed_costs_no_step(
    small_data: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """SIGHUP to all, and nobody reads the messages any more: so it is with `| tee` after Ctrl-C, too."""
    output = tmp_path / "out"
    os.mkfifo(output.with_suffix(".err"))
    reader = os.open(output.with_suffix(".err"), os.O_RDONLY | os.O_NONBLOCK)
    process = start(small_data, checkpoints["llama"], output, *ENDLESS)
    wait_for(lambda: steps_done(output) >= 2, process)
    os.close(reader)
    os.killpg(process.pid, signal.SIGHUP)
    try:
        assert process.wait(120) == 129
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert checkpointing.newest_whole(output) is not None


def test_a_launcher_that_dies_takes_the_training_with_it(
    small_data: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start(small_data, checkpoints["llama"], output, *ENDLESS)
    wait_for(lambda: steps_done(output) >= 2, process)
    busy = chat_main(
        "--mount_path",
        str(small_data),
        "--model_name_or_path",
        str(checkpoints["llama"]),
        "--output_path",
        str(output),
        *FAST,
        *LONG_RUN,
        *ENDLESS,
    )
    assert busy.returncode == 2
    assert "another run is writing to" in busy.stderr
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(600):
        with open(output / ".lock") as lock:
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
    else:
        pytest.fail("the training processes outlived their launcher")
    assert checkpointing.newest_whole(output) is not None


@pytest.mark.parametrize(
    ("arguments", "code", "phrase"),
    [
        (
            ["--lora_module_name", "gate_proj,query_key_value"], 2,
            "no layer is called query_key_value; this model's layers are q_proj, k_proj",
        ),
        (["--learning_rate", "1e30", "--train_type", "all", "--max_grad_norm", "0"], 1, "the loss is nan"),
    ],
)  # fmt: skip
def test_faults_are_one_sentence(train_run: Run, arguments: list[str], code: int, phrase: str) -> None:
    done = train_run(*arguments)
    assert phrase in done.stderr, done.stderr[-3000:]
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_dry_run_shows_what_is_learned(train_run: Run, small_data: Path) -> None:
    done = train_run("--dry_run", "true", "--replay_ratio", "0.25")
    assert done.returncode == 0, done.stderr[-2000:]
    first = json.loads((small_data / "datasets" / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])[
        "messages"
    ]
    assert f"⟦{first[-1]['content']}<|im_end|>⟧" in done.stderr
    assert "1 of the 4 conversations of every step are general ones (100 of replay.jsonl" in done.stderr
    few = "warning: 16 optimizer steps will hardly change what the model answers; without --num_train_epochs there are"
    for phrase in ("tokens per conversation", "memory per process", "time: 16 steps of 4", "nothing was trained", few):
        assert phrase in done.stderr
    assert not (small_data / "output_path" / "log.txt").exists()


def test_held_out_part_and_skipped_lines(train_run: Run, small_data: Path, checkpoints: dict[str, Path]) -> None:
    model = checkpoints["llama"]
    (small_data / "datasets" / "test.jsonl").unlink()
    train = small_data / "datasets" / "train.jsonl"
    train.write_bytes(b"{broken\n" + train.read_bytes())
    done = train_run("--skip_bad_lines", "true", "--max_steps", "1", "--eval_ratio", "0.25")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 bad lines skipped" in done.stderr
    results = json.loads((small_data / "output_path" / "train_results.json").read_text())
    assert (results["train_conversations"], results["test_conversations"]) == (18, 6)
    held = read_messages(small_data / "output_path" / "held_out.jsonl")
    assert len(held) == 6
    train.write_bytes(train.read_bytes().partition(b"\n")[2])
    assert all(messages in read_messages(train) for messages in held)
    found = eval_loss_of(small_data / "output_path", small_data / "output_path" / "held_out.jsonl", model)
    assert found == pytest.approx(results["eval_loss"], rel=1e-4)
