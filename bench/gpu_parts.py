"""One part of bench/gpu.sh: `python bench/gpu_parts.py PART --work FOLDER [--tiny]`; prints a JSON object per row."""

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from llmops import files, json_text
from llmops.console import log, stdout_to_stderr
from llmops.machine import devices
from llmops.models import tiny

DEMO = HERE.parent / "train" / "demo_data"
# dense bf16 FLOP/s as NVIDIA's data sheets give them
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}
SHAPES = {  # hidden, layers, heads, key/value heads, intermediate, vocabulary
    "7b": (4096, 32, 32, 32, 11008, 32000),
    "7b_part": (4096, 8, 32, 32, 11008, 32000),
    "13b": (5120, 40, 40, 40, 13824, 32000),
    "tiny": (64, 2, 4, 2, 176, 2000),
}
STEPS, DROPPED = 15, 5
LENGTHS = (200, 1000)  # tokens of the conversations that are timed


class Bench:
    """What every part needs: where to work, how small, and how to say a row."""

    def __init__(self, work: Path, small: bool, out: Any) -> None:
        import torch

        self.work, self.small, self.out = work, small, out
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
        """One row; a fault of torch's or the system's is the row's text, and the next row comes."""
        try:
            self.row(what=what, **work())
        except (RuntimeError, ValueError, OSError, subprocess.SubprocessError) as error:
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.row(what=what, failed=f"{type(error).__name__}: {text[:200]}")
        if self.gpu:
            import torch

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


# --- numerics


def numerics(bench: Bench) -> None:
    """Every kernel's output and gradients against float64, relative norms; bf16's own rounding is 4e-3."""
    import torch

    if not bench.gpu:
        flex_without_compiler()
    lengths = (300,) if bench.small else (1000, 4096)
    for heads, kv_heads, width in ((4, 4, 64), (8, 2, 64), (8, 2, 128), (9, 3, 64)):
        for length in lengths:
            for kernel in ("plain", "blocks", "flex"):
                bench.each(
                    f"{kernel}, {heads}/{kv_heads} heads of {width}, {length} tokens",
                    lambda h=heads, k=kv_heads, w=width, n=length, name=kernel: against_float64(
                        bench, h, k, w, n, name
                    ),
                )
    from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

    def cross_entropy() -> dict[str, Any]:
        logits = torch.randn(512, 32000, device=bench.device, dtype=bench.dtype, requires_grad=True)
        labels = torch.randint(32000, (512,), device=bench.device)
        exact = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
        found = chunked_cross_entropy(logits, labels, reduction="none")
        grads = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (exact, found)]
        return {"forward": relative(found, exact), "backward": relative(grads[1], grads[0])}

    bench.each("chunked cross entropy", cross_entropy)


def flex_without_compiler() -> None:
    """On a CPU FlexAttention refuses gradients, for want of a compiled backward pass; uncompiled it has one."""
    import torch.nn.attention.flex_attention as module

    module._validate_device = lambda *_: None
    module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True


