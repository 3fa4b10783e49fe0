"""--dry_run true: validate the data, show what is learned, estimate memory and time; no weight is loaded.

Memory: `train.estimates`. Time: some of the run's own micro-batches through one and through three layers of the model's
class with random weights, on this device and with the attention that the run would have; what that cannot hold is
reckoned: 2 FLOP per weight and token forward, twice that backward (Kaplan et al. 2020). It is the time of the process
that has most to do in a step; what processes tell each other over a network is left out.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
import psutil
import torch

from llmops.console import duration, log
from llmops.generation.capacity import base_of
from llmops.machine import cpu_kernels, devices
from train import attention, deepspeed_file, session
from train.batches import PackedCollator, PaddedCollator, target_losses, to_device
from train.choices import Choices, free_memory, resolve
from train.config import Config
from train.course import Course, course_words
from train.dataset import TokenDataset
from train.encoding import describe
from train.estimates import GIB, Shape, empty_model, memory_parts, model_shape, own_part
from train.replay import Joined, ReplayOrder, replayed
from train.run_folder import step_size
from train.session import Data
from train.steps import Split, StepCollator, StepSampler
from train.trainer import EpochSampler

EXAMPLES = 3
SAMPLED_STEPS = 20
TIMED_TOKENS = 1024  # of the micro-batch that is timed, if there is one that has so few
MODEL_FLOPS_UTILISATION = 0.4  # published figures for tuned GPU training lie at 0.4 to 0.6


@dataclass(frozen=True)
class Rates:
    """Seconds of one process per token of the rows that it computes, in a training pass and in an evaluation; and of
    its part of an optimizer step."""

    train: float
    evaluate: float
    step: float
    source: str


@dataclass(frozen=True)
class Processes:
    """How many processes a run has, and how many of them on its fullest machine; `here` share its cores."""

    all: int
    here: int

    @classmethod
    def planned(cls) -> "Processes":
        """As the launcher tells; without it one for each GPU, or one."""
        alone = max(1, torch.cuda.device_count())
        return cls(int(os.environ.get("WORLD_SIZE", alone)), int(os.environ.get("LOCAL_SIZE", alone)))

    @property
    def crowding(self) -> float:
        """How much longer a process takes on a CPU that all of a machine share than it does here, alone."""
        return max(1.0, self.here * torch.get_num_threads() / len(os.sched_getaffinity(0)))


def measured_flops() -> float:
    """FLOP/s of this machine's device in a matrix product of the kind that training does."""
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


class Sample:
    """Some of the run's own steps: what their micro-batches look like.

    `per_step`: tokens of a step's conversations; `busiest`: tokens that are computed in a step by the process that has
    most to do, with the micro-batches that it repeats because others have more of them.
    """

    def __init__(
        self, config: Config, data: Data, split: Split, processes: int, collate: PackedCollator | PaddedCollator
    ) -> None:
        packed = isinstance(collate, PackedCollator)
        size = step_size(config, processes)
        own = None if packed else size - replayed(size, config.replay_ratio)
        order = EpochSampler(data.train.lengths, config.seed, own, lambda: 0)
        again = ReplayOrder(data.learned, config.seed, lambda: 0) if isinstance(data.learned, Joined) else ()
        sampler = StepSampler(order, size, again, replayed(size, config.replay_ratio))
        steps = list(islice(sampler, SAMPLED_STEPS))
        samples = [[data.learned[int(i)] for i in step] for step in steps]
        collators = [StepCollator(collate, split, rank, processes) for rank in range(processes)]
        found = [[collator(step)["batches"] for collator in collators] for step in samples]
        computed = [[sum(batch["input_ids"].numel() for batch in own) for own in step] for step in found]
        self.busiest = sum(max(step) for step in computed) / len(steps)
        self.batches = [batch for step in found for own in step for batch in own if batch["tokens"]]
        self.per_step = sum(batch["tokens"] for batch in self.batches) / len(steps)
        self.computed = sum(batch["input_ids"].numel() for batch in self.batches)
        self.plain = sum(batch["tokens"] for batch in self.batches)

    @property
    def share(self) -> float:
        """Tokens that are computed over tokens of the conversations: below 1 where prompts are shared."""
        return self.computed / self.plain


