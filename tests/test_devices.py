"""What stands between GPUs and torch, as far as it can be seen without a GPU."""

import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment

from eval import analyze_similar_questions_and_intents as similar
from llmops.console import UserError, has_gpu
from llmops.machine import devices
from llmops.machine.sharing import Processes


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs)\n", "570.86.15"),
        ("something else", ""),
    ],
)
def test_the_drivers_version(tmp_path: Path, text: str, version: str) -> None:
    (tmp_path / "version").write_text(text)
    assert devices.driver_version(tmp_path / "version") == version
    assert devices.driver_version(tmp_path / "missing") == ""


@pytest.mark.parametrize(
    ("here", "usable", "cuda", "hip", "phrases"),
    [
        (True, False, "13.0", None, ["driver 535.1", "CUDA 13.0", "driver 580 or newer", "CUDA_VISIBLE_DEVICES=-1"]),
        (True, False, None, None, ["driver 535.1", "built for the CPU", "CUDA_VISIBLE_DEVICES=-1"]),
        (True, False, None, "7.1", ["driver 535.1", "built for ROCm 7.1"]),
        (False, True, None, "7.1", ["built for ROCm 7.1", "sees Radeon", "HIP_VISIBLE_DEVICES=-1"]),
        (False, True, "13.0", None, ["sees Radeon", "/dev/nvidiactl", "--gpus all"]),
        (True, True, "13.0", None, []),
        (False, False, "13.0", None, []),
        (False, False, None, None, []),
    ],
)
def test_a_gpu_that_cannot_be_used_is_an_error(
    monkeypatch: pytest.MonkeyPatch, here: bool, usable: bool, cuda: str | None, hip: str | None, phrases: list[str]
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(devices, "has_gpu", lambda: here)
    monkeypatch.setattr(devices, "driver_version", lambda: "535.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Radeon")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip, raising=False)
    if not phrases:
        devices.check_gpu()
        return
    with pytest.raises(UserError) as error:
        devices.check_gpu()
    for phrase in phrases:
        assert phrase in str(error.value)
    if not usable:
        with pytest.raises(UserError, match="driver 535"):
            devices.choose_device(0, Processes())


def test_a_process_stays_on_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device is set, too: a tensor or a context made without an index would be on GPU 0."""
    current = []
    for module in (devices, similar):
        monkeypatch.setattr(module, "has_gpu", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert devices.choose_device(2, Processes()) == torch.device("cuda", 2)
    assert devices.choose_device(-1, Processes()) == torch.device("cpu")
    for name, value in (("RANK", "7"), ("LOCAL_RANK", "3"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert similar.choose_device(0, Processes()) == "cuda:3"
    assert current == [2, 3]
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="--gpu_id 4 does not exist; this machine shows 4 GPUs"):
        similar.choose_device(0, Processes())


GPU_CHECK = """
import sys
from llmops.console import UserError
from llmops.machine import devices
from train import finetune

def check_gpu():
    raise UserError(f"the driver is too old, DeepSpeed {'is' if 'deepspeed' in sys.modules else 'is not'} here yet")

