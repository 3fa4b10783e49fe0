"""A job's own folder: one start at a time in it, and what was told of the job's end."""

import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmops import files
from llmops.console import UserError
from llmops.machine.locks import unlockable

LOCK_NAME, STATE_NAME = "lock", "told.json"
LONGEST_WAIT = 900.0  # seconds for an earlier start of the same job to end: it may be saving a checkpoint
SENDING, TAKEN = "sending", "taken"


class Busy(UserError):
    """Another start of the job is at work: it will tell how that ends."""


@contextmanager
def alone(folder: Path, stopped: threading.Event, tell: Callable[[str], None]) -> Iterator[int]:
    """Hold the job's folder, with all commands that get the yielded descriptor, until the last of them has ended.

    A job that was killed and started again finds its old processes at work for a while. Raises Busy when they do not
    end, or when `stopped` is set; another UserError where the folder cannot be made.
    """
    files.make_folder(folder, "the job's folder")
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise files.unwritable(folder / LOCK_NAME, error) from error
    try:
        waited = 0.0
        while not taken(descriptor, folder / LOCK_NAME):
            if not waited:
                tell(f"an earlier start of this job is still at work in {folder}; waiting for its end")
            if stopped.wait(0.5) or waited > LONGEST_WAIT:
                raise Busy(f"another start of this job is at work in {folder}; wait for it, or choose another WORK_DIR")
            waited += 0.5
        yield descriptor
    finally:
        os.close(descriptor)


def taken(descriptor: int, path: Path) -> bool:
    """Whether the lock of this file is ours now. Raises UserError where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise unlockable(path, error) from error
    return True


class Told:
    """What this job's starts have told the platform: that a state is on its way, that it was taken."""

    def __init__(self, folder: Path, job: str, address: str) -> None:
        self.path = folder / STATE_NAME
        self.key = hashlib.sha256(f"{job}\n{address}".encode()).hexdigest()  # an address may hold a secret

    def read(self) -> tuple[str, str]:
        """(status, SENDING or TAKEN) of an earlier start of the same job; empty texts where there was none."""
        if not files.is_file(self.path):
            return "", ""
        found = files.read_object(self.path, "what the job has told", "it counts as not told")
        if found.get("to") != self.key:
            return "", ""
        return str(found.get("status")), str(found.get("how"))

    def write(self, status: str, how: str) -> None:
        """Keep it, on the disk before this returns."""
        files.write_json(self.path, {"to": self.key, "status": status, "how": how})
