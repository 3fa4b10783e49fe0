"""Fixtures: tiny checkpoints made once per session, conversations, and a way to run chat_main.sh as a user does."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
MODULES_CACHE = tempfile.TemporaryDirectory(prefix="llmops-modules.")  # code of test checkpoints is not kept
os.environ["HF_MODULES_CACHE"] = MODULES_CACHE.name

from llmops import tiny

SHARED = ROOT.parent / "shared" / "data"
DEMO = ROOT / "train" / "demo_data"
Messages = list[dict[str, str]]


def read_messages(path: Path) -> list[Messages]:
    """The conversations of a jsonl file."""
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, conversations: Sequence[Messages]) -> Path:
    """Write conversations as a jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"messages": m}, ensure_ascii=False) + "\n" for m in conversations), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def conversations() -> list[Messages]:
    """The demo's training conversations: single turn, two turns, with system messages."""
    return read_messages(DEMO / "train.jsonl")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, conversations: list[Messages]) -> dict[str, Path]:
    """A tiny checkpoint per architecture: 2 layers, width 32."""
    folder = tmp_path_factory.mktemp("checkpoints")
    texts = [message["content"] for messages in conversations for message in messages]
    return {
        name: tiny.write_checkpoint(folder / name, texts, name, vocab_size=900, hidden=32, layers=2, heads=4)
        for name in tiny.ARCHITECTURES
    }


@pytest.fixture
def small_data(tmp_path: Path, conversations: list[Messages]) -> Path:
    """A mount folder with 24 training and 8 test conversations."""
    datasets = tmp_path / "mnt" / "datasets"
    write_jsonl(datasets / "train.jsonl", conversations[:24])
    write_jsonl(datasets / "test.jsonl", read_messages(DEMO / "test.jsonl")[:8])
    return tmp_path / "mnt"


def environment() -> dict[str, str]:
    """The environment of a user's shell: none of our settings, the Python of this test run first."""
    keep = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")}
    return keep | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


def chat_main(*arguments: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `bash chat_main.sh` to its end."""
    return subprocess.run(
        ["bash", str(ROOT / "chat_main.sh"), *arguments], env=environment() | variables, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


FAST = (
    "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--num_train_epochs", "2",
    "--max_seq_len", "256", "--lora_dropout", "0", "--gradient_checkpointing", "false", "--tensorboard", "false",
    "--learning_rate", "5e-3",
)  # fmt: skip


@pytest.fixture
def train_run(small_data: Path, checkpoints: dict[str, Path]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Train a tiny model through chat_main.sh; flags override the quick settings."""

    def run(*arguments: str, architecture: str = "llama", **variables: Any) -> subprocess.CompletedProcess[str]:
        model = str(checkpoints[architecture])
        return chat_main("--mount_path", str(small_data), "--model_name_or_path", model, *FAST, *arguments, **variables)

    return run


def read_log(output: Path) -> list[dict[str, Any]]:
    """log.txt as a list of objects."""
    return [json.loads(line) for line in (output / "log.txt").read_text(encoding="utf-8").splitlines()]


def train_losses(output: Path) -> dict[int, float]:
    """Training loss by step."""
    return {line["step"]: line["loss"] for line in read_log(output) if "loss" in line}
