"""Shared parts of the peer benchmark drivers: flags, the clock, and the one-line JSON report.

Both peers train through a subclass of the ``transformers`` trainer, so one callback can time the training loop of
either of them in the same way: the clock runs from ``on_train_begin`` to ``on_train_end``, which leaves out imports,
model loading, tokenising, packing and the final save.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback

IGNORE_INDEX = -100
SEED = 42
LEARNING_RATE = 1e-4
LORA_RANK = 8
LORA_ALPHA = 16
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
END_OF_TURN = "<|im_end|>"


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that every driver shares."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="folder of a causal language model and its tokenizer")
    parser.add_argument("--data", required=True, help='jsonl file, one {"messages": [...]} object a line')
    parser.add_argument("--packing", choices=("off", "on"), default="off")
    parser.add_argument("--batch_size", type=int, default=8, help="rows (packed or not) per optimizer step")
    parser.add_argument(
        "--micro_batch_size",
        type=int,
        default=0,
        help="rows per forward pass, the rest of the batch is accumulated (0: the whole batch at once)",
    )
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--max_steps", type=int, default=0, help="optimizer steps (0: one epoch)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attn", choices=("sdpa", "eager"), default="sdpa", help="attention implementation")
    return parser


def prepare_environment(threads: int) -> None:
    """Fix the thread counts and keep every library offline; call this before the first heavy import."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def split_batch(batch_size: int, micro_batch_size: int) -> tuple[int, int]:
    """Return (rows per forward pass, accumulation steps) whose product is the batch size."""
    micro = micro_batch_size or batch_size
    if batch_size % micro:
        raise SystemExit(f"--micro_batch_size {micro} does not divide --batch_size {batch_size}")
    return micro, batch_size // micro


def load_conversations(path: str) -> list[list[dict[str, str]]]:
    """Read the messages of every line of a jsonl file."""
    with open(path, encoding="utf-8") as handle:
        return [json.loads(line)["messages"] for line in handle if line.strip()]


def trained_conversations(row_counts: Sequence[float], batch_size: int, steps: int) -> float:
    """Count the original conversations in the first ``steps`` batches of a data set that is read in order."""
    starts = range(0, len(row_counts), batch_size)
    per_batch = [sum(row_counts[start : start + batch_size]) for start in starts]
    epochs, rest = divmod(steps, len(per_batch))
    return epochs * sum(per_batch) + sum(per_batch[:rest])


@dataclass
class RunRecord:
    """What one training run leaves behind for the report."""

    seconds: float = 0.0
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    row_counts: list[float] = field(default_factory=list)
    supervised_first: int | None = None


def make_callback(record: RunRecord, count_rows: Callable[[Any], list[float]]) -> TrainerCallback:
    """Build the callback that fills ``record``; ``count_rows`` maps the data set to conversations per row."""
    from transformers import TrainerCallback

    class PeerClock(TrainerCallback):
        """Time the training loop and keep the logged losses."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loader = kwargs["train_dataloader"]
            record.row_counts = count_rows(loader.dataset)
            first = islice(iter(loader), args.gradient_accumulation_steps)
            # The first position is never predicted, so its label does not count.
            record.supervised_first = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in first)
            self.start = time.perf_counter()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
        ) -> None:
            if logs and "loss" in logs:
                record.losses.append(float(logs["loss"]))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            record.seconds = time.perf_counter() - self.start
            record.steps = state.global_step

    return PeerClock()


def print_report(
    peer: str, version: str, packing: str, batch_size: int, micro_batch_size: int, record: RunRecord,
    more: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Print the JSON report as the last line of standard output."""
    conversations = trained_conversations(record.row_counts, batch_size, record.steps)
    report = {
        "peer": peer,
        "version": version,
        "packing": packing,
        "seconds": round(record.seconds, 4),
        "samples_per_second": round(conversations / record.seconds, 4),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "first_loss": record.losses[0] if record.losses else None,
        "supervised_tokens_first_batch": record.supervised_first,
        "steps": record.steps,
        "micro_batch_size": micro_batch_size,
    }
    print(json.dumps(report | (more or {})), flush=True)
