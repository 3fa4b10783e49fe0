"""What every part of bench/gpu.sh needs: the device, seconds and memory on it, a row of what was found."""

import gc
import json
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmops import json_text
from llmops.console import RunStopped, UserError, log

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "train" / "demo_data"
# dense bf16 FLOP/s as NVIDIA's data sheets give them
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}

FAULTS = (
    RuntimeError, ValueError, OSError, AssertionError, subprocess.SubprocessError, UserError, RunStopped,
)  # fmt: skip


class Bench:
    """What every part needs: where to work, how small, and how to say a row."""

    def __init__(self, work: Path, small: bool, out: Any) -> None:
        import torch

        self.work, self.small, self.out, self.failures = work, small, out, 0
        self.gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.gpu else "cpu")
        self.dtype = torch.bfloat16 if self.gpu else torch.float32

    def row(self, **values: Any) -> None:
        """Print one row at once, so that what is done stays when the part ends early."""
        numbers = {k: json_text.finite(v) if isinstance(v, float) else v for k, v in values.items()}
        self.out.write(json.dumps(numbers) + "\n")
        self.out.flush()
        log("  " + ", ".join(f"{key} {value}" for key, value in values.items()))

    def each(self, what: str, work: Callable[[], dict[str, Any]]) -> None:
        """One row; a fault of torch's, the system's or ours is the row's text, and the next row comes.

        It makes the part fail in the end, unless memory was what ran out.
        """
        import torch

        try:
            self.row(what=what, **work())
        except FAULTS as error:
            self.failures += not isinstance(error, torch.OutOfMemoryError)
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.row(what=what, failed=f"{type(error).__name__}: {text[:200]}")
        gc.collect()  # a model and its optimizer refer to each other; a traceback holds what failed
        if self.gpu:
            torch.cuda.empty_cache()

    def seconds(self, work: Callable[[], Any], rounds: int = 10) -> float:
        """Mean seconds of a piece of work after three to warm up."""
        for _ in range(3):
            work()
        self.wait()
        started = time.perf_counter()
        for _ in range(rounds):
            work()
        self.wait()
        return (time.perf_counter() - started) / rounds

    def wait(self) -> None:
        """Until the GPU is done."""
        if self.gpu:
            import torch

            torch.cuda.synchronize()

    def peak_flops(self) -> float:
        """FLOP/s of the device: the data sheet's, else those of a large product."""
        import torch

        if self.gpu:
            name = torch.cuda.get_device_name(0)
            known = next((flops for part, flops in PEAKS.items() if all(w in name for w in part.split())), None)
            if known:
                return known
        size = 8192 if self.gpu else 512
        a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * size**3 / self.seconds(lambda: a @ b)

    def memory_gib(self, start: bool = False) -> float:
        """Peak memory in GiB since `start`: the allocator's, on a CPU the process's."""
        import torch

        if start and self.gpu:
            torch.cuda.reset_peak_memory_stats()
        if self.gpu:
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
