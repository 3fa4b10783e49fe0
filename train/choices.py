"""What a run chooses by itself: its course, gradient checkpointing, the split of steps into micro-batches, kernels.

Chosen once by the first process, written down in output_path and kept when the run is continued, because the split
decides which numbers dropout draws; what memory decides is chosen anew with another number of processes, which have
other parts of a step. `docs/speed.md` says what is chosen when.
"""

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from llmops import files
from llmops.machine import cpu_kernels
from train.config import Config
from train.course import BETWEEN, NUMBER, RATE, USUAL, Course, choose
from train.dataset import TokenDataset
from train.estimates import GIB, Shape, memory_parts, model_shape
from train.replay import Joined, replayed
from train.run_folder import CONFIG_NAME, PROCESSES, RECORD, STEP_SETTINGS, step_size
from train.steps import Split

MOST_TOKENS = 16384  # more in a micro-batch are no faster
ENOUGH_TOKENS = 4096  # fewer leave a GPU waiting; for more of them no layer is recomputed, which costs a third and more
CPU_TOKENS = 2048  # more at once are no faster on a CPU, and need their memory
EVERY = (0, 4, 2, 1)  # none, each fourth, each second, each layer recomputed
RESERVE = 2 * GIB  # of a GPU: the context, NCCL, kernels' work space
USABLE = 0.9  # of the rest; the allocator loses some to fragments
SAMPLE = 512  # conversations that tell how much of a conversation is learned
LASTING = ("cpu_kernels", NUMBER, BETWEEN, RATE)  # choices that stay with another number of processes


@dataclass(frozen=True)
class Choices:
    """The resolved choices. `recompute`: every so-manieth layer is recomputed, 0: none. `kernel`: of `cpu_kernels`."""

    recompute: int
    split: Split
    kernel: str = cpu_kernels.DEFAULT
    course: Course = USUAL

    def to_json(self) -> dict[str, Any]:
        """As they are written down."""
        split = {f"micro_batch_{name}": value for name, value in asdict(self.split).items()}
        kernel = {"cpu_kernels": self.kernel}
        return self.course.to_json() | {"gradient_checkpointing": self.recompute} | split | kernel

    def words(self) -> str:
        """For people."""
        recomputed = {0: "no layer recomputed", 1: "every layer recomputed"}.get(
            self.recompute, f"one layer in {self.recompute} recomputed"
        )
        rows = f"{self.split.rows} conversations" if self.split.rows else ""
        tokens = f"{self.split.tokens:,} tokens" if self.split.tokens else ""
        return f"micro-batches of up to {' and '.join(filter(None, (rows, tokens))) or 'a whole step'}, {recomputed}"


def read_record(config: Config, processes: int) -> dict[str, Any]:
    """What an earlier start of this run chose; empty when there was none.

    Without the choices that memory and a process's part of a step decide, when these are others now. A run of an
    earlier version has the epochs of its settings, which had a number there in any case.
    """
    path = Path(config.output_path) / CONFIG_NAME
    if config.overwrite_output_path or not path.is_file():
        return {}
    saved = files.read_object(path, "the settings of the run")
    record = saved.get(RECORD)
    if not isinstance(record, dict):
        return {}
    same = record.get(PROCESSES, processes) == processes and all(
        saved.get(name, getattr(config, name)) == getattr(config, name) for name in STEP_SETTINGS
    )
    record = {NUMBER: saved.get(NUMBER)} | record
    return record if same else {name: record[name] for name in LASTING if name in record}


def resolve(
    config: Config, dtype: torch.dtype, data: TokenDataset | Joined, device: torch.device, processes: int,
    free: float | None = None,
) -> Choices:  # fmt: skip
    """What was asked for, else what an earlier start chose, else what is fastest here and fits into the memory.

    `free`: bytes that every process may use; without it, what this one may.
    """
    record = read_record(config, processes)
    cpu_kernels.settle(config.cpu_kernels)
    kernel = cpu_kernels.choose(device, dtype, record.get("cpu_kernels", ""))
    size = step_size(config, processes)
    own = len(data.train if isinstance(data, Joined) else data)
    course = choose(config, math.ceil(own / (size - replayed(size, config.replay_ratio))), record)
    return replace(fitting(config, dtype, data, device, processes, record, free), kernel=kernel, course=course)


