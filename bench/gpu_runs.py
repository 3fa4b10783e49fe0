"""Parts of bench/gpu.sh that train a tiny model as a user does, in processes of their own: every way, every end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_bench import DEMO, ROOT, Bench

from llmops import files
from llmops.models import tiny


def demo_mount(bench: Bench) -> Path:
    """A mount folder with a tiny model, 48 training and 8 test conversations."""
    mount = bench.work / "mount"
    if not (mount / "model" / "config.json").is_file():
        (mount / "datasets").mkdir(parents=True, exist_ok=True)
        texts = []
        for name, count in (("train", 48), ("test", 8)):
            lines = (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
            files.write_text(mount / "datasets" / f"{name}.jsonl", "\n".join(lines) + "\n")
            texts += [m["content"] for line in lines for m in json.loads(line)["messages"]]
        tiny.write_checkpoint(mount / "model", texts, "llama", 900, hidden=64, layers=2, heads=4)
    return mount


def finetune(mount: Path, output: Path, *flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """train/finetune.py on one device, without the launcher."""
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable, str(ROOT / "train" / "finetune.py"), "--model_name_or_path", str(mount / "model"),
        "--train_file", str(mount / "datasets" / "train.jsonl"), "--output_path", str(output), "--max_seq_len", "256",
        "--num_train_epochs", "2", "--learning_rate", "1e-3", "--tensorboard", "false", *flags,
    ]  # fmt: skip
    return subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, check=False)


def checked(done: subprocess.CompletedProcess[str]) -> None:
    """Raise RuntimeError with what a run said last when it failed."""
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(done.stderr.split())[-180:]}")


def runs(bench: Bench) -> None:
    """Every way to train, on a tiny model; strict log, the adapter's dtype, a resume and a merge."""
    mount = demo_mount(bench)
    ways = [
        (kind, stage, dtype)
        for kind in ("lora", "all")
        for stage in ("2", "3")
        for dtype in (("bf16", "fp16") if bench.gpu else ("bf16",))
    ]
    for kind, stage, dtype in ways[::3] if bench.small else ways:
        merge = ["--merge_lora", "true"] if kind == "lora" and stage == "2" else []
        output = bench.work / f"run-{kind}-{stage}-{dtype}"
        bench.each(f"{kind}, ZeRO {stage}, {dtype}", lambda a=(mount, output, kind, stage, dtype, merge): whole_run(*a))
    bench.each("killed and continued", lambda: continued(mount, bench.work / "run-resumed"))


def whole_run(mount: Path, output: Path, kind: str, stage: str, dtype: str, merge: list[str]) -> dict[str, Any]:
    """A run to its end, and what it left."""
    from safetensors import safe_open

    checked(finetune(mount, output, "--train_type", kind, "--zero_stage", stage, "--dtype", dtype, *merge))
    results = files.read_object(output / "train_results.json")
    strict = [line.problem for line in files.json_lines(output / "log.txt")]
    with safe_open(next(output.glob("*.safetensors")), "pt") as tensors:
        kinds = {str(tensors.get_tensor(name).dtype)[6:] for name in tensors.keys()}  # noqa: SIM118
    return {
        "loss_before": results["eval_loss_before"], "loss_after": results["eval_loss"],
        "saved_dtype": ",".join(sorted(kinds)), "strict_log": not any(strict),
        "merged": (output / "merged" / "config.json").is_file() if merge else None,
    }  # fmt: skip


def continued(mount: Path, output: Path) -> dict[str, Any]:
    """A run that is stopped by its STOP file and started again, beside one that is left alone."""
    flags = ("--eval_steps", "2", "--lora_dropout", "0.1")
    checked(finetune(mount, output.with_name("run-alone"), *flags))
    alone = files.read_object(output.with_name("run-alone") / "train_results.json")["eval_loss"]
    checked(finetune(mount, output, *flags, "--max_steps", "6"))
    shutil.rmtree(output / "checkpoint-6", ignore_errors=True)
    (output / "train_results.json").unlink()
    again = subprocess.run(
        [
            sys.executable, str(ROOT / "train" / "finetune.py"), "--model_name_or_path", str(mount / "model"),
            "--train_file", str(mount / "datasets" / "train.jsonl"), "--output_path", str(output), "--max_seq_len",
            "256", "--num_train_epochs", "2", "--learning_rate", "1e-3", "--tensorboard", "false", *flags,
            "--max_steps", "6",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    checked(again)
    return {"loss_before": alone, "loss_after": files.read_object(output / "train_results.json")["eval_loss"],
            "continued": "continuing from" in again.stderr}  # fmt: skip


def bare_path(bench: Bench) -> None:
    """Training with a PATH that has the base system's tools but no compiler."""
    tools = bench.work / "bare_path"
    tools.mkdir(parents=True, exist_ok=True)
    for name in ("sh", "bash", "ls", "cat", "uname", "env", "ldconfig", "lscpu", "which"):
        found = shutil.which(name)
        if found and not (tools / name).exists():
            (tools / name).symlink_to(found)

    def train() -> dict[str, Any]:
        done = finetune(demo_mount(bench), bench.work / "run-bare", "--max_steps", "2", PATH=str(tools), CC="", CXX="")
        checked(done)
        how = next((line for line in done.stderr.splitlines() if "micro-batches" in line), "")
        return {"said": how.rpartition("; ")[2], "tracebacks": done.stderr.count("Traceback")}

    bench.each("LoRA, ZeRO 2, no nvcc, ninja, gcc", train)