def measured_rates(
    config: Config, shape: Shape, dtype: torch.dtype, device: torch.device, sample: Sample, choices: Choices,
    processes: int, how: str,
) -> Rates:  # fmt: skip
    """Time micro-batches through one layer and through three; half the difference is what a layer takes.

    Falls back on the product of matrices where three layers do not fit into half of the free memory. `how`: the rows
    and their attention, for people.
    """
    recompute = choices.recompute
    batch = min(sample.batches, key=lambda batch: abs(batch["input_ids"].numel() - TIMED_TOKENS))
    tokens = batch["input_ids"].numel()
    update = own_part(config, shape.trained, processes) * adam_seconds(device)
    three = (shape.weights / shape.layers * 3 + 2 * shape.vocabulary * shape.hidden) * shape.width
    if three * 2 > free_memory(device) / 2 or config.trust_remote_code:
        flops = measured_flops() * (1.0 if device.type == "cpu" else MODEL_FLOPS_UTILISATION / 0.7)
        forward = 2 * shape.weights / flops
        passes = 2 + (config.train_type == "all") + (1 / recompute if recompute else 0)
        return Rates(forward * passes, forward, update, f"this machine's {flops / 1e12:.2f} TFLOP/s")
    one, more = timed(config, dtype, device, batch)
    layer = [max(0.0, b - a) / 2 for a, b in zip(one, more, strict=True)]  # (forward and backward, forward alone)
    both, forward = (a + slope * (shape.layers - 1) for a, slope in zip(one, layer, strict=True))
    if recompute:
        both += layer[1] * (shape.layers // recompute)
    source = f"layers timed on this machine ({tokens:,} tokens; {how})"
    return Rates(both / tokens, forward / tokens, update, source)


def timed(
    config: Config, dtype: torch.dtype, device: torch.device, batch: dict[str, Any]
) -> tuple[list[float], list[float]]:
    """[seconds of forward and backward, seconds of a forward pass without gradients] of one layer, and of three.

    In turn and the best of each, so that what else runs here spoils none alone.
    """
    batch = to_device(batch, device)
    models = [empty_model(config, dtype, layers, device) for layers in (1, 3)]
    best = [[math.inf, math.inf], [math.inf, math.inf]]
    if "layout" in batch:
        for model in models:
            base_of(model).set_attn_implementation(attention.NAME)
    for attempt in range(4):
        for model, seconds in zip(models, best, strict=True):
            found = [
                seconds_of(partial(learn, model, batch), device),
                seconds_of(partial(torch.no_grad()(target_losses), model, batch), device),
            ]
            seconds[:] = [min(pair) for pair in zip(seconds, found, strict=True)] if attempt else seconds
    return best[0], best[1]


def learn(model: torch.nn.Module, batch: dict[str, Any]) -> None:
    """A forward and a backward pass."""
    target_losses(model, batch).mean().backward()


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """The seconds of a piece of work."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def adam_seconds(device: torch.device) -> float:
    """Seconds that DeepSpeed's optimizer step takes per trained weight: AdamW, and as much memory moved again."""
    weight = torch.zeros(4_000_000, device=device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=1e-4)
    return 2 * min(seconds_of(optimizer.step, device) for _ in range(4)) / weight.numel()


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
    data = session.prepare_data(config, encodes=True)
    log(f"\nchat format: {data.model.chat.name}\ntrain: {describe(data.train.meta)}")
    lengths = data.train.lengths
    marks = np.percentile(lengths, [0, 50, 90, 99, 100], method="nearest")
    log(f"tokens per conversation: min {marks[0]}, median {marks[1]}, 90% {marks[2]}, 99% {marks[3]}, max {marks[4]}")
    log(f"test: {len(data.test):,} conversations; retention: {len(data.retention):,}")
    if data.replay is not None:
        log(session.replay_words(config, data, step_size(config, Processes.planned().all)))
    else:
        log("nothing is done against forgetting; --replay_ratio 0.25 puts general conversations into every step")
    color = sys.stderr.isatty()
    log(f"\nThe first {EXAMPLES} training examples, learned tokens {'in green' if color else 'in ⟦ ⟧'}:")
    for i in range(min(EXAMPLES, len(data.train))):
        one = data.train[i]
        head = (
            f"--- example {i + 1}, {data.train.place(i)}: {len(one['ids'])} tokens, {int(one['learned'].sum())} learned"
        )
        log(f"{head}\n{show_example(data.model.tokenizer, one['ids'], one['learned'], color)}")
    estimate(config, data)


def estimate(config: Config, data: Data) -> None:
    """Print the estimates of memory and time, with what they rest on."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    processes = Processes.planned()
    dtype = devices.choose_dtype(config.dtype)
    shape = model_shape(config, dtype)
    choices = resolve(config, dtype, data.learned, device, processes.all)
    cpu_kernels.allow(choices.kernel)
    log(f"\nmodel: {shape.weights:,} weights, {shape.trained:,} trained ({config.train_type})\n{choices.words()}")
    model = empty_model(config, dtype)  # all of its layers: the kinds of the later ones decide, too
    collate, how = session.choose_collator(config, model, data.model.tokenizer, device, dtype)
    sample = Sample(config, data, choices.split, processes.all, collate)
    tell_memory(config, shape, choices, sample, processes.all, device)
    rates = measured_rates(config, shape, dtype, device, sample, choices, processes.all, how)
    tell_time(config, data, choices.course, sample, rates, processes, on_gpu)
    log("nothing was trained (--dry_run true)")


def tell_memory(
    config: Config, shape: Shape, choices: Choices, sample: Sample, processes: int, device: torch.device
) -> None:
    """The memory of the largest micro-batch among the sampled ones."""
    on_gpu = device.type == "cuda"
    largest = max(sample.batches, key=lambda batch: batch["input_ids"].numel())
    tokens, learned = largest["input_ids"].numel(), max(len(batch["labels"]) for batch in sample.batches)
    framework = 1.5 * GIB if on_gpu else float(psutil.Process().memory_info().rss)  # all libraries are loaded here
    parts = memory_parts(config, shape, processes, tokens, learned, choices.recompute, on_gpu)
    parts["framework"] = framework
    total = sum(parts.values())
    log(
        f"memory per {'GPU' if on_gpu else 'process'}, estimated for {processes} process(es), "
        f"ZeRO {deepspeed_file.stage(config)}, micro-batches of {tokens:,} tokens: {total / GIB:.2f} GiB"
    )
    log(f"  made up of {', '.join(f'{name} {size / GIB:.2f} GiB' for name, size in parts.items())}")
    if on_gpu:
        capacity = torch.cuda.get_device_properties(device).total_memory
        verdict = "fits" if total < 0.95 * capacity else "will probably not fit: use --zero_stage 3 or 3_offload"
        log(f"  {torch.cuda.get_device_name(device)} has {capacity / GIB:.0f} GiB: {verdict}")


def tell_time(
    config: Config, data: Data, course: Course, sample: Sample, rates: Rates, processes: Processes, on_gpu: bool
) -> None:
    """The time of all steps and of the evaluations between them."""
    per_step = step_size(config, processes.all)
    steps = config.max_steps if config.max_steps > 0 else course.all_steps
    tokens = int(data.train.lengths.sum()) / course.steps if data.replay is None else sample.per_step
    computed = steps * tokens * sample.share
    own = math.ceil(steps / (course.steps * course.between))
    evaluations = 1 + own + (steps // config.eval_steps if config.eval_steps else 0)
    batch = config.per_device_eval_batch_size
    held_out = sum(evaluated(found, batch, processes.all) for found in (data.test, data.retention)) * evaluations
    longer = 1.0 if on_gpu else processes.crowding
    training = steps * (tokens * sample.busiest / sample.per_step * rates.train + rates.step) * longer
    evaluating = held_out * sample.share * rates.evaluate * longer
    saved = f"; shared prefixes leave {sample.share:.0%} of the tokens to compute" if sample.share < 0.98 else ""
    log(
        f"time: {steps:,} steps of {per_step} conversations, {computed:,.0f} tokens{saved}: about "
        f"{duration(training)}, and {duration(evaluating)} for {evaluations} evaluations; from {rates.source}"
    )
    said = course_words(config, course)
    if said:
        log(said)


def evaluated(data: TokenDataset, batch: int, processes: int) -> int:
    """Tokens of the conversations that the first process has in an evaluation: the longest `batch` of each round."""
    lengths = np.sort(data.lengths)[::-1]
    return sum(int(lengths[start : start + batch].sum()) for start in range(0, len(lengths), batch * processes))
