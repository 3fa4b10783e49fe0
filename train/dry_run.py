"""--dry_run true: validate the data, show what is learned, estimate memory and time; no weight is loaded.

Memory of the weights' states: Rajbhandari et al. 2020 (ZeRO), section 3. Activations: Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models", section 4, without the attention matrix, which the
attention kernels do not store. Work: 2 FLOP per weight and token forward, twice that backward (Kaplan et al. 2020).
"""

import math
import os
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llmops import checkpoints
from llmops.console import duration, log
from llmops.loading import loading
from train.config import Config
from train.dataset import TokenDataset, describe

EXAMPLES = 3
MODEL_FLOPS_UTILISATION = 0.4  # published figures for tuned GPU training lie at 0.4 to 0.6
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """What the estimates need to know of a model. Counts of weights; `head` is vocabulary size."""

    weights: int
    trained: int
    hidden: int
    layers: int
    vocabulary: int


def model_shape(config: Config) -> Shape:
    """Count the weights of the model on the meta device, with LoRA where it is trained with LoRA."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    folder = Path(config.model_name_or_path)
    auto_class = checkpoints.causal_class(folder, config.trust_remote_code)
    with loading(f"the model's configuration in {folder}"):
        settings = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=config.trust_remote_code, local_files_only=True
        )
        with init_empty_weights():
            model = auto_class.from_config(settings, trust_remote_code=config.trust_remote_code)
    weights = trained = sum(p.numel() for p in model.parameters())
    if config.train_type == "lora":
        layers = checkpoints.choose_lora_layers(
            model, config.lora_module_name, checkpoints.lora_defaults(folder, config.mode)
        )
        head = model.get_output_embeddings()
        trained = sum(
            config.lora_dim * (module.in_features + module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head and name.rpartition(".")[2] in layers
        )
    text = settings.get_text_config()
    return Shape(weights, trained, text.hidden_size, text.num_hidden_layers, text.vocab_size)


def memory_parts(
    config: Config, shape: Shape, processes: int, tokens: int, learned: int, width: int
) -> dict[str, float]:
    """Peak memory per device in bytes, by part.

    `tokens`, `learned`: of the largest micro-batch; `width`: bytes per weight.
    """
    stage3 = config.zero_stage.startswith("3")
    offload = config.zero_stage == "3_offload"
    frozen = shape.weights - (shape.trained if config.train_type == "all" else 0)
    master = 8 if width == 4 else 12  # Adam's two moments, and the fp32 copy in mixed precision
    per_layer = tokens * shape.hidden * 34 / 2 * width  # 34 sbh bytes at two bytes per number
    if config.gradient_checkpointing:
        activations = shape.layers * tokens * shape.hidden * width + per_layer
    else:
        activations = shape.layers * per_layer
    resident = 0.0 if offload else 1.0
    return {
        "weights": ((frozen if config.train_type == "lora" else 0) + shape.trained)
        * width
        / (processes if stage3 else 1)
        * resident,
        "gradients": shape.trained * width / processes * resident,
        "optimizer states": shape.trained * master / processes * resident,
        "activations": activations,
        "logits": learned * shape.vocabulary * (width + 3 * 4),  # as computed, and in fp32 with softmax and gradient
    }


def largest_batch(config: Config, data: TokenDataset) -> tuple[int, int]:
    """(tokens, learned tokens) of the worst micro-batch: the longest conversations together, nothing shared."""
    size = config.per_device_train_batch_size
    longest = np.argsort(-data.lengths, kind="stable")[:size]
    return int(data.lengths[longest].sum()), sum(int(data[int(i)]["learned"].sum()) for i in longest)


def measured_flops() -> float:
    """FLOP/s of this machine's device in a matrix product of the kind that training does."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = 4096 if device == "cuda" else 768
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    if device == "cuda":
        torch.cuda.synchronize()
    started, rounds = time.perf_counter(), 20
    for _ in range(rounds):
        a @ b
    if device == "cuda":
        torch.cuda.synchronize()
    return 2 * size**3 * rounds / (time.perf_counter() - started)


def packed_tokens(config: Config, data: TokenDataset) -> float:
    """Share of tokens that packed batches compute, sampled over up to 20 batches: below 1 where prompts are shared."""
    if not config.packing:
        return 1.0
    from train.batches import PackedCollator

    size = config.per_device_train_batch_size
    order = np.random.default_rng(config.seed).permutation(len(data))[: 20 * size]
    collate = PackedCollator()
    computed = plain = 0
    for start in range(0, len(order), size):
        batch = collate([data[int(i)] for i in order[start : start + size]])
        computed += batch["input_ids"].shape[1]
        plain += int(batch["tokens"])
    return computed / plain


