"""Processes that start others."""

import ctypes
import signal

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel (Linux) to end this process when its parent ends, however that happens; for preexec_fn."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
