"""Imports of the heavy libraries (torch, transformers, DeepSpeed), made quick."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARY = 500  # modules that come with one


@contextmanager
def quick_imports(*unused: str) -> Iterator[None]:
    """Within the block no cycles are collected, and the packages `unused` count as not installed.

    A million objects come with the libraries and stay. Python would walk over them again and again on the way, which
    takes an eighth of the time, and at every full collection afterwards: they are frozen (gc.freeze). `unused` are
    packages that a library imports wherever it finds them; whoever asks for one after the block gets it, and one that
    is there already stays.
    """
    hidden = [name for name in unused if name not in sys.modules]
    enabled, before = gc.isenabled(), len(sys.modules)
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None: an import of it raises ImportError
    gc.disable()
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
        if enabled:
            if len(sys.modules) - before > LIBRARY:
                gc.freeze()
            gc.enable()
