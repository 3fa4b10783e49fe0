"""The states that a resume loads: DeepSpeed's and the Trainer's, which are pickles, loaded without running any code.

torch.load is held to weights_only (llmops/__init__.py), so a pickle is numbers, tensors and the few classes named here.
https://pytorch.org/docs/stable/notes/serialization.html#weights-only
"""

import pickle
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from transformers.trainer_pt_utils import safe_globals as numpy_globals

from train import checkpointing

# What DeepSpeed's states hold beside tensors, in all ZeRO stages: plain attributes and numbers, nothing that acts.
DEEPSPEED_GLOBALS = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)
PATTERNS = ("*.pt", "*.pth", "global_step*/*.pt")  # not training_args.bin: the Trainer writes it, nothing reads it
# What unpickling raises, for a pickle that asks for more than it may and for one that is none
UNLOADABLE = (
    pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError,
    OSError, MemoryError, OverflowError, struct.error,
)  # fmt: skip


def member(kind: Any, name: str) -> ZeroStageEnum:
    """What stands for `getattr` in a state: Python 3.11.0 to 3.11.3 pickle a member of an Enum as getattr(Enum, name).

    Raises UnpicklingError for anything but a member of DeepSpeed's stages.
    """
    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError("GLOBAL builtins.getattr of something else than a ZeRO stage")
    return ZeroStageEnum[name]


MEMBER = (member, "builtins.getattr")


@contextmanager
def loadable() -> Iterator[None]:
    """Within this context torch.load takes DeepSpeed's and the Trainer's states."""
    with ExitStack() as stack:
        stack.enter_context(torch.serialization.safe_globals([*DEEPSPEED_GLOBALS, MEMBER]))
        stack.enter_context(numpy_globals())
        yield


def problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be gone on from, or None: it is damaged, or a state holds what no run of ours writes.

    The states are unpickled here, their tensors only mapped into memory, so a large checkpoint costs little.
    """
    damage = checkpointing.damage(checkpoint)
    if damage:
        return damage
    with loadable():
        for path in sorted(path for pattern in PATTERNS for path in checkpoint.glob(pattern)):
            try:
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except UNLOADABLE as error:
                return f"{path.relative_to(checkpoint)} {refusal(error)}"
    return None


def refusal(error: Exception) -> str:
    """What is wrong with a state, in words."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        return f"asks for {found[1]}, which no state of a run has, so somebody else wrote it; nothing of it was run"
    return f"is no state of a run ({type(error).__name__}); nothing of it was run"
