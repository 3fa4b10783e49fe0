"""A run goes on with another number of processes and another split of its steps: the losses of the undisturbed run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO, FAST, ROOT, environment, read_messages, train_losses, write_jsonl

WAYS = [("2", "lora"), ("2", "all"), ("3", "lora"), ("3", "all")]
# processes, the step in which the machine is taken back, and flags that may change: 12 steps of 8 conversations
LEGS = [
    (4, 2, []),
    (2, 5, ["--micro_batch_tokens", "300"]),
    (3, 8, []),
    (1, 0, ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]),
]


@pytest.fixture
def arguments(tmp_path: Path, checkpoints: dict[str, Path]) -> list[str]:
    """12 steps on the tiny Llama, as 4 processes would make 8 conversations of them."""
    train = write_jsonl(tmp_path / "train.jsonl", read_messages(DEMO / "train.jsonl")[:24])
    test = write_jsonl(tmp_path / "test.jsonl", read_messages(DEMO / "test.jsonl")[:2])
    return [
        "--model_name_or_path", str(checkpoints["llama"]), "--train_file", str(train), "--test_file", str(test),
        "--retention_file", str(test), *FAST, "--per_device_train_batch_size", "2", "--num_train_epochs", "4",
    ]  # fmt: skip


def drive(folder: Path, runs: list[dict]) -> list[list[int]]:
    """The exit codes of the processes of every run."""
    (folder / "runs.json").write_text(json.dumps(runs))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "elastic_driver.py"), str(folder / "runs.json")], env=environment(),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_four_two_three_one(tmp_path: Path, arguments: list[str]) -> None:
    runs = []
    for stage, kind in WAYS:
        name = f"{stage}-{kind}"
        common = [*arguments, "--zero_stage", stage, "--train_type", kind]
        runs.append({"argv": [*common, "--output_path", str(tmp_path / name)], "world": 4, "stop": 0,
                     "log": str(tmp_path / f"{name}.err")})  # fmt: skip
        for world, stop, more in LEGS:
            argv = [*common, "--output_path", str(tmp_path / f"{name}-elastic"), *more]
            runs.append({"argv": argv, "world": world, "stop": stop, "log": str(tmp_path / f"{name}-elastic.err")})
    codes = drive(tmp_path, runs)
    for place, (stage, kind) in enumerate(WAYS):
        name = f"{stage}-{kind}"
        told = (tmp_path / f"{name}-elastic.err").read_text()
        assert codes[5 * place : 5 * place + 5] == [[0] * 4, [143] * 4, [143] * 2, [143] * 3, [0]], told[-3000:]
        expected, found = train_losses(tmp_path / name), train_losses(tmp_path / f"{name}-elastic")
        print(name, json.dumps({"expected": expected, "found": found}))
        assert list(expected) == list(range(1, 13))
        assert found == pytest.approx(expected, rel=1e-4)
