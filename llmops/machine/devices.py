"""What stands between a machine's GPUs and torch: drivers, builds, and how processes are told their GPUs.

A GPU that is there and cannot be used is an error of one sentence: work that takes minutes on it would take days on the
CPU, without a word. `CUDA_VISIBLE_DEVICES=-1` asks for the CPU.
"""

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmops.console import UserError, has_gpu

if TYPE_CHECKING:
    import torch

    from llmops.machine.sharing import Processes

VISIBLE = "CUDA_VISIBLE_DEVICES"
DRIVER_FILE = Path("/proc/driver/nvidia/version")
OLDEST_DRIVER = {"11": "450", "12": "525", "13": "580"}  # by CUDA's major version (its release notes, table 2)
ON_CPU = f"set {VISIBLE}=-1 to work on the CPU"
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# glibc's <malloc.h>: M_TRIM_THRESHOLD (-1: never), M_TOP_PAD and M_MMAP_THRESHOLD (at most an int), in bytes
KEEP_MEMORY = {-1: -1, -2: 1 << 28, -3: (1 << 31) - 1}


def driver_version(path: Path = DRIVER_FILE) -> str:
    """The NVIDIA driver's version as the kernel tells it; empty when it does not."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"Kernel Module\D*?(?:for \S+)?\s+(\d+\.[\d.]+)", text)
    return found[1] if found else ""


def check_gpu() -> None:
    """Raise UserError when a GPU is here that torch cannot use, or torch sees one that this toolkit does not know."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return  # asked for, by chat_main.sh too where CUDA_VISIBLE_DEVICES is -1
    import torch

    usable = torch.cuda.is_available()
    hip, cuda = getattr(torch.version, "hip", None), torch.version.cuda
    if usable == has_gpu() and not (usable and hip):
        return
    if usable and hip:
        raise UserError(
            f"torch {torch.__version__} is built for ROCm {hip} and sees {torch.cuda.get_device_name(0)}; expected an "
            "NVIDIA GPU or none; install torch for CUDA, or set HIP_VISIBLE_DEVICES=-1 to work on the CPU"
        )
    if usable:
        raise UserError(
            f"torch sees {torch.cuda.get_device_name(0)}, but neither /dev/nvidiactl nor /dev/dxg is here; start the "
            f"container with --gpus all, or {ON_CPU}"
        )
    driver = driver_version()
    named = f"an NVIDIA GPU is here, with driver {driver or '(version not told)'}"
    if hip or not cuda:
        build = f"for ROCm {hip}" if hip else "for the CPU"
        raise UserError(f"{named}, but torch {torch.__version__} is built {build}; install it for CUDA, or {ON_CPU}")
    oldest = OLDEST_DRIVER.get(cuda.split(".")[0])
    wants = f", which wants driver {oldest} or newer" if oldest else ""
    raise UserError(
        f"{named}, and torch {torch.__version__} for CUDA {cuda}{wants} cannot use it ({why_not()}); update the "
        f"driver, install torch for an older CUDA, or {ON_CPU}"
    )


def why_not() -> str:
    """What CUDA says about a GPU that cannot be used."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return (str(error).strip().splitlines() or ["no reason told"])[0][:200]
    return "no device is visible"


def choose_device(gpu_id: int, processes: "Processes", name: str = "gpu_id") -> "torch.device":
    """The device of this process: the GPU asked for, one GPU per process when there are several, else the CPU.

    `name`: what the user calls gpu_id. Raises UserError for a GPU that does not exist or cannot be used.
    """
    import torch

    if gpu_id < 0:
        return torch.device("cpu")
    check_gpu()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = processes.local_rank if processes.count > 1 else gpu_id
    count = torch.cuda.device_count()
    if number >= count:
        raise UserError(f"{name} {number} does not exist; this machine shows {count} GPUs, from 0")
    torch.cuda.set_device(number)  # else every process opens a context on GPU 0 as well
    return torch.device("cuda", number)


def choose_dtype(name: str) -> "torch.dtype":
    """bf16 where the device has it, otherwise fp32; or what was asked for."""
    import torch

    if name == "auto":
        real = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if real else "fp32"  # emulated, as on Turing, it is slower than fp32
    if name == "fp16" and not torch.cuda.is_available():
        raise UserError("--dtype fp16 needs a GPU; use --dtype fp32 (or bf16)")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def visible(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES names. Raises UserError for several MIG instances."""
    devices = [name.strip() for name in environ.get(VISIBLE, "").split(",") if name.strip()]
    if len(devices) > 1 and any(name.startswith("MIG") for name in devices):
        raise UserError(f"{VISIBLE} names {len(devices)} MIG instances; CUDA shows a process only one: name one")
    return devices