def fitting(
    config: Config, dtype: torch.dtype, data: TokenDataset | Joined, device: torch.device, processes: int,
    record: dict[str, Any], free: float | None = None,
) -> Choices:  # fmt: skip
    """The choices that memory decides; `record` is what an earlier start chose."""
    every = record.get("gradient_checkpointing") if config.recompute is None else config.recompute
    rows, tokens = config.per_device_train_batch_size, config.micro_batch_tokens
    if tokens:
        rows = 0
    elif "micro_batch_rows" in record:
        rows, tokens = record.get("micro_batch_rows", rows), record.get("micro_batch_tokens", 0)
    elif device.type == "cuda":
        rows = 0
    else:
        tokens = CPU_TOKENS
    if every is not None and (rows or tokens):
        return Choices(every, Split(rows, tokens))
    shape, on_gpu = model_shape(config, dtype), device.type == "cuda"
    share = math.ceil(step_size(config, processes) / processes)
    free = free_memory(device) if free is None else free
    room = Room(config, shape, data, processes, free, on_gpu, share)
    if rows or tokens:
        return Choices(room.least_recomputing(*largest_micro_batch(data, rows, tokens)), Split(rows, tokens))
    return room.best(every)


def free_memory(device: torch.device) -> float:
    """Bytes that this process may use: of the GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] - RESERVE) * USABLE
    return psutil.virtual_memory().available * USABLE / int(os.environ.get("LOCAL_SIZE", "1"))


def largest_micro_batch(data: TokenDataset | Joined, rows: int, tokens: int) -> tuple[int, int]:
    """(tokens, learned tokens) of the worst micro-batch of a split, when nothing is shared."""
    longest = np.argsort(-data.lengths, kind="stable")[: rows or SAMPLE]
    ends = np.cumsum(data.lengths[longest])
    if tokens:
        longest = longest[: max(1, int(np.searchsorted(ends, tokens, side="right")))]
    return int(data.lengths[longest].sum()), sum(int(data[int(i)]["learned"].sum()) for i in longest)


def learned_share(data: TokenDataset | Joined) -> float:
    """The greatest share of learned tokens among some conversations."""
    places = np.linspace(0, len(data) - 1, min(SAMPLE, len(data)), dtype=np.int64)
    return max(float(data[int(i)]["learned"].mean()) for i in places)


class Room:
    """What fits into `free` bytes of this run."""

    def __init__(
        self, config: Config, shape: Shape, data: TokenDataset | Joined, processes: int, free: float, on_gpu: bool,
        share: int = 0,
    ) -> None:  # fmt: skip
        self.config, self.shape, self.data = config, shape, data
        self.processes, self.free, self.on_gpu = processes, free, on_gpu
        self.share = share or config.per_device_train_batch_size * config.gradient_accumulation_steps  # of a step

    def least_recomputing(self, tokens: int, learned: int) -> int:
        """The fewest layers to recompute so that a micro-batch of this size fits; every one when none does."""
        for every in self._every():
            parts = memory_parts(self.config, self.shape, self.processes, tokens, learned, every, self.on_gpu)
            if sum(parts.values()) <= self.free:
                return every
        return 1

    def best(self, every: int | None) -> Choices:
        """The fastest pair of recomputing and split that fits; `every` when that was asked for."""
        longest = int(self.data.lengths.max())
        wanted = max(longest, min(MOST_TOKENS, int(np.sort(self.data.lengths)[-self.share :].sum())))
        candidates = self._every() if every is None else (every,)
        for candidate in candidates:
            tokens = self.tokens(candidate)
            if tokens >= max(longest, min(wanted, ENOUGH_TOKENS)):
                return Choices(candidate, Split(0, max(longest, min(wanted, tokens))))
        return Choices(candidates[-1], Split(0, max(longest, min(wanted, self.tokens(candidates[-1])))))

    def tokens(self, every: int) -> int:
        """How many tokens of a micro-batch fit."""
        share, probe = learned_share(self.data), 1024
        states = sum(memory_parts(self.config, self.shape, self.processes, 0, 0, every, self.on_gpu).values())
        per_token = (self.shape.activations(probe, every) + self.shape.logits(int(probe * share), self.on_gpu)) / probe
        return max(0, int((self.free - states) / per_token))

    def _every(self) -> tuple[int, ...]:
        """Checkpoints' own code knows all layers or none."""
        return (0, 1) if self.config.trust_remote_code else EVERY
