"""The parts of bench/gpu_parts.py in order of value, each in a process of its own: a part that fails is a row.

Writes gpu-DEVICE.json and gpu-DEVICE.md into the output folder after every part, and prints the table.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from llmops import files
from llmops.console import UserError, log, run_main
from llmops.machine import devices

RESULTS = HERE / "results"


@dataclass(frozen=True)
class Part:
    """A part: its name, what it shows, and the seconds that it may take at most on a GPU and with --tiny."""

    name: str
    shows: str
    seconds: int
    tiny_seconds: int = 60


PARTS = (
    Part("numerics", "attention and cross entropy against float64", 120),
    Part("runs", "LoRA and full, ZeRO 2 and 3, bf16 and fp16; resume, merge, strict log", 420, 150),
    Part("bare_path", "training without nvcc, ninja and gcc on PATH", 120, 60),
    Part("speed_lora_7b", "LoRA, 7B shape: default, recomputing, micro-batches", 420),
    Part("peer_lora_7b", "the same batch with transformers and PEFT alone", 180),
    Part("inference", "answers with the adapter merged and not; out of memory", 180),
    Part("speed_full_7b", "every weight, 7B width with fewer layers", 240),
    Part("speed_lora_13b", "LoRA, 13B shape", 240),
    Part("kernels", "one kernel at a time", 120),
)


def device_name() -> str:
    """The GPU, or the processor."""
    import torch

    devices.check_gpu()
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU {platform.machine()}"


def run_part(part: Part, tiny: bool, work: Path, limit: float) -> dict[str, Any]:
    """The rows of one part, or why there are none."""
    command = [
        sys.executable,
        str(HERE / "gpu_parts.py"),
        part.name,
        "--work",
        str(work),
        *(["--tiny"] if tiny else []),
    ]
    started, out = time.monotonic(), work / f"{part.name}.rows"
    failed = {}
    with open(out, "w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, start_new_session=True)
        try:
            code = process.wait(limit)
            failed = {"failed": f"exit code {code}; see its rows, or its messages above"} if code else {}
        except subprocess.TimeoutExpired:
            failed = {"failed": f"not done after {limit:.0f} s"}
        finally:
            if process.poll() is None:  # with what it started: a training below it would keep the GPU
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = out.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return failed | {"rows": rows, "seconds": round(time.monotonic() - started, 1)}


def limit_of(part: Part, later: Sequence[Part], left: float, tiny: bool) -> float:
    """The seconds that a part may take: its own, less where `left` seconds are too few for it and the later ones.

    What a part leaves goes to the later ones.
    """
    own, rest = (sum(one.tiny_seconds * 3 if tiny else one.seconds for one in some) for some in ([part], later))
    return own * min(1.0, max(0.0, left) / (own + rest))


def ratio(parts: dict[str, Any]) -> float | None:
    """Tokens per second of our default over the best of transformers and PEFT alone; None until both are known."""
    ours, theirs = (
        [row["tokens_per_second"] for row in parts.get(name, {}).get("rows", []) if "tokens_per_second" in row]
        for name in ("speed_lora_7b", "peer_lora_7b")
    )
    return ours[0] / max(theirs) if ours and theirs else None


def table(report: dict[str, Any]) -> str:
    """The report for people, in Markdown."""
    import torch

    lines = [f"# {report['device']}", "", f"torch {torch.__version__}, {report['python']}, {report['date']}", ""]
    if report.get("ratio_to_transformers_and_peft"):
        times = report["ratio_to_transformers_and_peft"]
        lines += [f"LoRA by default: {times:.2f} times the tokens per second of transformers and PEFT alone.", ""]
    for name, part in report["parts"].items():
        lines += [f"## {name}: {part['shows']}", ""]
        if part.get("failed"):
            lines += [f"failed: {part['failed']}", ""]
        columns = list(dict.fromkeys(key for row in part["rows"] for key in row))
        if columns:
            lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(shown(row.get(key)) for key in columns)} |" for row in part["rows"]] + [""]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value in a cell."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def main(argv: list[str] | None = None) -> int:
    """Run the parts that there is time for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=25, help="of the whole; parts that no time is left for say so")
    parser.add_argument("--parts", default="", help=f"some of {','.join(part.name for part in PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="everything at its smallest, also on a CPU")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "gpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    wanted = args.parts.split(",") if args.parts else [part.name for part in PARTS]
    unknown = set(wanted) - {part.name for part in PARTS}
    if unknown:
        raise UserError(f"--parts: there is no {', '.join(sorted(unknown))}; {', '.join(p.name for p in PARTS)} exist")
    name = device_name()
    if name.startswith("CPU") and not args.tiny:
        raise UserError("there is no GPU here; --tiny runs everything at its smallest on the CPU")
    args.work.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.minutes * 60
    report: dict[str, Any] = {
        "device": name + (", --tiny" if args.tiny else ""), "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"), "parts": {},
    }  # fmt: skip
    stem = "gpu-" + re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    parts = [part for part in PARTS if part.name in wanted]
    for number, part in enumerate(parts):
        limit = limit_of(part, parts[number + 1 :], end - time.monotonic(), args.tiny)
        log(f"{part.name}: {part.shows} (at most {limit:.0f} s)")
        done = run_part(part, args.tiny, args.work, limit) if limit > 10 else {"failed": "no time was left", "rows": []}
        report["parts"][part.name] = {"shows": part.shows} | done
        report["ratio_to_transformers_and_peft"] = ratio(report["parts"])
        files.write_json(args.output / f"{stem}.json", report)
        files.write_text(args.output / f"{stem}.md", table(report) + "\n")
    sys.stdout.write(table(report) + "\n")
    return 1 if any(part.get("failed") for part in report["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