def relative(found: Any, exact: Any) -> float:
    """The norm of the difference over the norm."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def tree(length: int, branches: int = 6) -> list[Any]:
    """A prompt that `branches` answers continue, and a conversation of its own."""
    from train.attention import Node

    trunk, rest = length // 3, length - length // 3
    cuts = [trunk + rest * i // (branches + 1) for i in range(branches + 1)]
    children = [Node(a, b, b) for a, b in itertools.pairwise(cuts)]
    return [Node(0, trunk, cuts[-1], children), Node(cuts[-1], length, length)]


def against_float64(bench: Bench, heads: int, kv_heads: int, width: int, length: int, kernel: str) -> dict[str, Any]:
    """Relative errors of one kernel on a small tree."""
    import torch

    from train.attention import Layout

    torch.manual_seed(0)
    layout = Layout(tree(length), length, flex=kernel == "flex").to(bench.device)
    inputs = [
        torch.randn(1, n, length, width, device=bench.device).to(bench.dtype) for n in (heads, kv_heads, kv_heads)
    ]
    exact = attend(bench, "plain", layout, [t.double() for t in inputs], length)
    found = attend(bench, kernel, layout, inputs, length)
    return {"forward": relative(found[0], exact[0])} | {
        f"d{name}": relative(a, b) for name, a, b in zip("qkv", found[1:], exact[1:], strict=True)
    }


def attend(bench: Bench, kernel: str, layout: Any, inputs: list[Any], length: int) -> list[Any]:
    """[output, three gradients] without padding."""
    from types import SimpleNamespace

    import torch

    from train import attention

    more = len(layout.end) - length if kernel == "flex" else 0
    q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, more)).requires_grad_() for t in inputs)
    groups = q.shape[1] // k.shape[1]
    if kernel == "plain":
        place, end = torch.arange(length, device=bench.device), layout.end[:length].to(bench.device)
        mask = (place[None, :] <= place[:, None]) & (place[:, None] < end[None, :])
        key, value = (t.repeat_interleave(groups, 1) for t in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, key, value, attn_mask=mask).transpose(1, 2)
    else:
        module = SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=True)
        out = attention.attention(module, q, k, v, None, layout=layout)[0]
    out = out[:, :length]
    weights = torch.linspace(-1, 1, length, device=bench.device, dtype=torch.float64)[None, :, None, None]
    grads = torch.autograd.grad((out.double() * weights).sum(), (q, k, v))
    return [out, *(g[:, :, :length] for g in grads)]


# --- whole runs


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
        sys.executable, str(HERE.parent / "train" / "finetune.py"), "--model_name_or_path", str(mount / "model"),
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
            sys.executable, str(HERE.parent / "train" / "finetune.py"), "--model_name_or_path", str(mount / "model"),
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


# --- speed


def shaped_folder(bench: Bench, shape: str) -> Path:
    """A model folder with configuration and tokenizer of a shape, and no weights: those are made on the device."""
    from transformers import LlamaConfig

    folder = bench.work / f"shape-{shape}"
    hidden, layers, heads, kv_heads, intermediate, vocabulary = SHAPES[shape]
    words = [f"{a}{b}" for a in "bdfghklmnprstvz" for b in "aeiou"]
    tiny.train_tokenizer([" ".join(words)] * 3, 500).save_pretrained(folder)
    LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=4096, pad_token_id=0,
        bos_token_id=None, eos_token_id=2, architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def timed_data(bench: Bench, count: int) -> Path:
    """Conversations of LENGTHS tokens, a third of them learned, that share nothing."""
    import random

    draw = random.Random(0)
    syllables = [f"{a}{b}" for a in "bdfghklmnprstvz" for b in "aeiou"]
    path, scale = bench.work / "timed.jsonl", 0.1 if bench.small else 1.0
    lines = []
    for _ in range(count):
        size = int(draw.randint(*LENGTHS) * scale)
        texts = [" ".join(draw.choices(syllables, k=n)) for n in (size * 2 // 3, size // 3)]
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
        lines.append(json.dumps({"messages": messages}))
    files.write_text(path, "\n".join(lines) + "\n")
    return path


def settings_of(bench: Bench, shape: str, kind: str, **more: Any) -> Any:
    """The settings of a timed run: 32 conversations a step, everything else as it is chosen."""
    from train.config import Config

    steps = 4 if bench.small else STEPS
    data = timed_data(bench, 32 if bench.small else 32 * 8)
    return Config(
        model_name_or_path=str(shaped_folder(bench, shape)), train_file=str(data), test_file=str(DEMO / "test.jsonl"),
        output_path=str(bench.work / "timed"), train_type=kind, per_device_train_batch_size=4 if bench.small else 16,
        gradient_accumulation_steps=2, max_steps=steps, max_seq_len=4096, overwrite_output_path=True, **more,
    )  # fmt: skip


def trained(bench: Bench, config: Any, profile: bool = False) -> dict[str, Any]:
    """The real Trainer and DeepSpeed on random weights; what the last steps took."""
    from transformers import TrainerCallback

    from llmops.models.chat_model import ChatModel
    from train import session
    from train.training_log import TrainingLog

    ChatModel.weights = lambda *_, **__: empty_base(config, bench)  # instead of files of many GB
    shutil.rmtree(config.output_path, ignore_errors=True)
    bench.memory_gib(start=True)
    data = session.prepare_data(config, encodes=True)
    trainer, schedule = session.build_trainer(config, data)
    schedule.evaluate = lambda: None
    schedule._evaluate_and_save = lambda *_: None
    trainer.remove_callback(TrainingLog)
    tokens, marks, dropped = [], [], 1 if bench.small else DROPPED
    step_of = trainer.training_step

    def step(model: Any, inputs: dict[str, Any], number: Any = None) -> Any:
        tokens.append((sum(b["input_ids"].numel() for b in inputs["batches"]), len(inputs["batches"])))
        return step_of(model, inputs, number)

    trainer.training_step = step

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            bench.wait()
            marks.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    seconds = marks[-1] - marks[dropped - 1]
    done = sum(count for count, _ in tokens[dropped:])
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
    per_token = (4 if config.train_type == "lora" else 6) * weights
    found = {
        "tokens_per_second": done / seconds, "mfu": done / seconds * per_token / bench.peak_flops(),
        "mfu_counts": "4NT" if config.train_type == "lora" else "6NT", "peak_gib": bench.memory_gib(),
        "micro_batches": tokens[-1][1], "tokens_per_step": tokens[-1][0],
        "recompute": trainer.chosen["gradient_checkpointing"],
        "attention": "flex" if "Flex" in trainer.chosen["attention"] else "blocks",
    }  # fmt: skip
    if profile:
        found |= profiled(bench, trainer)
    del trainer, schedule
    release(bench)
    return found


def empty_base(config: Any, bench: Bench) -> Any:
    """The base model with random weights, made on the device."""
    from dataclasses import replace

    from train.estimates import empty_model

    return empty_model(replace(config, train_type="all"), bench.dtype, device=bench.device)


def release(bench: Bench) -> None:
    """Give memory back between two runs of one process."""
    import gc

    import torch

    gc.collect()
    if bench.gpu:
        torch.cuda.empty_cache()


def profiled(bench: Bench, trainer: Any) -> dict[str, Any]:
    """One more step under torch's profiler: kernels per layer and micro-batch, and the share of idle time."""
    from torch.profiler import ProfilerActivity, profile

    step = next(iter(trainer.get_train_dataloader()))
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.gpu else [])]
    bench.wait()
    started = time.perf_counter()
    with profile(activities=kinds) as record:
        trainer.training_step(trainer.model_wrapped, step)
        bench.wait()
    seconds = time.perf_counter() - started
    layers = trainer.model.config.get_text_config().num_hidden_layers
    name = "CUDA" if bench.gpu else "CPU"
    events = [event for event in record.events() if event.device_type.name == name]
    if not bench.gpu:
        return {"operators_per_layer": len(events) / layers / len(step["batches"])}
    busy = sum(event.device_time_total for event in events) / 1e6
    return {"kernels_per_layer": len(events) / layers / len(step["batches"]), "idle": max(0.0, 1 - busy / seconds)}


