"""How long eval/diagnosis_monitoring takes for large logs of several formats, and how much memory: a markdown table.

python bench/diagnosis_speed.py --work bench/.work/diagnosis_speed      writes the logs there once, then measures
"""

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMAND = [sys.executable, str(HERE.parent / "eval" / "diagnosis_monitoring.py")]
COUNT = 1_000_000
LENGTHS = {"hf_bars": 1_100_000, "state": 920_000, "state_indented": 700_000}


def losses(count: int) -> Iterator[tuple[int, float, float]]:
    """(step, loss, learning rate) of a long run."""
    draw = random.Random(1)
    for step in range(1, count + 1):
        yield step, 1.5 + 2 * math.exp(-8 * step / count) + draw.gauss(0, 0.1), 1e-4 * (1 - step / count)


def ours(stream: object, count: int) -> None:
    """log.txt of this project, with 100 evaluations."""
    for step, loss, rate in losses(count):
        line = {"step": step, "epoch": step / count * 3, "loss": round(loss, 6), "learning_rate": rate,
                "grad_norm": 1.25, "tokens_per_second": 9123.5, "elapsed": step * 0.5,
                "remaining": (count - step) * 0.5}  # fmt: skip
        stream.write(json.dumps(line) + "\n")
        if step % (count // 100) == 0:
            stream.write(json.dumps({"step": step, "epoch": step / count * 3, "eval_loss": round(loss, 3)}) + "\n")


def hf_bars(stream: object, count: int) -> None:
    """The Trainer's output with a progress bar after every record."""
    for step, loss, rate in losses(count):
        bar = f"{100 * step // count:3d}%|{'█' * (10 * step // count):<10}| {step}/{count} [1:00:00<2:00:00,  2.89it/s]"
        record = {"loss": round(loss, 4), "grad_norm": 1.25, "learning_rate": rate, "epoch": round(3 * step / count, 4)}
        stream.write(f"\r{' ' * 40}\r{record}\n\r{bar}")


def records(count: int) -> Iterator[dict[str, float]]:
    """Entries of a log_history."""
    for step, loss, rate in losses(count):
        yield {
            "epoch": round(3 * step / count, 4),
            "grad_norm": 1.25,
            "learning_rate": rate,
            "loss": round(loss, 4),
            "step": step,
        }


def state(stream: object, count: int) -> None:
    """A trainer_state.json on one line."""
    json.dump({"best_metric": None, "epoch": 3.0, "log_history": list(records(count)), "max_steps": count}, stream)


def state_indented(stream: object, count: int) -> None:
    """A trainer_state.json as the Trainer writes it."""
    json.dump(
        {"best_metric": None, "epoch": 3.0, "log_history": list(records(count)), "max_steps": count}, stream, indent=2
    )


def llama_factory(stream: object, count: int) -> None:
    """LLaMA-Factory's trainer_log.jsonl."""
    for step, loss, rate in losses(count):
        line = {"current_steps": step, "total_steps": count, "loss": round(loss, 4), "lr": rate,
                "epoch": round(3 * step / count, 4), "percentage": round(100 * step / count, 2),
                "elapsed_time": "1:00:00", "remaining_time": "2:00:00"}  # fmt: skip
        stream.write(json.dumps(line) + "\n")


def lightning(stream: object, count: int) -> None:
    """Lightning's metrics.csv."""
    stream.write("epoch,lr-AdamW,step,train_loss,val_loss\n")
    for step, loss, rate in losses(count):
        stream.write(f"{3 * step // count},{rate:.8f},{step},{loss:.6f},\n")
        if step % (count // 100) == 0:
            stream.write(f"{3 * step // count},,{step},,{loss:.4f}\n")


def megatron(stream: object, count: int) -> None:
    """Megatron's console."""
    for step, loss, rate in losses(count):
        stream.write(
            f" [2024-01-01 10:00:00] iteration {step:8d}/{count:8d} | consumed samples: {8 * step:12d} | elapsed time "
            f"per iteration (ms): 150.5 | learning rate: {rate:.6E} | global batch size:     8 | lm loss: {loss:.6E} | "
            f"loss scale: 1.0 | grad norm: 1.250 | number of skipped iterations:   0 | number of nan iterations: 0 |\n"
        )


WRITERS: dict[str, Callable[[object, int], None]] = {
    "ours": ours, "hf_bars": hf_bars, "state": state, "state_indented": state_indented, "llama_factory": llama_factory,
    "lightning": lightning, "megatron": megatron,
}  # fmt: skip


def measure(path: Path) -> tuple[float, float]:
    """(seconds, peak MB) of one judgement."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    started = time.monotonic()
    with subprocess.Popen([*COMMAND, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            except OSError:
                break
            found = [line for line in status.splitlines() if line.startswith("VmHWM")]
            peak = max(peak, int(found[0].split()[1])) if found else peak
            time.sleep(0.02)
        out, err = process.communicate()
    seconds = time.monotonic() - started
    assert json.loads(out)["code"] == 0, err
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    print(f"{path.name}: {seconds:.2f} s, {cpu:.2f} s of CPU", file=sys.stderr)
    return seconds, peak / 1024


def main() -> int:
    """Write what is not there yet, measure each three times, print the fastest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default="", help="names of formats, by commas")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print("| log | lines or records | MB | s | peak MB |\n|---|---|---|---|---|")
    for name, writer in WRITERS.items():
        if args.only and name not in args.only.split(","):
            continue
        path, count = args.work / f"{name}.log", LENGTHS.get(name, COUNT)
        if not path.is_file():
            part = path.with_suffix(".part")
            with open(part, "w", encoding="utf-8", newline="") as stream:
                writer(stream, count)
            part.rename(path)
        runs = [measure(path) for _ in range(3)]
        seconds, peak = min(run[0] for run in runs), max(run[1] for run in runs)
        print(f"| {name} | {count:,} | {path.stat().st_size / 1e6:.0f} | {seconds:.1f} | {peak:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
