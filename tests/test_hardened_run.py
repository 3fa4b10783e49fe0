"""One run of two processes that SIGTERM ends: what it listens on, what it saves, what the next start makes of harm."""

import ipaddress
import json
import os
import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import DEMO, FAST, ROOT, environment, read_messages, write_jsonl
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum

from llmops.console import RunStopped
from llmops.machine.process_group import free_port
from train import checkpointing, states
from train.config import Config
from train.faults import explain_end, explain_faults, explain_shared_memory
from train.steps import Split


class Hostile:
    """Pickles as a call of os.system that makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


def addresses(process: psutil.Process) -> set[tuple[str, int]]:
    """(address, port) of everything that a process and those below it listen on."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        try:
            connections = one.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        found |= {tuple(item.laddr) for item in connections if item.status == psutil.CONN_LISTEN}
    return found


def command(mount: Path, model: Path, *more: str) -> list[str]:
    """A run of two processes that saves at every second step and would not end by itself soon."""
    return [
        "bash", str(ROOT / "chat_main.sh"), "--mount_path", str(mount), "--model_name_or_path", str(model), *FAST,
        "--num_processes", "2", "--num_train_epochs", "100", "--eval_steps", "2", "--save_total_limit", "3", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def interrupted(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]
) -> tuple[Path, set[tuple[str, int]], int]:
    """(output_path of a run that was ended by SIGTERM, what it listened on, TensorBoard's port)."""
    mount, port = tmp_path_factory.mktemp("mnt"), free_port()
    write_jsonl(mount / "datasets" / "train.jsonl", read_messages(DEMO / "train.jsonl")[:24])
    write_jsonl(mount / "datasets" / "test.jsonl", read_messages(DEMO / "test.jsonl")[:2])
    output = mount / "output_path"
    arguments = command(mount, checkpoints["llama"], "--tensorboard", "true", "--tensorboard_port", str(port))
    process = subprocess.Popen(
        arguments, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    found: set[tuple[str, int]] = set()
    end = time.monotonic() + 120
    while len(checkpointing.list_checkpoints(output)) < 3 or port not in {number for _, number in found}:
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        assert time.monotonic() < end, found
        found |= addresses(psutil.Process(process.pid))
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # to the launcher alone, as `docker stop` does
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert checkpointing.damage(checkpointing.list_checkpoints(output)[-1]) is None
    return output, found, port


def test_a_run_listens_on_loopback_alone(interrupted: tuple[Path, set[tuple[str, int]], int]) -> None:
    """torch's store, gloo and TensorBoard, with nothing set by the user."""
    _, found, port = interrupted
    assert len(found) >= 4  # the store, gloo in both processes, TensorBoard
    assert ("127.0.0.1", port) in found
    assert [address for address, _ in found if not ipaddress.ip_address(address).is_loopback] == []


def make_hostile(checkpoint: Path, name: str, mark: Path) -> None:
    """Put a call into a state that is otherwise as it was, and mend the manifest: whoever can write there can do so."""
    path = checkpoint / name
    whole: Any = torch.load(path, weights_only=False)  # our own file
    torch.save({**whole, "hostile": Hostile(mark)}, path)
    manifest = json.loads((checkpoint / checkpointing.MANIFEST).read_text())
    manifest["files"][name] = checkpointing.fingerprint(path)
    (checkpoint / checkpointing.MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.load as a library's caller has it, so that the test can read what it changes."""
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")


def test_no_state_runs_code(
    interrupted: tuple[Path, set[tuple[str, int]], int], tmp_path: Path, trusting: None
) -> None:
    """Every pickle that a resume loads, one after the other; also without the variable that holds torch to it."""
    newest = checkpointing.list_checkpoints(interrupted[0])[-1]
    assert states.problem(newest) is None
    names = [path.relative_to(newest) for pattern in states.PATTERNS for path in newest.glob(pattern)]
    assert len(names) == 6  # scheduler, two generators, weights, two optimizers
    for name in map(str, names):
        copy = shutil.copytree(newest, tmp_path / newest.name)
        make_hostile(copy, name, tmp_path / "mark")
        assert checkpointing.damage(copy) is None
        assert f"{name} asks for posix.system" in (states.problem(copy) or "")
        shutil.rmtree(copy)
    assert not (tmp_path / "mark").exists()


def test_a_resume_passes_damaged_and_hostile_checkpoints_over(
    interrupted: tuple[Path, set[tuple[str, int]], int],
    checkpoints: dict[str, Path],
    tmp_path: Path,
    trusting: None,
) -> None:
    output, mark = interrupted[0], tmp_path / "mark"
    whole, cut, hostile = checkpointing.list_checkpoints(output)[-3:]
    victim = next(cut.glob("global_step*/*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-100])
    for path in hostile.glob("global_step*/*optim_states.pt"):
        make_hostile(hostile, str(path.relative_to(hostile)), mark)
    end = checkpointing.step_of(whole) + 1
    settings = json.loads((output / "finetune_config.json").read_text())
    (output / "finetune_config.json").write_text(json.dumps(settings | {"max_steps": end}))
    done = subprocess.run(
        command(output.parent, checkpoints["llama"], "--max_steps", str(end)), env=environment(),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{hostile} is damaged" in done.stderr
    assert "asks for posix.system" in done.stderr
    assert f"{cut} is damaged ({victim.relative_to(cut)} was changed or cut)" in done.stderr
    assert f"continuing from {whole}" in done.stderr
    assert not mark.exists()


def test_deepspeed_states_of_fp16_load(tmp_path: Path) -> None:
    """The loss scaling that fp16 keeps; it cannot be trained without a GPU."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(2**16, 2, 1000, 1, 2, False, dtype=torch.float16)
    torch.save({"loss_scaler": scaler}, tmp_path / "state.pt")
    with states.loadable():
        found = torch.load(tmp_path / "state.pt", weights_only=True)["loss_scaler"]
    assert vars(found) == vars(scaler)


@pytest.mark.parametrize(
    ("error", "phrase"),
    [
        (
            pickle.UnpicklingError("GLOBAL posix.system was not an allowed global"),
            "a state of the checkpoint asks for posix",
        ),
        (
            ValueError("that mismatch TrainingArguments values:\n- ds optimizer.params.lr=1 vs hf learning_rate=2"),
            "lr=1 vs hf",
        ),
    ],
)
def test_faults_of_states_and_deepspeed_files_are_sentences(error: Exception, phrase: str) -> None:
    with pytest.raises(RunStopped, match=phrase), explain_faults(Config(), Split()):
        raise error


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",  # as of pinned memory, when states go to the machine's
        "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
    ],
)
def test_memory_that_runs_out_is_a_sentence_whoever_finds_it(text: str) -> None:
    with pytest.raises(RunStopped, match=r"^out of memory at .* pass --micro_batch_tokens"):  # noqa: SIM117
        with explain_faults(Config(), Split(0, 4096)):
            raise RuntimeError(text)
    with pytest.raises(RunStopped, match=r"^out of memory while the result is written"), explain_end(Config()):
        raise RuntimeError(text)


def test_shared_memory_that_is_too_small_is_no_full_disk() -> None:
    """What NCCL says in a container that was started without --shm-size."""
    text = (
        "NCCL error in: NCCLUtils.cpp:77, unhandled system error, NCCL version 2.27.5\nLast error:\nError while "
        "creating shared memory segment /dev/shm/nccl-2Xb1vS (size 33030528), error: No space left on device"
    )
    with pytest.raises(RunStopped, match=r"shared memory /dev/shm is too small with \d+ MiB; .* --shm-size 64gb"):  # noqa: SIM117
        with explain_shared_memory(), explain_faults(Config(), Split()):
            raise RuntimeError(text)
    with pytest.raises(RuntimeError, match=r"^another$"), explain_shared_memory():
        raise RuntimeError("another")


def test_what_deepspeed_itself_refuses_is_a_sentence() -> None:
    refused = pytest.raises(RunStopped, match=r"DeepSpeed refuses .*reduce_scatter")
    with refused, explain_faults(Config(), Split()):
        DeepSpeedZeroConfig(reduce_scatter="maybe")


def test_gradients_that_do_not_fit_into_fp16_are_a_sentence() -> None:
    """DeepSpeed's own scaler, at the smallest scale from the start."""
    scaler = DynamicLossScaler(1, scale_window=10, min_scale=1, delayed_shift=1, consecutive_hysteresis=False)
    advice = r"fp16, .*--dtype bf16 .*--learning_rate"
    with pytest.raises(RunStopped, match=advice), explain_faults(Config(), Split()):
        scaler.update_scale(True)
    with pytest.raises(Exception, match=r"^something else$"), explain_faults(Config(), Split()):
        raise Exception("something else")


class OldEnumPickle:
    """A member of an Enum as Python 3.11.2 (Debian 12) pickles it, or any other attribute of anything."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[type, str]]:
        return getattr, (self.kind, self.name)


def test_stages_load_as_every_python_writes_them(tmp_path: Path, trusting: None) -> None:
    path = tmp_path / "state.pt"
    torch.save({"stage": OldEnumPickle(ZeroStageEnum, "gradients")}, path)
    with states.loadable():
        assert torch.load(path, weights_only=True)["stage"] is ZeroStageEnum.gradients
    for kind, name in ((ZeroStageEnum, "__class__"), (ZeroStageEnum, "mro"), (torch.Tensor, "numpy")):
        torch.save({"stage": OldEnumPickle(kind, name)}, path)
        with states.loadable(), pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True)
