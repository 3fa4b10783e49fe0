"""SIGTERM and SIGKILL at random moments of a job: what the platform knows must be right each time.

python tests/job_kills.py KILLS SEED      trainings; a line for each kill; exit code 1 when one was not right

A job is killed once at a moment drawn from an undisturbed one's time, then started again and left to end. Right is:
after SIGTERM the platform knows nothing, or the end when that was on its way already; it never hears of a failure; the
restart ends with success, which is taken once; OUTPUT_DIR is a whole model. SIGKILL hits the job alone, as the kernel
does it: what the job had started must end by itself.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conftest import DEMO, ROOT, environment, read_messages, write_jsonl
from job_platform import Call, PlatformServer, platform_server
from safetensors import safe_open

from llmops.models import tiny

SLOW = 0.25  # seconds that the platform takes before and after it has written an end down


@dataclass(frozen=True)
class Work:
    """A job: its environment on a platform and in a folder of its own, and what is wrong with its result, if so."""

    variables: Callable[[PlatformServer, Path], Mapping[str, str]]
    problem: Callable[[Path], str | None]


def scoring() -> Work:
    """Answers are scored; half a second."""

    def variables(server: PlatformServer, folder: Path) -> dict[str, str]:
        server.stored["/answers.jsonl"] = b'{"answer": "a", "gold": "a"}\n'
        return {"MODEL_PATH": str(folder), "DATASET_PATH": f"{server.url}/answers.jsonl", "EVALUATION_METRICS": "Acc",
                "MAX_SEQ_LEN": "16", "PER_DEVICE_BATCH_SIZE": "1", "MOUNT_PATH": str(folder)}  # fmt: skip

    return Work(variables, lambda folder: None)


def training(model: Path, data: Path) -> Work:
    """A tiny model is trained on the CPU, with checkpoints on the way, and merged."""

    def variables(server: PlatformServer, folder: Path) -> dict[str, str]:
        server.stored["/train.jsonl"] = data.read_bytes()
        return {"SCENARIO": "general", "BASE_MODEL_PATH": str(model), "TRAIN_FILE": f"{server.url}/train.jsonl",
                "EVAL_FILE": "", "OUTPUT_DIR": str(folder / "out"), "USE_LORA": "true", "GPUS_PER_NODE": "0",
                "MODEL_MAX_LENGTH": "256", "NUM_TRAIN_EPOCHS": "3", "PER_DEVICE_TRAIN_BATCH_SIZE": "2",
                "GRADIENT_ACCUMULATION_STEPS": "1", "LEARNING_RATE": "2e-3", "EVAL_STEPS": "4",
                "GRADIENT_CHECKPOINTING": "false", "OMP_NUM_THREADS": "1"}  # fmt: skip

    def problem(folder: Path) -> str | None:
        output = folder / "out"
        if (output / "adapter_config.json").exists() or not (output / "config.json").is_file():
            return "OUTPUT_DIR is no whole model"
        with safe_open(output / "model.safetensors", "pt") as weights:
            if not list(weights.keys()):
                return "OUTPUT_DIR has no weights"
        steps = [json.loads(line) for line in (output / "run" / "log.txt").read_text().splitlines()]
        logged = [line["step"] for line in steps if "loss" in line]
        return None if logged == sorted(set(logged)) else "steps are logged twice"

    return Work(variables, problem)


def start(server: PlatformServer, work: Work, folder: Path) -> subprocess.Popen[bytes]:
    """A job's container."""
    folder.mkdir(exist_ok=True)
    variables = server.environment(**work.variables(server, folder))
    with open(folder / "output.txt", "ab") as output:
        return subprocess.Popen(
            ["bash", str(ROOT / "job" / "run.sh")], env=environment() | variables, stdin=subprocess.DEVNULL,
            stdout=output, stderr=output,
        )  # fmt: skip


def slow_server(server: PlatformServer) -> None:
    """Let every end take its time, so that kills hit that moment, too."""

    def before(call: Call) -> None:
        if call.path.endswith("/finish"):
            time.sleep(SLOW)
        server.faults.append(before)

    server.faults.append(before)
    server.taken = lambda: time.sleep(SLOW)


def seconds_of(work: Work, folder: Path) -> float:
    """How long an undisturbed job takes. Raises AssertionError when it does not end well."""
    with platform_server() as server:
        slow_server(server)
        began = time.monotonic()
        code = start(server, work, folder).wait(300)
        assert (code, server.state) == (0, "success"), (folder / "output.txt").read_text()[-3000:]
        assert work.problem(folder) is None
        return time.monotonic() - began


def trial(work: Work, folder: Path, moment: float, number: int) -> tuple[str, str | None]:
    """(what was seen, what was wrong with it) of one job that a signal hits after so many seconds."""
    with platform_server() as server:
        slow_server(server)
        process = start(server, work, folder)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        code = process.wait(120)
        seen = f"{signal.Signals(number).name} after {moment:5.2f} s: exit {code}, {server.state}"
        if problem := after_signal(server, number, code):
            return seen, problem
        began = time.monotonic()
        code = start(server, work, folder).wait(300)
        seen += f"; started again: exit {code}, {server.state}, {time.monotonic() - began:.1f} s"
        taken = sum('"success": true' in call.answer for call in server.ends)
        if (code, server.state, taken) != (0, "success", 1):
            return seen, f"an end was taken {taken} times"
        if any(call.body["status"] != "success" for call in server.ends):
            return seen, "a failure was told"
        return seen, work.problem(folder)


def after_signal(server: PlatformServer, number: int, code: int) -> str | None:
    """What is wrong after a job was hit: whatever it says itself, the platform's record decides."""
    if server.state not in ("running", "success"):
        return f"the platform knows {server.state}"
    if number == signal.SIGTERM:
        if code in (143, -signal.SIGTERM) and server.state != "running":
            return "it was told although the job says that it was stopped"
        if code == 0 and server.state != "success":
            return "the job says that all is well and the platform does not know"
        if code not in (0, 143, -signal.SIGTERM):
            return "an exit code that no scheduler expects"
    return None


def trials(work: Work, folder: Path, kills: int, seed: int, longest: float) -> Iterator[tuple[str, str | None]]:
    """Jobs that are hit at random moments, SIGKILL and SIGTERM in turn."""
    draw = random.Random(seed)
    for i in range(kills):
        number = signal.SIGTERM if i % 2 else signal.SIGKILL
        yield trial(work, folder / f"job-{i}", draw.uniform(0, longest), number)


def main(argv: Sequence[str]) -> int:
    """Kill trainings and print what was seen."""
    kills, seed = int(argv[0]), int(argv[1])
    with tempfile.TemporaryDirectory(prefix="llmops-kills.") as name:
        folder = Path(name)
        conversations = read_messages(DEMO / "train.jsonl")
        texts = [message["content"] for messages in conversations for message in messages]
        model = tiny.write_checkpoint(folder / "model", texts, vocab_size=900, hidden=32, layers=2, heads=4)
        work = training(model, write_jsonl(folder / "train.jsonl", conversations[:24]))
        longest = seconds_of(work, folder / "undisturbed")
        print(f"undisturbed: {longest:.1f} s", flush=True)
        wrong = 0
        for i, (seen, problem) in enumerate(trials(work, folder, kills, seed, longest)):
            wrong += problem is not None
            print(f"{i + 1:3} {seen}" + (f"  WRONG: {problem}" if problem else ""), flush=True)
            if problem:
                print((folder / f"job-{i}" / "output.txt").read_text()[-3000:], flush=True)
        print(f"{kills} kills, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.exit(main(sys.argv[1:]))