devices.check_gpu = check_gpu
sys.exit(finetune.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_training_looks_at_the_gpu_before_deepspeed_is_imported(
    small_data: Path, checkpoints: dict[str, Path], dry_run: str
) -> None:
    """deepspeed/__init__.py sets PYTORCH_NVML_BASED_CUDA_CHECK, with which an old driver's GPU counts as usable."""
    done = subprocess.run(
        [
            sys.executable, "-c", GPU_CHECK, "--model_name_or_path", str(checkpoints["llama"]), "--dry_run", dry_run,
            "--train_file", str(small_data / "datasets" / "train.jsonl"), "--output_path", str(small_data / "out"),
        ],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("the driver is too old, DeepSpeed is not here yet\n")


def test_gpus_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices.of_processes({}, 0) == ["0", "1", "2"]
    assert devices.of_processes({}, 2) == ["0", "1"]
    names = "GPU-8932f937-d72c, GPU-aa"
    assert devices.of_processes({"CUDA_VISIBLE_DEVICES": names}, 0) == ["GPU-8932f937-d72c", "GPU-aa"]
    assert devices.of_processes({"CUDA_VISIBLE_DEVICES": "4,7"}, 1) == ["4"]
    assert devices.of_processes({"CUDA_VISIBLE_DEVICES": "MIG-1"}, 0) == ["MIG-1"]
    with pytest.raises(UserError, match="2 MIG instances"):
        devices.of_processes({"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"}, 0)
    with pytest.raises(UserError, match=r"names fewer GPUs \(4,7\)"):
        devices.of_processes({"CUDA_VISIBLE_DEVICES": "4,7"}, 3)
    with pytest.raises(UserError, match="this machine has 3 GPUs; one process runs on each"):
        devices.of_processes({}, 4)


def test_gpus_of_slots() -> None:
    """A hostfile counts what a machine's owner left visible."""
    assert devices.of_slots({}, ["0", "2"]) == ["0", "2"]
    assert devices.of_slots({"CUDA_VISIBLE_DEVICES": "4,5, GPU-aa"}, ["0", "2"]) == ["4", "GPU-aa"]
    with pytest.raises(UserError, match=r"has slot 2 of this machine, from 0, .* names 2 GPUs \(4,5\); .* slots=2, or"):
        devices.of_slots({"CUDA_VISIBLE_DEVICES": "4,5"}, ["1", "2", "3"])
    with pytest.raises(UserError, match="2 MIG instances"):
        devices.of_slots({"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"}, ["0"])


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert devices.of_this_process({"LOCAL_RANK": "3"}) == torch.device("cuda", 3)
    with pytest.raises(UserError, match="process 5 of this machine finds 4 GPUs, and each needs its own"):
        devices.of_this_process({"LOCAL_RANK": "4"})
    assert taken == [3]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.of_this_process({"LOCAL_RANK": "4"}) == torch.device("cpu")


def test_a_process_finds_ninja_and_shares_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    for gpu in (False, True):
        monkeypatch.setattr(devices, "has_gpu", lambda: gpu)  # noqa: B023
        environ = {"PATH": str(tmp_path), "LOCAL_SIZE": "2"}
        devices.prepare_process(environ)
        assert environ["OMP_NUM_THREADS"] == str(max(1, cores // 2))
        assert shutil.which("ninja", path=str(tmp_path)) is None
        assert shutil.which("ninja", path=environ["PATH"]) is not None
        assert environ.get("PYTORCH_ALLOC_CONF") == ("expandable_segments:True" if gpu else None)
        assert environ.get("DS_ACCELERATOR") == (None if gpu else "cpu")
        assert environ.get("TORCHINDUCTOR_COMPILE_THREADS") == ("1" if gpu else None)
    chosen = {
        "PYTORCH_CUDA_ALLOC_CONF": "backend:native", "OMP_NUM_THREADS": "7", "TORCHINDUCTOR_COMPILE_THREADS": "4",
    }  # fmt: skip
    devices.prepare_process(chosen)
    assert chosen["OMP_NUM_THREADS"] == "7"
    assert chosen["TORCHINDUCTOR_COMPILE_THREADS"] == "4"
    assert "PYTORCH_ALLOC_CONF" not in chosen
    on_cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "1"}  # the launcher's number of this process
    devices.prepare_process(on_cpu)
    assert on_cpu["CUDA_VISIBLE_DEVICES"] == "-1"


FAULTS = """
import os, resource
from llmops.machine import devices
if os.environ.pop("TUNED"):
    devices.tune_cpu()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    bytes([1]) * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, os.environ.get("GOMP_SPINCOUNT", ""))
"""


def test_a_command_that_python_was_given_keeps_its_memory() -> None:
    def faults(**variables: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", FAULTS], cwd=ROOT, env=environment() | {"CUDA_VISIBLE_DEVICES": "-1"} | variables,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        count, spins = done.stdout.rstrip("\n").split(" ")
        return int(count), spins

    (plain, _), (tuned, spins) = faults(TUNED=""), faults(TUNED="yes")
    assert tuned < plain / 10
    assert spins == "1000"
    chosen, spins = faults(TUNED="yes", MALLOC_MMAP_THRESHOLD_="65536", OMP_WAIT_POLICY="active")
    assert chosen > plain / 2
    assert spins == ""


def test_the_cpu_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert not has_gpu()


def test_only_real_bf16_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert devices.choose_dtype("auto") == torch.float32


def test_the_process_group_waits_two_hours() -> None:
    from train.session import LONGEST_WAIT

    assert timedelta(hours=2) == LONGEST_WAIT
