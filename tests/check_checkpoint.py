"""The list that a checkpoint must pass, as a table. `bash tests/check_checkpoint.sh --help` says how to start it.

The reference is the checkpoint's own module (or transformers' native class) built directly and given the weight files'
tensors, in a process of its own that patches nothing.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint_check.generation_rows import batch_generation, cached_generation, vendors_chat, zero3_generation
from checkpoint_check.model_rows import (
    adapters,
    backward,
    chosen_logits,
    equals_reference,
    evaluation_writes_nothing,
    padded_logits,
    patches,
    recomputation,
    saved_again,
)
from checkpoint_check.reference import write_reference, write_zero3_answers
from checkpoint_check.subject import Subject
from checkpoint_check.tokenizer_rows import added_token, chat_format, padded_texts, round_trip, special_ids
from checkpoint_check.training_rows import full_zero2, full_zero3_resumed, lora_resumed, lora_zero2, lora_zero3, merged

from llmops.console import UserError, log
from llmops.models.checkpoints import Checkpoint

# what a broken checkpoint raises: its row fails, the other rows go on
EXPECTED = (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, OSError, RuntimeError, TypeError,
            UserError, ValueError)  # fmt: skip


TOKENIZER_ROWS: dict[str, Callable[[Subject], str]] = {
    "tokenizer ids equal the vocabulary's": special_ids,
    "encode and decode round trip": round_trip,
    "padded batch of texts": padded_texts,
    "an added token's id is free": added_token,
    "chat format": chat_format,
}
MODEL_ROWS: dict[str, Callable[[Subject], str]] = {
    "patches": patches,
    "logits and loss equal the module built directly": equals_reference,
    "padded equals unpadded": padded_logits,
    "logits at chosen positions": chosen_logits,
    "backward finite": backward,
    "gradient checkpointing": recomputation,
    "evaluation writes no weight": evaluation_writes_nothing,
    "LoRA": adapters,
    "save and reload": saved_again,
    "cached generation equals uncached": cached_generation,
    "batch generation equals single": batch_generation,
}
VENDOR_ROWS: dict[str, Callable[[Subject], str]] = {"the vendor's chat and stream_chat": vendors_chat}
TRAINING_ROWS: dict[str, Callable[[Subject], str]] = {
    "LoRA training, ZeRO 2": lora_zero2,
    "merge equals adapter": merged,
    "LoRA training, ZeRO 3": lora_zero3,
    "generation under ZeRO 3": zero3_generation,
}
SMALL_ROWS: dict[str, Callable[[Subject], str]] = {
    "full training, ZeRO 2": full_zero2,
    "full training, ZeRO 3, resumed": full_zero3_resumed,
}
LARGE_ROWS: dict[str, Callable[[Subject], str]] = {"LoRA training, resumed": lora_resumed}


def check(subject: Subject, training: bool) -> bool:
    """Print the table and how many of its rows are ok; whether all are."""
    rows = TOKENIZER_ROWS | MODEL_ROWS | (VENDOR_ROWS if hasattr(subject.model, "chat") else {})
    if training:
        rows = rows | TRAINING_ROWS | (SMALL_ROWS if subject.small else LARGE_ROWS)
    width = max(map(len, rows))
    failed = 0
    for name, row in rows.items():
        log(f"{name} ...")
        started = time.monotonic()
        try:
            mark, detail = "ok", row(subject)
        except EXPECTED as error:
            log(traceback.format_exc())
            failed += 1
            mark, detail = "FAIL", f"{type(error).__name__}: {str(error).strip()[:300]}"
        log(f"    {mark} after {time.monotonic() - started:.1f} s")
        print(f"| {name:<{width}} | {mark:<4} | {' '.join(detail.split())} |", flush=True)
    print(f"{len(rows) - failed} of {len(rows)} rows ok", flush=True)
    return not failed


@contextmanager
def work_folder(chosen: Path | None) -> Iterator[Path]:
    """A folder for what the runs write: the chosen one, kept, or a temporary one."""
    if chosen:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
        return
    folder = Path(tempfile.mkdtemp(prefix="check_checkpoint."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def main(argv: list[str] | None = None) -> int:
    """Check one folder; exit code 0 when every row is ok."""
    parser = argparse.ArgumentParser(description="Check that a chat model's checkpoint works here, row by row.")
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument("--mode", default="auto", help="chat format, as chat_main.sh takes it")
    parser.add_argument(
        "--dtype", default="auto", help="float32, float16, bfloat16; auto: config.json's on a GPU, else float32"
    )
    parser.add_argument("--processes", type=int, default=0, help="processes of a training run; 0: the GPUs, or 2")
    parser.add_argument(
        "--work", type=Path, help="where the runs write (kept); needs room for some copies of the model"
    )
    parser.add_argument("--no_training", action="store_true", help="leave out the runs of chat_main.sh")
    parser.add_argument("--reference", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--zero3_generation", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        if not (options.folder / "config.json").is_file():
            raise UserError(f"{options.folder} has no config.json; give the folder of a checkpoint")
        folder = options.folder.resolve()
        dtype = choose_dtype(options.dtype, Checkpoint(folder).config)
        if options.reference:
            write_reference(folder, *options.reference, dtype)
            return 0
        if options.zero3_generation:
            write_zero3_answers(folder, *options.zero3_generation, dtype)
            return 0
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with work_folder(options.work) as work:
            processes = options.processes or torch.cuda.device_count() or 2
            subject = Subject(folder, options.mode, dtype, processes, work, device)
            subject.open()
            return 0 if check(subject, not options.no_training) else 1
    except UserError as error:
        log(f"error: {error}")
        return 2


def choose_dtype(name: str, config: dict[str, Any]) -> torch.dtype:
    """The dtype of a name, or the checkpoint's own on a GPU."""
    if name == "auto":
        name = config.get("torch_dtype") or config.get("dtype") or "float32"
        name = name if torch.cuda.is_available() else "float32"
    name = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(name, name)
    if name not in ("float32", "float16", "bfloat16"):
        raise UserError(f"--dtype {name} is none of float32, float16, bfloat16")
    return getattr(torch, name)


if __name__ == "__main__":
    sys.exit(main())
