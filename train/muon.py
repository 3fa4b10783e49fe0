"""DeepSpeed's Muon optimizer, whose functions are compiled when they are called, and not when they are looked at."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from deepspeed.runtime import compiler

Function = Callable[..., Any]


def compile_late() -> None:
    """Import the module of Muon with torch.compile put off.

    DeepSpeed imports it at every start to ask whether the optimizer is Muon, and compiling loads torch's inductor: a
    second on a CPU, where nothing else of a run needs it.
    """
    decorator = compiler.compile
    compiler.compile = lambda: late
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = decorator


def late(function: Function) -> Function:
    """`torch.compile(function)`, made at the first call."""
    compiled = cache(lambda: torch.compile(function))

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    return call