def show_example(tokenizer: Any, ids: np.ndarray, learned: np.ndarray, color: bool) -> str:
    """The text of a sample with the learned tokens in green (terminals) or in ⟦ ⟧."""
    start, end = ("\x1b[32m", "\x1b[0m") if color else ("⟦", "⟧")
    parts = []
    edges = [0, *(np.flatnonzero(np.diff(learned.astype(np.int8))) + 1).tolist(), len(ids)]
    for a, b in pairwise(edges):
        text = tokenizer.decode(ids[a:b])
        parts.append(f"{start}{text}{end}" if learned[a] else text)
    return "".join(parts)


def run(config: Config) -> None:
    """Print all of it on stderr."""
    from train import session

    data = session.prepare_data(config, encodes=True)
    log(f"\nchat format: {data.chat.name}\ntrain: {describe(data.train.meta)}")
    lengths = data.train.lengths
    marks = np.percentile(lengths, [0, 50, 90, 99, 100], method="nearest")
    log(
        "tokens per conversation: "
        + ", ".join(f"{n} {m}" for n, m in zip(("min", "median", "90%", "99%", "max"), marks, strict=True))
    )
    log(f"test: {len(data.test):,} conversations; retention: {len(data.retention):,}")
    color = sys.stderr.isatty()
    log(f"\nThe first {EXAMPLES} training examples, learned tokens {'in green' if color else 'in ⟦ ⟧'}:")
    for i in range(min(EXAMPLES, len(data.train))):
        one = data.train[i]
        head = (
            f"--- example {i + 1}, line {data.train.lines[data.train.indices[i]]}: "
            f"{len(one['ids'])} tokens, {int(one['learned'].sum())} learned"
        )
        log(f"{head}\n{show_example(data.tokenizer, one['ids'], one['learned'], color)}")
    estimate(config, data.train)


def estimate(config: Config, data: TokenDataset) -> None:
    """Print the estimates of memory and time, with what they rest on."""
    import torch

    shape = model_shape(config)
    gpus = torch.cuda.device_count()
    processes = int(os.environ.get("NUM_PROCESSES") or 0) or max(1, gpus)
    width = 4 if checkpoints.choose_dtype(config.dtype) == torch.float32 else 2
    tokens, learned = largest_batch(config, data)
    parts = memory_parts(config, shape, processes, tokens, learned, width)
    total = sum(parts.values())
    log(f"\nmodel: {shape.weights:,} weights, {shape.trained:,} trained ({config.train_type})")
    log(
        f"memory per {'GPU' if gpus else 'process'}, estimated for {processes} process(es), "
        f"ZeRO {config.zero_stage}: {total / GIB:.2f} GiB, beside the framework's own 1 to 2 GiB"
    )
    log("  " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items()) + " GiB")
    if gpus:
        capacity = torch.cuda.get_device_properties(0).total_memory
        verdict = (
            "fits"
            if total < 0.9 * capacity
            else "will probably not fit: lower the batch or the length, or use --zero_stage 3"
        )
        log(f"  {torch.cuda.get_device_name(0)} has {capacity / GIB:.0f} GiB: {verdict}")
    share = packed_tokens(config, data)
    epoch_tokens = int(data.lengths.sum())
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    steps = (
        config.max_steps
        if config.max_steps > 0
        else math.ceil(config.num_train_epochs * math.ceil(len(data) / per_step))
    )
    computed = steps * per_step / len(data) * epoch_tokens * share
    # forward, backward to the inputs, backward to the weights (LoRA: of the adapters only), forward again
    passes = 2 + (config.train_type == "all") + config.gradient_checkpointing
    flops = measured_flops() * (1.0 if not gpus else MODEL_FLOPS_UTILISATION / 0.7)
    seconds = 2 * shape.weights * computed * passes / flops / (processes if gpus else 1)
    saved = f"; shared prefixes leave {share:.0%} of the tokens to compute" if share < 0.98 else ""
    log(
        f"time: {steps:,} steps of {per_step} conversations, {computed:,.0f} tokens{saved}: "
        f"about {duration(seconds)} plus evaluation, from this machine's measured {flops / 1e12:.2f} TFLOP/s"
    )
    log("nothing was trained (--dry_run true)")
