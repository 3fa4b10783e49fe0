"""Parts of bench/gpu.sh: `python bench/gpu_parts.py PART... --work FOLDER [--tiny]`; prints a JSON object per row."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from gpu_bench import Bench
from gpu_kernels import kernels, numerics
from gpu_peer import peer_lora_7b
from gpu_runs import bare_path, runs
from gpu_speed import inference, speed_full_7b, speed_lora_7b, speed_lora_13b

from llmops.console import stdout_to_stderr
from llmops.machine import devices

PARTS: dict[str, Callable[[Bench], None]] = {
    "numerics": numerics, "runs": runs, "bare_path": bare_path, "speed_lora_7b": speed_lora_7b,
    "peer_lora_7b": peer_lora_7b, "speed_full_7b": speed_full_7b, "speed_lora_13b": speed_lora_13b,
    "kernels": kernels, "inference": inference,
}  # fmt: skip


def main() -> int:
    """Run the parts; 1 when a row failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", choices=PARTS, nargs="+", metavar="PART")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    devices.prepare_process(os.environ)
    args.work.mkdir(parents=True, exist_ok=True)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with stdout_to_stderr():
        bench = Bench(args.work, args.tiny, out)
        for name in args.parts:
            PARTS[name](bench)
    out.close()
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
