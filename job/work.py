"""The command that does a job's work: its output passed on, the end of it kept, signals handed to it."""

import codecs
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from job.progress import without_brackets
from llmops.machine.processes import die_with_parent, to_heed
from llmops.translation import spoken

KEPT = 20_000  # characters of a command's messages: more than anybody is told
LONGEST_PIECE = 8192  # of a line that does not end
BY_SIGNAL = {code for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) for code in (128 + number, -number)}
GRACE = 1.0  # seconds: a scheduler that signals every process reaches this one a little later, perhaps


class Signals:
    """Remembers that this job was asked to end, and hands SIGTERM to the command that is at work."""

    def __init__(self) -> None:
        self.code = 0
        self.heeded: list[signal.Signals] = []
        self.stopped = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None

    def install(self) -> None:
        """Catch SIGTERM, SIGINT and SIGHUP from now on."""
        self.heeded = to_heed()
        for number in self.heeded:
            signal.signal(number, self._caught)

    def ignore(self) -> None:
        """The exit code is decided: a signal (the platform removes a container whose end it knows) changes it no more.

        Python's own end would take the handlers away and leave the process to die by the signal.
        """
        for number in self.heeded:
            signal.signal(number, signal.SIG_IGN)

    def watch(self, process: subprocess.Popen[bytes] | None) -> None:
        """This is the command at work; a signal that came before it is handed to it, too."""
        self.process = process
        if process and self.code:
            process.send_signal(signal.SIGTERM)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.code = self.code or 128 + number
        self.stopped.set()
        if self.process:
            self.process.send_signal(signal.SIGTERM)


class Output:
    """What people read: messages of the job and of its commands, on stderr; the end of them is kept.

    `clean` takes secrets out. With `platform` no line has brackets that the platform's reader would take for a loss.
    """

    def __init__(self, clean: Callable[[str], str], platform: bool) -> None:
        self.clean, self.platform = clean, platform
        self.kept = ""
        self.deaf = False
        self.lock = threading.Lock()

    def tell(self, message: str) -> None:
        """A message of the job's own."""
        self.write(message + "\n")

    def write(self, text: str) -> None:
        """Pass a piece of text on. A reader that left is no reason to stop."""
        text = self.clean(text)
        with self.lock:
            self.kept = (self.kept + text)[-KEPT:]
            if self.deaf:
                return
            try:
                told = spoken(text, sys.stderr.encoding)
                sys.stderr.write(without_brackets(told) if self.platform else told)
                sys.stderr.flush()
            except OSError:
                self.deaf = True

    def begin(self) -> None:
        """What follows is another command's: forget the end of the one before."""
        with self.lock:
            self.kept = ""

    @property
    def end(self) -> str:
        """The end of what was written, progress lines as lines."""
        return self.kept.replace("\r\n", "\n").replace("\r", "\n").strip()

    def pump(self, stream: BinaryIO) -> None:
        """Pass a command's messages on until it ends, line by line, so that no secret is cut in two."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        held = ""
        while piece := os.read(stream.fileno(), 65536):
            held += decoder.decode(piece)
            cut = max(held.rfind("\n"), held.rfind("\r")) + 1
            if not cut and len(held) > LONGEST_PIECE:
                cut = len(held)
            if cut:
                self.write(held[:cut])
                held = held[cut:]
        held += decoder.decode(b"", final=True)
        if held:
            self.write(held + "\n")


def run(
    command: Sequence[str], environment: Mapping[str, str], result: Path, output: Output, signals: Signals,
    held: Sequence[int] = (),
) -> int:  # fmt: skip
    """Run a command to its end: its stdout into a file, its stderr passed on; the exit code, negative for a signal.

    It ends when this process does, however that happens, and so does what it leaves behind. `held` are descriptors
    (of locks) that it holds as long as it lives.
    """
    output.begin()
    with open(result, "wb") as stdout:
        process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
            preexec_fn=die_with_parent, start_new_session=True, pass_fds=held,  # noqa: PLW1509
        )  # fmt: skip
    signals.watch(process)
    assert process.stderr
    reader = threading.Thread(target=output.pump, args=(process.stderr,), daemon=True)
    reader.start()
    code = process.wait()
    signals.watch(None)
    end_group(process.pid)
    reader.join(5)
    if code in BY_SIGNAL:
        signals.stopped.wait(GRACE)
    return code


def end_group(leader: int) -> None:
    """Ask what is left of a command's process group to end."""
    try:
        os.killpg(leader, signal.SIGTERM)
    except ProcessLookupError:
        return