def speed_lora_7b(bench: Bench) -> None:
    """The default, then one thing changed at a time."""
    shape = "tiny" if bench.small else "7b"
    bench.each("default", lambda: trained(bench, settings_of(bench, shape, "lora"), profile=True))
    ways: Iterator[tuple[str, dict[str, Any]]] = iter(
        [("every layer recomputed", {"gradient_checkpointing": "true"})]
        + [(f"micro-batches of {n} tokens", {"micro_batch_tokens": n}) for n in (1024, 4096, 8192, 16384)]
    )
    for name, more in list(ways)[: 2 if bench.small else None]:
        bench.each(name, lambda m=more: trained(bench, settings_of(bench, shape, "lora", **m)))


def speed_full_7b(bench: Bench) -> None:
    """Every weight: one GPU holds some layers of this width with their optimizer states."""
    shape = "tiny" if bench.small else "7b_part"
    bench.each("default", lambda: trained(bench, settings_of(bench, shape, "all"), profile=True))


def speed_lora_13b(bench: Bench) -> None:
    """A 13B model's adapter."""
    bench.each("default", lambda: trained(bench, settings_of(bench, "tiny" if bench.small else "13b", "lora")))


def peer_lora_7b(bench: Bench) -> None:
    """transformers and PEFT by hand on the same conversations: padded rows, labels, AdamW, no DeepSpeed."""
    config = settings_of(bench, "tiny" if bench.small else "7b", "lora")
    for recompute in (False, True):
        for rows in (2,) if bench.small else (4, 8, 16):
            name = f"{rows} rows at once{', recomputing' if recompute else ''}"
            bench.each(name, lambda r=rows, c=recompute: peer_run(bench, config, r, c))