def of_slots(environ: Mapping[str, str], slots: Sequence[str]) -> list[str]:
    """The GPUs of this machine's slots of a hostfile: where CUDA_VISIBLE_DEVICES is set here, slot 0 is its first.

    So a scheduler's GPUs, or those that other people left, stay the ones that are used. Raises UserError for a slot
    that is not among them.
    """
    devices = visible(environ)
    missing = [slot for slot in slots if devices and int(slot) >= len(devices)]
    if missing:
        raise UserError(
            f"the hostfile has slot {missing[0]} of this machine, from 0, and {VISIBLE} here names {len(devices)} GPUs "
            f"({environ.get(VISIBLE)}); give the machine slots={len(devices)}, or unset the variable"
        )
    return [devices[int(slot)] for slot in slots] if devices else list(slots)


def of_this_process(environ: Mapping[str, str]) -> "torch.device":
    """The device of this process, one of several that share a machine: a GPU of its own, or the CPU.

    Raises UserError where the machine has fewer GPUs than processes.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, count = int(environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= count:
        raise UserError(
            f"process {number + 1} of this machine finds {count} GPUs, and each needs its own; lower --num_processes, "
            f"or the machine's slots in the hostfile to {count}"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def of_processes(environ: Mapping[str, str], processes: int) -> list[str]:
    """The GPUs of this machine that `processes` use (0: one process on each), as CUDA_VISIBLE_DEVICES takes them.

    Raises UserError for more processes than GPUs, and for several MIG instances.
    """
    devices = visible(environ)
    named = f"{VISIBLE} names fewer GPUs ({environ.get(VISIBLE)})"
    if not devices:
        import torch

        devices = [str(number) for number in range(torch.cuda.device_count())]
        named = f"this machine has {len(devices)} GPUs"
    if processes > len(devices):
        raise UserError(f"--num_processes is {processes} and {named}; one process runs on each")
    return devices[: processes or None]


def prepare_process(environ: MutableMapping[str, str]) -> None:
    """Set up a training process's surroundings; must come before torch is imported. What is set already stays.

    The cores are shared among the processes of this machine (DeepSpeed's CPUAdam uses them with a GPU, too), and tools
    beside the interpreter are found: ninja, for DeepSpeed's operators, in an environment that is not active.
    """
    if environ.get("DS_ACCELERATOR") == "cpu":
        environ[VISIBLE] = "-1"  # the launcher numbers the processes in it
    beside = str(Path(sys.executable).parent)
    if shutil.which("ninja", path=environ.get("PATH", "")) is None:
        environ["PATH"] = os.pathsep.join(filter(None, (environ.get("PATH", ""), beside)))
    processes = int(environ.get("LOCAL_SIZE", "1"))
    environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    if not has_gpu():
        environ.setdefault("DS_ACCELERATOR", "cpu")
        return
    environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else up to 32 processes for the one kernel it compiles
    if not any(name in environ for name in ALLOCATOR):
        environ[ALLOCATOR[0]] = "expandable_segments:True"  # rows of many lengths leave fewer gaps in the memory


def tune_cpu() -> None:
    """What tune_cpu in llmops/environment.sh does, for a command that Python was given; before torch is imported.

    Freed memory stays with the process: an evaluation has 35 times fewer page faults, and takes 0.7 of the CPU time.
    What the environment has already stays.
    """
    if has_gpu():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ.update(OMP_WAIT_POLICY="active", GOMP_SPINCOUNT="1000")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt and not any(name.startswith("MALLOC_") for name in os.environ):
        for option, value in KEEP_MEMORY.items():
            mallopt(option, value)
