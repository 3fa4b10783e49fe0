"""Parts of bench/gpu.sh that train a tiny model as a user does, in processes of their own: every way, every end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_bench import DEMO, ROOT, Bench

from llmops import files
from llmops.models import tiny
from train.run_folder import CONFIG_NAME, RECORD


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


def command(mount: Path, output: Path, *flags: str) -> list[str]:
    """train/finetune.py on one device, without the launcher."""
    return [
        sys.executable, str(ROOT / "train" / "finetune.py"), "--model_name_or_path", str(mount / "model"),
        "--train_file", str(mount / "datasets" / "train.jsonl"), "--output_path", str(output), "--max_seq_len", "256",
        "--num_train_epochs", "2", "--learning_rate", "1e-3", "--tensorboard", "false", *flags,
    ]  # fmt: skip


def finetune(mount: Path, output: Path, *flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A training from its beginning to its end; a variable that is given as "" is not set."""
    shutil.rmtree(output, ignore_errors=True)
    variables = {name: value for name, value in (os.environ | environ).items() if value}
    return subprocess.run(
        command(mount, output, *flags), env=variables, capture_output=True, text=True, check=False
    )  # fmt: skip


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
    faults = [line.problem for line in files.json_lines(output / "log.txt") if line.problem]
    if faults:
        raise AssertionError(f"log.txt is not strict JSON: {faults[0]}")
    with safe_open(next(output.glob("*.safetensors")), "pt") as tensors:
        kinds = {str(tensors.get_tensor(name).dtype)[6:] for name in tensors.keys()}  # noqa: SIM118
    if kinds != {{"bf16": "bfloat16", "fp16": "float16"}[dtype]}:
        raise AssertionError(f"weights of {', '.join(sorted(kinds))} were saved by a run in {dtype}")
    if merge and not (output / "merged" / "config.json").is_file():
        raise AssertionError("nothing was merged")
    return {
        "loss_before": results["eval_loss_before"], "loss_after": results["eval_loss"], "saved_dtype": kinds.pop(),
        "merged": bool(merge),
    }  # fmt: skip


def continued(mount: Path, output: Path) -> dict[str, Any]:
    """A run that is killed after a checkpoint and started again, beside one that is left alone."""
    from train import checkpointing

    flags = ("--eval_steps", "2", "--lora_dropout", "0.1", "--max_steps", "12")
    alone = output.with_name("run-alone")
    checked(finetune(mount, alone, *flags))
    shutil.rmtree(output, ignore_errors=True)
    with open(output.with_name("killed.txt"), "w", encoding="utf-8") as said:
        process = subprocess.Popen(command(mount, output, *flags), stdout=said, stderr=said)
        while process.poll() is None and checkpointing.newest_whole(output, speaks=False) is None:
            time.sleep(0.02)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise AssertionError(f"it ended with exit code {process.returncode} before it was killed")
    again = subprocess.run(command(mount, output, *flags), capture_output=True, text=True, check=False)
    checked(again)
    if "continuing from" not in again.stderr:
        raise AssertionError("it began anew instead of continuing")
    losses = [files.read_object(one / "train_results.json")["eval_loss"] for one in (alone, output)]
    if abs(losses[1] - losses[0]) > 0.01 * losses[0]:
        raise AssertionError(f"it ended at a loss of {losses[1]}, and left alone at {losses[0]}")
    return {"loss_alone": losses[0], "loss_after": losses[1]}


def bare_path(bench: Bench) -> None:
    """Training with a PATH that has the base system's tools but no compiler, and nothing that was compiled before."""
    tools = bench.work / "bare_path"
    tools.mkdir(parents=True, exist_ok=True)
    for name in ("sh", "bash", "ls", "cat", "uname", "env", "ldconfig", "lscpu", "which"):
        found = shutil.which(name)
        if found and not (tools / name).exists():
            (tools / name).symlink_to(found)

    def train() -> dict[str, Any]:
        output = bench.work / "run-bare"
        caches = {f"{name}_CACHE_DIR": str(bench.work / "bare_cache" / name) for name in ("TRITON", "TORCHINDUCTOR")}
        shutil.rmtree(bench.work / "bare_cache", ignore_errors=True)
        done = finetune(demo_mount(bench), output, "--max_steps", "2", PATH=str(tools), CC="", CXX="",
                        **caches)  # fmt: skip
        checked(done)
        how = next((line for line in done.stderr.splitlines() if "micro-batches" in line), "")
        loss = files.read_object(output / CONFIG_NAME)[RECORD]["cross_entropy"]
        return {"said": how.rpartition("; ")[2], "loss": loss, "tracebacks": done.stderr.count("Traceback")}

    bench.each("LoRA, ZeRO 2, no nvcc, ninja, gcc", train)
