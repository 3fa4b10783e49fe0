"""A file that one process at a time holds, on this machine and on others that share the file system."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmops import files
from llmops.console import UserError

EVALUATION = ".evaluation.lock"  # in the folder of an evaluation while it runs


def unlockable(path: Path, error: OSError) -> UserError:
    """The error for a file system without locks: Lustre that was mounted without flock, NFS without a lock service."""
    return UserError(
        f"{path} cannot be locked ({error.strerror}): its file system has no locks; have it mounted with them "
        "(Lustre: -o flock), or choose a folder on another one"
    )


@contextmanager
def lock(path: Path, busy: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock file, alone among all processes and the nodes that share the file system; it stays when released.

    `busy` is the error's sentence when somebody else holds it, unless one may `wait` for them. Raises UserError, also
    where the file system has no locks.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise files.unwritable(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError as error:
            raise unlockable(path, error) from error
        yield
    finally:
        os.close(descriptor)