def peer_run(bench: Bench, config: Any, rows: int, recompute: bool) -> dict[str, Any]:
    """Seconds and memory of steps of 32 conversations in micro-batches of `rows`."""
    import torch

    from train import session
    from train.estimates import empty_model

    shutil.rmtree(config.output_path, ignore_errors=True)
    data = session.prepare_data(config, encodes=True).train
    bench.memory_gib(start=True)
    model = empty_model(config, bench.dtype, device=bench.device).train()
    if recompute:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    size, count, dropped = (8, 3, 1) if bench.small else (32, 6, 2)
    marks, tokens = [], []
    for number in range(count):
        chosen = [data[(number * size + i) % len(data)] for i in range(size)]
        tokens.append(sum(len(sample["ids"]) for sample in chosen))
        for start in range(0, size, rows):
            model(**padded(chosen[start : start + rows], bench.device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bench.wait()
        marks.append(time.perf_counter())
    rate = sum(tokens[dropped:]) / (marks[-1] - marks[dropped - 1])
    weights = sum(p.numel() for p in model.parameters())
    found = {"tokens_per_second": rate, "mfu": rate * 4 * weights / bench.peak_flops(), "mfu_counts": "4NT",
             "peak_gib": bench.memory_gib()}  # fmt: skip
    del model, optimizer
    release(bench)
    return found


def padded(samples: list[Any], device: Any) -> dict[str, Any]:
    """Rows with labels as transformers takes them."""
    import torch

    longest = max(len(sample["ids"]) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, sample in enumerate(samples):
        n, row = len(sample["ids"]), torch.tensor(sample["ids"], dtype=torch.int64)
        ids[i, :n], mask[i, :n] = row, 1
        labels[i, :n] = torch.where(torch.tensor(sample["learned"]), row, -100)
    return {"input_ids": ids.to(device), "labels": labels.to(device), "attention_mask": mask.to(device)}


# --- kernels and prediction


def kernels(bench: Bench) -> None:
    """Forward and backward of attention and of the loss, in milliseconds."""
    import torch
    from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

    from train.attention import Layout

    if not bench.gpu:
        flex_without_compiler()
    for length in (256,) if bench.small else (4096, 16384):
        for kernel in ("blocks", "flex"):

            def attention(n: int = length, name: str = kernel) -> dict[str, Any]:
                layout = Layout(tree(n), n, flex=name == "flex").to(bench.device)
                heads = 4 if bench.small else 32
                inputs = [torch.randn(1, heads, n, 64, device=bench.device).to(bench.dtype) for _ in range(3)]
                return {"milliseconds": 1e3 * bench.seconds(lambda: attend(bench, name, layout, inputs, n), 3)}

            bench.each(f"attention in {kernel}, {length} tokens", attention)
    rows, vocabulary = (64, 2000) if bench.small else (8192, 128000)
    logits = torch.randn(rows, vocabulary, device=bench.device, dtype=bench.dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (rows,), device=bench.device)
    losses = {
        "chunked": lambda: chunked_cross_entropy(logits, labels, reduction="sum"),
        "plain": lambda: torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum"),
    }
    for name, loss in losses.items():

        def cost(work: Callable[[], Any] = loss) -> dict[str, Any]:
            bench.memory_gib(start=True)
            seconds = bench.seconds(lambda: torch.autograd.grad(work(), logits), 3)
            return {"milliseconds": 1e3 * seconds, "peak_gib": bench.memory_gib()}

        bench.each(f"{name} cross entropy, {rows} x {vocabulary}", cost)


def inference(bench: Bench) -> None:
    """Greedy answers with an adapter on the base model, and with it merged; then with too little memory."""
    import torch

    from llmops.generation.generator import Generator

    config = settings_of(bench, "tiny" if bench.small else "7b", "lora")
    from train.estimates import empty_model

    model = empty_model(config, bench.dtype, device=bench.device).eval()
    prompts = [[3 + (i * 7 + j) % 400 for j in range(40 + i % 9)] for i in range(8 if bench.small else 64)]
    limit = 8 if bench.small else 64

    def answer(one: Any) -> dict[str, Any]:
        generator = Generator(one, 0, len(prompts))
        started = time.perf_counter()
        tokens = sum(len(found.ids) for _, found in generator.generate(prompts, limit, [10**9]))
        bench.wait()
        return {"tokens_per_second": tokens / (time.perf_counter() - started), "batch": generator.batch_size}

    bench.each("adapter beside the base", lambda: answer(model))
    merged = model.merge_and_unload()
    bench.each("adapter merged", lambda: answer(merged))
    if bench.gpu:

        def squeezed() -> dict[str, Any]:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**28) / total)
            try:
                return answer(merged)
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)

        bench.each("256 MiB left: the batch is halved until it fits", squeezed)


PARTS: dict[str, Callable[[Bench], None]] = {
    "numerics": numerics, "runs": runs, "bare_path": bare_path, "speed_lora_7b": speed_lora_7b,
    "peer_lora_7b": peer_lora_7b, "speed_full_7b": speed_full_7b, "speed_lora_13b": speed_lora_13b,
    "kernels": kernels, "inference": inference,
}  # fmt: skip


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    devices.prepare_process(os.environ)
    args.work.mkdir(parents=True, exist_ok=True)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with stdout_to_stderr():
        PARTS[args.part](Bench(args.work, args.tiny, out))
    out.close()


if __name__ == "__main__":
    main()
