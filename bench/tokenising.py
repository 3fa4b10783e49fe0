"""From a file of conversations to tokens on disk: time, peak memory and second start, for many conversations.

Conversations are alpaca_zh's with a number in the first question, so that no two are alike, as jsonl and as parquet.
What is measured is the whole command `train/finetune.py --dry_run true` (it checks and tokenises everything, builds no
weights and trains nothing), started twice; `peak_mb` is what all of its processes hold together, looked at every half
second: memory of their own, without mapped files, which the kernel drops when it needs the room. --before FOLDER:
another version's checkout, started in turn on the same jsonl.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from llmops.console import log, run_main

BLOCK = 10_000  # conversations of a row group


def varied(rows: Sequence[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """So many conversations, no two alike."""
    for i in range(count):
        first, *rest = rows[i % len(rows)]["messages"]
        yield {"messages": [first | {"content": f"{i} {first['content']}"}, *rest]}


def write(rows: Sequence[dict[str, Any]], count: int, path: Path) -> None:
    """The file, a block at a time."""
    import pyarrow as pa
    from pyarrow import parquet

    made = varied(rows, count)
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        return
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    with parquet.ParquetWriter(path, pa.schema([("messages", pa.list_(message))])) as writer:
        for start in range(0, count, BLOCK):
            block = [next(made) for _ in range(min(BLOCK, count - start))]
            writer.write_table(pa.Table.from_pylist(block, writer.schema))


def held(process: psutil.Process) -> int:
    """Bytes that a process and its children hold together; what several share counts once."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError:  # it has ended meanwhile
            continue
        sizes = dict(line.split(":") for line in lines[1:])
        total += sum(1024 * int(sizes[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem"))
    return total


def start(tree: Path, given: argparse.Namespace, file: Path, output: Path) -> dict[str, float]:
    """Seconds and peak megabytes of one start of the command."""
    command = [
        sys.executable, str(tree / "train" / "finetune.py"), "--dry_run", "true", "--model_name_or_path",
        str(given.model), "--train_file", str(file), "--test_file", str(given.data / "test.jsonl"),
        "--output_path", str(output), "--max_seq_len", "2048",
    ]  # fmt: skip
    with open(output.with_suffix(".err"), "ab") as said:
        begun = time.monotonic()
        child = subprocess.Popen(command, cwd=tree, stdout=subprocess.DEVNULL, stderr=said, stdin=subprocess.DEVNULL)
        peak = 0
        while child.poll() is None:
            peak = max(peak, held(psutil.Process(child.pid)))
            time.sleep(0.5)
    if child.returncode:
        raise SystemExit(output.with_suffix(".err").read_text(encoding="utf-8")[-3000:])
    return {"seconds": round(time.monotonic() - begun, 1), "peak_mb": round(peak / 1e6)}


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All starts: [first, second] of each, by what was started."""
    rows = [json.loads(line) for line in (given.data / "train.jsonl").open(encoding="utf-8")]
    found: dict[str, Any] = {"conversations": given.conversations, "cores": len(os.sched_getaffinity(0))}
    ways = [(kind, HERE.parent, kind) for kind in given.kinds.split(",")]
    ways += [("before", given.before.resolve(), "jsonl")] if given.before else []
    files = {kind: folder / f"train.{kind}" for _, _, kind in ways}
    for path in files.values():
        write(rows, given.conversations, path)
        log(f"{path.name}: {path.stat().st_size / 1e6:,.0f} MB")
    for turn in range(given.times):
        for name, tree, kind in ways:
            output = folder / f"{name}{turn}"
            pair = [start(tree, given, files[kind], output) for _ in range(2)]
            found.setdefault(name, []).append(pair)
            log(f"{name}: {pair}")
            shutil.rmtree(output)
    if given.before:
        old, new = (statistics.median(first["seconds"] for first, _ in found[name]) for name in ("before", "jsonl"))
        found["times_as_fast"] = round(old / new, 2)
    return found


def main() -> int:
    """Parse, measure, print one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a chat model's folder; its tokenizer is used")
    add("--data", type=Path, required=True, help="alpaca_zh's folder")
    add("--conversations", type=int, default=100_000)
    add("--kinds", default="jsonl,parquet")
    add("--times", type=int, default=1)
    add("--before", type=Path, help="the checkout of another version")
    add("--folder", type=Path, help="where files are written; a temporary folder otherwise")
    given = parser.parse_args()

    def body() -> int:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            print(json.dumps(measure(given, Path(folder)), indent=2))
        return 0

    return run_main(body)


if __name__ == "__main__":
    raise SystemExit(main())
