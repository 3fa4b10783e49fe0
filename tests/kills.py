"""SIGKILL at random moments: every restart must end as the undisturbed run, and nothing of others may be touched.

python tests/kills.py KILLS SEED      a table by kind of work; exit code 1 when one restart ended differently

Each kind of work runs once undisturbed. Then it is killed at a moment drawn from that run's time, started again, killed
again, as often as its share of the kills says, and at last left to end. Its output folder holds files of others.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from conftest import DEMO, FAST, ROOT, environment, read_messages, teach, tree_hash, write_jsonl
from embedding_model import write_embedding_model

from faq.prepared import OUTPUTS
from llmops.models import tiny

OTHERS = {"notes.md": b"mine", "plots/loss.svg": b"<svg/>", "data.bak": b"\x00\x01"}
TOLERANCE = 1e-3  # relative, of losses: DeepSpeed's sums over processes have no fixed order


@dataclass(frozen=True)
class Work:
    """A command on an output folder, what of its outcome must be equal, and its share of the kills."""

    name: str
    share: int
    command: Callable[[Path], Sequence[str]]
    outcome: Callable[[Path, str], Any]


def training_outcome(output: Path, stdout: str) -> Any:
    """Losses and steps of a finished run, and every line of its log once."""
    results = json.loads((output / "train_results.json").read_text())
    steps = [line["step"] for line in map(json.loads, (output / "log.txt").read_text().splitlines()) if "loss" in line]
    results.pop("seconds")
    return results | {"logged": len(steps), "logged once": sorted(set(steps)) == sorted(steps)}


def trainings(mount: Path, model: Path) -> list[Work]:
    """LoRA, full, ZeRO 3 and two processes, on the demo's conversations."""

    def work(name: str, share: int, *flags: str) -> Work:
        def command(output: Path) -> list[str]:
            fixed = ["--mount_path", str(mount), "--model_name_or_path", str(model), "--output_path", str(output)]
            steps = ["--num_train_epochs", "6", "--eval_steps", "4", "--per_device_train_batch_size", "2"]
            return ["bash", str(ROOT / "chat_main.sh"), *fixed, *FAST, *steps, *flags]

        return Work(name, share, command, training_outcome)

    full = ("--train_type", "all", "--learning_rate", "1e-3")
    return [
        work("LoRA", 6), work("full", 5, *full), work("ZeRO 3, full", 5, *full, "--zero_stage", "3"),
        work("two processes, ZeRO 3, LoRA", 5, "--num_processes", "2", "--zero_stage", "3"),
    ]  # fmt: skip


def others(folder: Path) -> list[Work]:
    """faq/prepare, evaluation on a data set, similar questions."""
    faq = ROOT / "faq" / "demo_data" / "faq.jsonl"
    asked = read_messages(DEMO / "test.jsonl")
    model = teach(folder / "taught", asked[:8], steps=10)
    data = write_jsonl(folder / "asked.jsonl", asked)
    embedding = write_embedding_model(folder / "embedding", "mean")

    def prepare(output: Path) -> list[str]:
        return [str(ROOT / "faq" / "prepare.sh"), "--data_file", str(faq), "--output_dir", str(output)]

    def evaluate(output: Path) -> list[str]:
        return [str(ROOT / "eval" / "model_performance_evaluation.sh"), "--model_name_or_path", str(model),
                "--dataset_path", str(data), "--output_path", str(output)]  # fmt: skip

    def similar(output: Path) -> list[str]:
        return [str(ROOT / "eval" / "analyze_similar_questions_and_intents.sh"), "--data_file_path", str(faq),
                "--model_path", str(embedding), "--cache_dir", str(output / "vectors"),
                "--report", str(output / "page.html")]  # fmt: skip

    def prepared(output: Path, stdout: str) -> Any:
        return {name: (output / name).read_text(encoding="utf-8") for name in OUTPUTS}

    def printed(output: Path, stdout: str) -> Any:
        return json.loads(stdout)

    return [
        Work("faq/prepare", 8, lambda output: ["bash", *prepare(output)], prepared),
        Work("evaluation", 6, lambda output: ["bash", *evaluate(output)], printed),
        Work("similar questions", 5, lambda output: ["bash", *similar(output)], printed),
    ]


