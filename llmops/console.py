"""Messages for people on stderr, JSON for programs on stdout, errors that a user can mend, progress with ETA."""

import argparse
import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from types import TracebackType
from typing import Any, TypeVar

from llmops import json_text
from llmops.keyboard import instead, mistyped_flag
from llmops.translation import spoken

T = TypeVar("T")

EXIT_USER_ERROR = 2
FRAME = ("usage:", "\npositional arguments:\n", "\noptions:\n", "show this help message and exit")  # of --help
EXIT_TERMINATED = 143  # 128 + SIGTERM
EXIT_INTERRUPTED = 130  # 128 + SIGINT


class UserError(Exception):
    """A mistake the user can fix: one sentence (found, expected, how to fix it). `main` turns it into exit code 2."""

    code = EXIT_USER_ERROR


class RunStopped(Exception):
    """A run cannot go on, for a reason of run time (out of memory, NaN, full disk): one sentence, exit code 1."""


class Terminated(Exception):
    """The process was asked to end (SIGTERM, SIGINT) and did so in good order; `code` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"ended by signal {code - 128}")
        self.code = code


def to_bool(text: str) -> bool:
    """`true` or `false`, in any case, also 1/0 and yes/no."""
    lowered = text.strip().lower()
    if lowered in ("true", "1", "yes"):
        return True
    if lowered in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"found {text!r}, expected true or false")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one UserError."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; refused are a value that is -- alone, which it makes an empty list, and full-width marks."""
        for argument in sys.argv[1:] if args is None else args:
            flag, _, value = argument.partition("=")
            if flag.startswith("--") and value == "--":
                self.error(f"argument {flag}: found --, expected a value")
            mistyped = mistyped_flag(argument, self._option_string_actions)
            if mistyped:
                self.error(mistyped)
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """As argparse's, its frame in the people's language; the settings' own words are English (docs/settings.md)."""
        text = super().format_help()
        for words in FRAME:
            text = text.replace(words, spoken(words, sys.stdout.encoding), 1)
        return text

    def error(self, message: str) -> None:  # type: ignore[override]
        value = re.search("'(.*)'", message)
        raise UserError(f"{message}{instead(value[1]) if value else ''}; --help lists every setting")


def log(message: str) -> None:
    """Write a line for people to stderr in their language, whole, so that lines of several processes do not mix."""
    sys.stderr.write(spoken(message, sys.stderr.encoding) + "\n")
    sys.stderr.flush()


class ToPeople(io.FileIO):
    """Where messages go while somebody reads them: a terminal that was closed, or a `| tee` that Ctrl-C ended before
    this process, is no reason to stop what runs. Without a buffer, as `python -u` has it: the handler of a signal may
    log in the middle of another message."""

    def write(self, data: Any) -> int:
        """All of it, whatever a pipe takes at once; what cannot be written is dropped."""
        rest = memoryview(data)
        with suppress(OSError):
            while rest:
                written = super().write(rest)
                if written is None:  # another program has made the pipe one that does not wait
                    select.select([], [self], [])
                rest = rest[written or 0 :]
        return len(data)


def outlive_readers() -> None:
    """Let no message from here on fail because nobody reads stderr any more, or because the disk behind it is full."""
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:
        sys.stderr.flush()
        stream: Any = ToPeople(sys.stderr.fileno(), "w", closefd=False)
        sys.stderr = io.TextIOWrapper(stream, sys.stderr.encoding, sys.stderr.errors, write_through=True)


def run_main(body: Callable[[], int], speaks: bool = True) -> int:
    """Run `body` and turn the expected ends into an exit code; every other exception keeps its traceback.

    `speaks` is False on processes whose error another process reports already.
    """
    outlive_readers()
    try:
        return body()
    except UserError as error:
        if speaks:
            log(f"error: {error}")
        return error.code
    except RunStopped as error:
        log(f"\nstopped: {error}")  # found at run time on this very process, so it speaks on every rank
        return 1
    except Terminated as error:
        return error.code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def check_packages(*names: str) -> None:
    """Raise UserError where this Python lacks a package: a .py was started outside the environment."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UserError(
            f"{sys.executable} has no package {missing[0]}; run the .sh beside this command, which finds the Python "
            "that has it, or start it with .venv/bin/python"
        )


class FailureJson:
    """Context of a command whose documented JSON has a form for failures: says them in it and lets them go their way.

    `say` takes the exit code and the message. Faults of ours keep their traceback. Signals are no failures.
    """

    def __init__(self, say: Callable[[int, str], None]) -> None:
        self.say = say

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, UserError):
            self.say(error.code, str(error))
        elif isinstance(error, RunStopped):
            self.say(1, str(error))
        elif isinstance(error, Exception) and not isinstance(error, Terminated):
            self.say(1, f"{type(error).__name__}: {error}")


def print_json(value: Any) -> None:
    """One JSON value on one line of stdout, made whole before the first byte goes out."""
    write_stdout(json_text.dumps(value) + "\n")


def write_stdout(text: str) -> None:
    """Write to stdout at once and flush; a full disk behind it is a RunStopped, a reader that left ends quietly."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again at its end
        raise SystemExit(1) from None
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        raise RunStopped(f"stdout cannot be written ({error.strerror})") from error


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Hand file descriptor 1 to stderr while libraries that print (DeepSpeed's logger) are at work."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # nobody reads stderr any more; what is left in the buffer goes nowhere
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)
            sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def progress(
    items: Iterable[T], description: str, total: int | None = None, unit: str = "rows", silent: bool = False
) -> Iterator[T]:
    """Iterate with a progress bar and ETA on stderr; on a pipe or in a log file one line every ten seconds.

    Silent where tqdm is not installed yet: data is checked before anything is installed.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(items)
    terminal = sys.stderr.isatty()
    return iter(
        tqdm(
            items,
            desc=spoken(description, sys.stderr.encoding),
            total=total,
            unit=f" {spoken(unit, sys.stderr.encoding)}",
            file=sys.stderr,
            disable=silent,
            delay=0 if terminal else 2,
            mininterval=0.2 if terminal else 10,
            dynamic_ncols=terminal,
        )
    )


def duration(seconds: float) -> str:
    """`h:mm:ss` for people; at least `0:00:00`."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def has_gpu() -> bool:
    """Whether an NVIDIA device is visible, without importing torch."""
    from pathlib import Path

    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
