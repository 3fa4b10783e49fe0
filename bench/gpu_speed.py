"""Parts of bench/gpu.sh on speed at known models' shapes with random weights: training by our Trainer, answers."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_bench import DEMO, Bench

from llmops import files
from llmops.models import tiny

SHAPES = {  # hidden, layers, heads, key/value heads, intermediate, vocabulary
    "7b": (4096, 32, 32, 32, 11008, 32000),
    "7b_part": (4096, 8, 32, 32, 11008, 32000),
    "13b": (5120, 40, 40, 40, 13824, 32000),
    "tiny": (64, 2, 4, 2, 176, 2000),
}
STEPS, DROPPED = 15, 5
LENGTHS = (200, 1000)  # tokens of the conversations that are timed


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
    with profile(activities=kinds) as record:
        bench.wait()
        started = time.perf_counter()  # the profiler's own start and end take longer than a step
        trainer.training_step(trainer.model_wrapped, step)
        bench.wait()
        seconds = time.perf_counter() - started
    layers = trainer.model.config.get_text_config().num_hidden_layers
    name = "CUDA" if bench.gpu else "CPU"
    # an annotation of DeepSpeed's or torch's is a range on the GPU, too
    events = [event for event in record.events() if event.device_type.name == name and not event.is_user_annotation]
    if not bench.gpu:
        return {"operators_per_layer": len(events) / layers / len(step["batches"])}
    busy = covered([(event.time_range.start, event.time_range.end) for event in events]) / 1e6
    return {"kernels_per_layer": len(events) / layers / len(step["batches"]), "idle": max(0.0, 1 - busy / seconds)}


def covered(ranges: list[tuple[float, float]]) -> float:
    """The length of what the ranges cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


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
