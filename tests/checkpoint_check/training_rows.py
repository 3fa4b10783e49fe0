"""Rows of the table: runs of chat_main.sh."""

import json
import subprocess
import threading
import time
from pathlib import Path

import torch

from checkpoint_check.generation_rows import answers
from checkpoint_check.subject import DEMO, ROOT, Subject, difference, within
from llmops.console import log
from llmops.models.chat_model import ChatModel, load_tokenizer
from llmops.models.checkpoints import Checkpoint


def start(subject: Subject, output: Path, *arguments: str) -> dict[int, float]:
    """Train through chat_main.sh; losses by step."""
    data = subject.work / "data"
    if not data.exists():
        data.mkdir()
        for name, count in (("train", 8 * subject.processes), ("test", 4)):
            lines = (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
            (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (data / "retention.jsonl").write_text(
            "\n".join((ROOT / "train" / "retention.jsonl").read_text(encoding="utf-8").splitlines()[:4]) + "\n",
            encoding="utf-8",
        )
    command = [
        "bash", str(ROOT / "chat_main.sh"), "--model_name_or_path", str(subject.folder), "--mode", subject.mode,
        "--train_file", str(data / "train.jsonl"), "--test_file", str(data / "test.jsonl"),
        "--output_path", str(output), "--retention_file", str(data / "retention.jsonl"),
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
        "--num_train_epochs", "2", "--max_seq_len", "256", "--lora_dropout", "0",
        "--tensorboard", "false", "--trust_remote_code", "true", "--num_processes", str(subject.processes), "--dtype",
        {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[subject.dtype], *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 143):
        log(done.stdout[-2000:] + done.stderr[-6000:])
        raise AssertionError(f"chat_main.sh ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    lines = [json.loads(line) for line in (output / "log.txt").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def same_losses(found: dict[int, float], expected: dict[int, float], bound: float) -> str:
    """Losses of two runs agree at every step."""
    assert found.keys() == expected.keys(), f"steps {sorted(found)} and {sorted(expected)}"
    gap = max(abs(found[step] - loss) / abs(loss) for step, loss in expected.items())
    return within(gap, bound, f"{len(found)} losses")


def losses_of(subject: Subject, name: str) -> dict[int, float]:
    """Losses of a run of an earlier row."""
    assert name in subject.outputs, f"the run {name} did not succeed"
    lines = (subject.outputs[name] / "log.txt").read_text(encoding="utf-8").splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


def lora_zero2(subject: Subject) -> str:
    """A LoRA run under ZeRO 2 with several processes leaves an adapter that loads."""
    output = subject.work / "lora2"
    losses = start(subject, output, "--zero_stage", "2", "--learning_rate", "3e-3", "--merge_lora", "true")
    subject.outputs["lora2"] = output
    assert (output / "adapter_config.json").is_file(), "no adapter"
    load_tokenizer(Checkpoint(output, trust_remote_code=True))
    first, last = losses[min(losses)], losses[max(losses)]
    assert last < first, f"loss {first} -> {last}"
    return f"{subject.processes} processes, loss {first:.3f} -> {last:.3f}"


def merged(subject: Subject) -> str:
    """output_path/merged answers like base + adapter."""
    assert "lora2" in subject.outputs, "there was no run"
    output = subject.outputs["lora2"]
    adapted = ChatModel(Checkpoint(output, trust_remote_code=True)).load(subject.dtype).to(subject.device).eval()
    whole = subject.load(output / "merged")
    with torch.no_grad():
        worst = max(
            difference(whole(input_ids=subject.tensor(p)).logits, adapted(input_ids=subject.tensor(p)).logits)
            for p in subject.prompts
        )
        moved = difference(adapted(input_ids=subject.tensor(subject.prompts[0])).logits,
                           subject.model(input_ids=subject.tensor(subject.prompts[0])).logits)  # fmt: skip
    assert moved > 10 * worst, f"the adapter changes nothing ({moved:.1e})"
    ids, mask = subject.batch(left=True)
    both = [answers(subject, ids, mask, model) for model in (adapted, whole)]
    assert both[0] == both[1] or subject.dtype != torch.float32, f"{both[0]} with the adapter, {both[1]} merged"
    return f"{within(worst, subject.bound, 'logits')} (the adapter moved them by {moved:.1e})"


def lora_zero3(subject: Subject) -> str:
    """ZeRO 3 gives the losses of ZeRO 2."""
    losses = start(subject, subject.work / "lora3", "--zero_stage", "3", "--learning_rate", "3e-3")
    return same_losses(losses, losses_of(subject, "lora2"), 10 * subject.bound)


def full_zero2(subject: Subject) -> str:
    """Training of every weight under ZeRO 2 leaves a whole model that loads, with its code."""
    output = subject.work / "full2"
    losses = start(subject, output, "--train_type", "all", "--zero_stage", "2", "--learning_rate", "1e-3")
    subject.outputs["full2"] = output
    model = subject.load(output)
    with torch.no_grad():
        moved = difference(model(input_ids=subject.tensor(subject.prompts[0])).logits,
                           subject.model(input_ids=subject.tensor(subject.prompts[0])).logits)  # fmt: skip
    assert moved > 1e-3, f"nothing was learned ({moved:.1e})"
    return f"loss {losses[min(losses)]:.3f} -> {losses[max(losses)]:.3f}, the result loads"


def full_zero3_resumed(subject: Subject) -> str:
    """A run under ZeRO 3 that is ended after its first step and started again reaches the losses of ZeRO 2."""
    output = subject.work / "full3"
    arguments = ("--train_type", "all", "--zero_stage", "3", "--learning_rate", "1e-3")
    interrupted = start_and_stop(subject, output, *arguments)
    losses = start(subject, output, *arguments)
    assert interrupted < len(losses), "the run was not interrupted"
    gap = same_losses(losses, losses_of(subject, "full2"), 10 * subject.bound)
    return f"resumed at step {interrupted} of {len(losses)}; {gap}"


def lora_resumed(subject: Subject) -> str:
    """A LoRA run that is ended after its first step and started again reaches the losses of the undisturbed one."""
    output = subject.work / "lora_resumed"
    arguments = ("--zero_stage", "2", "--learning_rate", "3e-3")
    interrupted = start_and_stop(subject, output, *arguments)
    losses = start(subject, output, *arguments)
    return f"resumed at step {interrupted}; {same_losses(losses, losses_of(subject, 'lora2'), 10 * subject.bound)}"


def start_and_stop(subject: Subject, output: Path, *arguments: str) -> int:
    """Start a run that a STOP file ends after a step; how many steps it made."""

    def stop_soon() -> None:
        while not (output / "log.txt").is_file():
            time.sleep(0.05)
        (output / "STOP").touch()

    threading.Thread(target=stop_soon, daemon=True).start()
    return max(start(subject, output, *arguments), default=0)
