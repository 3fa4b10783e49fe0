"""check_checkpoint.sh: a table with a verdict per row, and an exit code."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, environment


def check(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script to its end."""
    return subprocess.run(
        ["bash", str(ROOT / "tests" / "check_checkpoint.sh"), str(folder), *arguments], env=environment(),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of a native class."""
    from make_native_checkpoints import make_checkpoint

    folder = tmp_path_factory.mktemp("native") / "qwen3"
    make_checkpoint("qwen3", folder)
    return folder


def test_a_native_checkpoint_passes(native: Path) -> None:
    done = check(native, "--no_training")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    *lines, summary = done.stdout.splitlines()
    assert summary == "16 of 16 rows ok"
    assert len(lines) == 16
    assert all("| ok   |" in line for line in lines)
    assert any("none, a native class" in line for line in lines)


def test_a_broken_checkpoint_fails_in_its_row(native: Path) -> None:
    config = json.loads((native / "config.json").read_text())
    (native / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    done = check(native, "--no_training")
    assert done.returncode == 1
    assert "| FAIL | AssertionError: eos is 2, in config.json 7 |" in done.stdout
    assert sum("| ok   |" in line for line in done.stdout.splitlines()) > 10


def test_what_fails_every_row_is_one_sentence(native: Path) -> None:
    done = check(native, "--no_training", "--mode", "glm3")
    assert done.returncode == 2
    assert "--mode glm3 is for model_type chatglm, the checkpoint is 'qwen3'; pass --mode auto" in done.stderr
    assert not done.stdout


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    done = check(tmp_path)
    assert done.returncode == 2
    assert "has no config.json" in done.stderr
    assert not done.stdout
