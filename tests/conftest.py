"""Fixtures: tiny checkpoints made once per session, conversations, and a way to run chat_main.sh as a user does."""

import hashlib
import json
import os
import shutil
import signal
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
os.environ["LLMOPS_LANG"] = "en"  # the tests read English sentences, whatever the developer's language is
SIDE_BY_SIDE = "PYTEST_XDIST_WORKER" in os.environ
if SIDE_BY_SIDE:  # each test on a core of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")
for ignored in (signal.SIGHUP, signal.SIGINT):  # after nohup or &: still nothing here, but what is started heeds it
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, lambda *_: None)
LONGEST = (  # start first
    "test_cluster.py", "test_finetune.py", "test_demo.py", "test_guides.py", "test_faq.py", "test_fuzz.py",
    "test_pretrained.py", "test_job_run.py", "test_bench_gpu.py",
)  # fmt: skip
MODULES_CACHE = tempfile.TemporaryDirectory(prefix="llmops-modules.")  # code of test checkpoints is not kept
os.environ["HF_MODULES_CACHE"] = MODULES_CACHE.name
VECTORS_CACHE = tempfile.TemporaryDirectory(prefix="llmops-cache.")  # nor are their vectors
os.environ["XDG_CACHE_HOME"] = VECTORS_CACHE.name

from llmops.models import tiny

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


def write_checkpoints(folder: Path, conversations: list[Messages], hidden: int) -> dict[str, Path]:
    """A tiny checkpoint per architecture: 2 layers, 4 heads that share the width."""
    texts = [message["content"] for messages in conversations for message in messages]
    return {
        name: tiny.write_checkpoint(folder / name, texts, name, vocab_size=900, hidden=hidden, layers=2, heads=4)
        for name in tiny.ARCHITECTURES
    }


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, conversations: list[Messages]) -> dict[str, Path]:
    """Checkpoints of width 32, with heads of 8."""
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"), conversations, hidden=32)


@pytest.fixture(scope="session")
def wide_checkpoints(tmp_path_factory: pytest.TempPathFactory, conversations: list[Messages]) -> dict[str, Path]:
    """Checkpoints with heads of 32: on a GPU FlexAttention takes none below 16."""
    return write_checkpoints(tmp_path_factory.mktemp("wide_checkpoints"), conversations, hidden=128)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """An adapter with FAQ intents on the tiny Llama."""
    from serve_adapter import write_adapter

    return write_adapter(checkpoints["llama"], tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def small_data(tmp_path: Path, conversations: list[Messages]) -> Path:
    """A mount folder with 24 training and 8 test conversations."""
    datasets = tmp_path / "mnt" / "datasets"
    write_jsonl(datasets / "train.jsonl", conversations[:24])
    write_jsonl(datasets / "test.jsonl", read_messages(DEMO / "test.jsonl")[:8])
    return tmp_path / "mnt"


def copy_project(folder: Path) -> None:
    """The files that git knows, as they stand here."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def tree_hash(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, but for lock files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def environment() -> dict[str, str]:
    """The environment of a user's shell: none of our settings, the Python of this test run first."""
    names = ("HOME", "LANG", "LLMOPS_LANG", "TMPDIR", "LD_LIBRARY_PATH", *(["OMP_NUM_THREADS"] if SIDE_BY_SIDE else []))
    keep = {k: v for k, v in os.environ.items() if k in names}
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


@pytest.fixture(scope="session")
def taught_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions with answers of different lengths, Chinese and English."""
    pairs = {
        "图书馆几点开门": "早上八点", "Where is the station?": "Behind the old town hall.", "一年有几个月": "12",
        "水的化学式": "H2O", "谁写了静夜思": "唐代诗人李白", "苹果用英文怎么说": "apple",
        "最大的海洋": "太平洋", "借书要带什么": "请带上身份证和借书证。",
    }  # fmt: skip
    conversations = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs.items()]
    return write_jsonl(tmp_path_factory.mktemp("taught_data") / "taught.jsonl", conversations)


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory, taught_data: Path) -> Path:
    """A tiny model that was taught the answers of `taught_data`."""
    return teach(tmp_path_factory.mktemp("taught"), read_messages(taught_data), steps=60)


def teach(folder: Path, conversations: Sequence[Messages], steps: int, hidden: int = 64, vocabulary: int = 600) -> Path:
    """Train a tiny Llama from scratch to give the last answer of every conversation; the checkpoint folder."""
    import torch

    from llmops.models.chat_model import ChatModel
    from llmops.models.checkpoints import Checkpoint

    texts = [message["content"] for messages in conversations for message in messages]
    tiny.write_checkpoint(folder, texts, vocab_size=vocabulary, hidden=hidden, layers=2, heads=4)
    opened = ChatModel(Checkpoint(folder))
    chat, model = opened.chat, opened.weights(torch.float32)
    rendered = [chat.conversation(messages)[-1] for messages in conversations]
    width = max(len(sample.ids) for sample in rendered)
    ids = torch.tensor([sample.ids + [0] * (width - len(sample.ids)) for sample in rendered])
    learned = torch.tensor([sample.learned + [False] * (width - len(sample.ids)) for sample in rendered])
    labels = torch.where(learned, ids, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    draw = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, (step + 1) / 10) * (1 - step / steps)
        rows = torch.randperm(len(ids), generator=draw)[:16]
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; tests/gpu is marked, and skipped with its reason where torch sees no GPU."""
    places = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
    mine = [item for item in items if ROOT / "tests" / "gpu" in item.path.parents]
    if not mine:
        return
    import torch

    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none"))


@pytest.fixture
def gpu() -> Any:
    """The first GPU."""
    import torch

    return torch.device("cuda", 0)
