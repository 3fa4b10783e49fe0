"""Processes that start others, and the signals that ask them to end."""

import ctypes
import signal

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel (Linux) to end this process when its parent ends, however that happens; for preexec_fn."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def to_heed() -> list[signal.Signals]:
    """The signals that ask for an end in good order: SIGHUP, of a terminal that is closed, unless nohup ignores it."""
    hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hung_up]
