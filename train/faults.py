"""Expected faults of a training, each as one sentence: memory, disk, a state or a DeepSpeed file that is refused."""

import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

import pydantic
from safetensors import SafetensorError

from llmops import files
from llmops.console import RunStopped
from llmops.loading import is_out_of_memory
from train import states
from train.config import Config
from train.steps import Split

SHARED_MEMORY = "/dev/shm"


@contextmanager
def explain_faults(config: Config, split: Split) -> Iterator[None]:
    """Turn out of memory, a full disk, a foreign state, a refused DeepSpeed file and fp16's end into one sentence."""
    try:
        with ExitStack() as stack:
            stack.push(explain_scale)
            yield
    except pickle.UnpicklingError as error:
        raise RunStopped(f"a state of the checkpoint {states.refusal(error)}; remove that checkpoint") from error
    except pydantic.ValidationError as error:  # DeepSpeed's judgement of its file
        found = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise RunStopped(f"DeepSpeed refuses {config.deepspeed_file} ({found}); mend it") from error
    except ValueError as error:
        if "mismatch TrainingArguments" not in str(error):
            raise
        found = "; ".join(line.removeprefix("- ds ") for line in str(error).splitlines() if line.startswith("- "))
        raise RunStopped(
            f'{config.deepspeed_file} says otherwise than the settings ({found}); write "auto" there'
        ) from error
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise RunStopped(
                f"out of memory at {micro_batch(split)} and length {config.max_seq_len}; pass --micro_batch_tokens "
                f"{max(256, (split.tokens or split.rows * config.max_seq_len) // 2)} (it changes nothing that is "
                "learned) or --gradient_checkpointing true and start again to continue, use --zero_stage 3 or "
                "3_offload, or lower --max_seq_len"
            ) from error
        if lacks_space(error):
            raise full_disk(config) from error
        raise


@contextmanager
def explain_shared_memory() -> Iterator[None]:
    """Turn the end of NCCL, by which GPUs of one machine speak, in a container of Docker's 64 MiB into one sentence."""
    try:
        yield
    except RuntimeError as error:
        if SHARED_MEMORY not in str(error) or not os.path.isdir(SHARED_MEMORY):
            raise
        size = shutil.disk_usage(SHARED_MEMORY).total >> 20
        raise RunStopped(
            f"the GPUs' shared memory {SHARED_MEMORY} is too small with {size} MiB; start the container with "
            "--shm-size 64gb, or set NCCL_SHM_DISABLE=1, which is slower"
        ) from error


@contextmanager
def explain_end(config: Config) -> Iterator[None]:
    """Turn out of memory and a full disk into one sentence, while the result is written and merged."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise RunStopped(
                "out of memory while the result is written or merged; the checkpoints saved before are whole, free "
                "some memory and start again to continue"
            ) from error
        if lacks_space(error):
            raise full_disk(config) from error
        raise


def lacks_space(error: Exception) -> bool:
    """Whether a disk is full, in the words of Python, torch and safetensors."""
    if isinstance(error, RuntimeError) and SHARED_MEMORY in str(error):
        return False  # that is not the run's disk
    marks = ("No space left on device", "PytorchStreamWriter failed writing", "unexpected pos")
    return getattr(error, "errno", None) in files.FULL or any(mark in str(error) for mark in marks)


def full_disk(config: Config) -> RunStopped:
    """The sentence for it."""
    return RunStopped(
        f"the disk of {config.output_path} is full; the checkpoints saved before are whole, free some space "
        "and start again to continue"
    )


def explain_scale(kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
    """The end of DeepSpeed's loss scaler, whose error is a plain Exception, as one sentence."""
    if kind is Exception and "loss scale already at minimum" in str(error):
        raise RunStopped(
            "the gradients do not fit into fp16, not even at the smallest loss scale; pass --dtype bf16 (or fp32, "
            "where the GPU has no bf16) or a lower --learning_rate"
        ) from error
    return False


def micro_batch(split: Split) -> str:
    """The largest micro-batch in words."""
    return f"micro-batches of {split.tokens} tokens" if split.tokens else f"batch {split.rows}"