def run(command: Sequence[str], log: Path, kill_after: float | None = None) -> tuple[int, str]:
    """(exit code, stdout) of a command in a process group of its own, killed as a whole after so many seconds."""
    with open(log, "ab") as stderr:
        process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
        try:
            stdout, _ = process.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, _ = process.communicate()
    return process.returncode, stdout.decode("utf-8")


def same(one: Any, other: Any) -> bool:
    """Whether two outcomes are equal, numbers with a fraction within TOLERANCE."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= TOLERANCE * max(abs(one), abs(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def torment(work: Work, kills: int, folder: Path, rng: random.Random) -> list[str]:
    """Kill a command so many times; what its last start came to that it should not have."""
    calm, output, log = folder / "calm", folder / "killed", folder / "stderr.txt"
    calm.mkdir(parents=True)
    started = time.monotonic()
    code, stdout = run(work.command(calm), log)
    seconds = time.monotonic() - started
    if code:
        return [f"the undisturbed run ended with {code}; see {log}"]
    expected = work.outcome(calm, stdout)
    for name, content in OTHERS.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(content)
    problems, done = [], 0
    while done < kills:
        code, stdout = run(work.command(output), log, rng.uniform(0.02, 1) * seconds)
        done += code == -signal.SIGKILL
        if code >= 0:  # it was faster than the kill: look at it, and begin anew
            problems += [] if code == 0 else [f"a restart ended with {code}; see {log}"]
            problems += differences(work, output, expected, stdout)
            for path in output.iterdir():
                if path.name not in {Path(name).parts[0] for name in OTHERS}:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        if problems:
            return problems
    code, stdout = run(work.command(output), log)
    if code:
        return [f"the last start ended with {code}; see {log}"]
    return differences(work, output, expected, stdout)


def differences(work: Work, output: Path, expected: Any, stdout: str) -> list[str]:
    """What is not as in the undisturbed run, what is left lying about, and what of others was touched."""
    found = work.outcome(output, stdout)
    problems = [] if same(found, expected) else [f"found {str(found)[:300]}, expected {str(expected)[:300]}"]
    kept = {name: digest for name, digest in tree_hash(output).items() if name in OTHERS}
    if len(kept) != len(OTHERS) or any((output / name).read_bytes() != raw for name, raw in OTHERS.items()):
        problems.append("a file of others was touched")
    return problems


def main(argv: Sequence[str]) -> int:
    """Kill, compare, print the table."""
    kills, seed = int(argv[0]), int(argv[1])
    transformers.logging.disable_progress_bar()
    rng = random.Random(seed)
    bad = 0
    with tempfile.TemporaryDirectory(prefix="kills.") as place:
        folder = Path(place)
        conversations = read_messages(DEMO / "train.jsonl")
        write_jsonl(folder / "mnt" / "datasets" / "train.jsonl", conversations[:24])
        write_jsonl(folder / "mnt" / "datasets" / "test.jsonl", read_messages(DEMO / "test.jsonl")[:8])
        texts = [message["content"] for messages in conversations for message in messages]
        model = tiny.write_checkpoint(folder / "model", texts, vocab_size=900, hidden=32, layers=2, heads=4)
        works = [*trainings(folder / "mnt", model), *others(folder)]
        total = sum(work.share for work in works)
        print(f"{'work':30} {'kills':>5}  ended as the undisturbed run")
        for number, work in enumerate(works):
            count = max(1, round(kills * work.share / total))
            problems = torment(work, count, folder / f"work{number}", rng)
            bad += bool(problems)
            print(f"{work.name:30} {count:5}  {'; '.join(problems) or 'yes'}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
