"""What libraries raise over damaged files of a model, as one sentence.

transformers, tokenizers, safetensors, torch and PEFT check little of what a checkpoint's files hold, so a damaged one
makes them raise almost any type: KeyError, TypeError, Rust's bare Exception, even a panic that is no Exception.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from llmops.console import RunStopped, Terminated, UserError

ROOT = Path(__file__).resolve().parent.parent
OWN_PACKAGES = tuple(f"{ROOT / name}{os.sep}" for name in ("llmops", "train", "faq", "eval", "serve"))
CAUSE_LIMIT = 300  # characters of a library's message
# in the words of torch, of the kernel, and of CUDA, cuBLAS and NCCL, which torch passes on
NO_MEMORY = (
    "can't allocate memory", "Cannot allocate memory", "CUDA out of memory", "not enough memory",
    "error: out of memory", "'out of memory'", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip


@contextmanager
def loading(what: str, cure: str = "copy the folder again") -> Iterator[None]:
    """Turn whatever libraries raise over damaged files into a UserError: "`what` cannot be loaded (cause); `cure`".

    To be put around calls of libraries on a user's files and nothing else. Too little memory is a RunStopped. An error
    that was raised by a line of this project is a fault of ours and passes with its traceback.
    """
    try:
        yield
    except (UserError, RunStopped, Terminated, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of tokenizers' Rust code derives from BaseException
        if is_out_of_memory(error):
            raise RunStopped(f"there is not enough memory: {what} could not be loaded ({cause(error)})") from error
        if is_ours(error):
            raise
        if isinstance(error, UnpicklingError):
            why = refused_pickle(error)
            raise UserError(f"{what} cannot be loaded: {why}; copy it from a source you trust") from error
        if isinstance(error, ImportError):
            raise UserError(f"{what} wants a package that is not here: {missing_package(error)}") from error
        raise UserError(f"{what} cannot be loaded ({cause(error)}); {cure}") from error


def missing_package(error: ImportError) -> str:
    """What a checkpoint's own code imports and this machine lacks, and how to get it."""
    if error.name:
        return f"pip install {error.name}"
    found = re.search(r"environment: (.+?)\. Run `(.+?)`", str(error))  # transformers looks before it imports
    return found[2] if found else cause(error)


def refused_pickle(error: UnpicklingError) -> str:
    """Why torch would not load a pickle: the code it asks for, or that it is none."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        return f"a file asks for {found[1]}, which weights do not need; nothing of it was run"
    return "a .bin file is damaged, or no weights file"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, the machine's or a GPU's, did not suffice."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and any(mark in str(error) for mark in NO_MEMORY)


def is_ours(error: BaseException) -> bool:
    """Whether the line that raised an error is one of this project's."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(OWN_PACKAGES)


def cause(error: BaseException) -> str:
    """An error's cause on one line for within a sentence: the kind where the text alone says little, cut if long."""
    line = first_line(error)
    line = "".join(character if character.isprintable() else "?" for character in line)
    line = line if len(line) <= CAUSE_LIMIT else f"{line[:CAUSE_LIMIT]}…"
    return line if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {line}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
