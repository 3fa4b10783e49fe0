"""What is known of a training run from the files in its output_path. Nothing here starts or signals a process.

A run is `running` while its process holds the lock file, or, where the lock cannot be seen (another container or
machine writes there), while its log is fresh; `stopping` once it was also asked to stop; `finished` with its results;
else `stopped` when it ended with a checkpoint of its last step, and `interrupted` when it did not.
"""

import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from llmops import files
from llmops.console import UserError
from llmops.models.checkpoints import RUN_SETTINGS
from serve.console.mount import LOG_NAME, Cached, Mounted

RESULTS_NAME = "train_results.json"  # these names are train/run_folder.py's
STOP_NAME = "STOP"
LOCK_NAME = ".lock"
LOCKS = Path("/proc/locks")
FRESH = 30.0  # seconds since the log grew that still count as running
TAIL = 1 << 18  # bytes at the end of a log in which the last losses are looked for
PIECE = 4 << 20  # bytes of a log that one answer holds
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
MOST_STEPS = 1 << 53  # a browser counts no further
LOSSES = ("loss", "eval_loss", "retention_loss")
LAST = (*LOSSES, "tokens_per_second")
SETS = ("train", "test", "retention", "replay")  # of data, in the order of a run's page
COLUMNS = (
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "eval_loss", "eval_accuracy",
    "retention_loss",
)  # fmt: skip
RUNNING = ("running", "stopping")
STATES = (*RUNNING, "finished", "stopped", "interrupted")
Locks = set[tuple[int, int, int]]  # major and minor number of the device, inode


@dataclass(frozen=True)
class Tail:
    """The end of a log: its last line, the last of LAST by name, seconds between two lines."""

    line: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    interval: float = 0.0


@dataclass(frozen=True)
class Run:
    """A run as the list shows it; `share` from 0 to 1, `remaining` in seconds, None for what is not known."""

    name: str
    state: str
    step: int
    steps: int | None
    share: float | None
    epoch: float | None
    remaining: float | None
    losses: Mapping[str, float]
    before: Mapping[str, float]
    speed: float | None
    changed: float
    scenario: str
    train_type: str
    model: str


def number(value: Any) -> float | None:
    """A number that JSON and a double know, or None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return value if known else None  # NaN compares as False


def parsed(raw: bytes) -> dict[str, Any]:
    """A line of the log; {} for one that is none of ours."""
    value, problem = files.parse_line(raw) if raw.strip() else (None, "")
    return value if problem is None and is_line(value) else {}


def is_line(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a value is a line of the log."""
    step = value.get("step") if isinstance(value, dict) else None
    return isinstance(step, int) and 0 <= step <= MOST_STEPS


def parsed_lines(lines: list[bytes]) -> list[dict[str, Any]]:
    """The lines of a log that are ours: parsed as one, which takes a third of the time, else one by one."""
    values, problem = files.parse_line(b"[" + b",".join(line for line in lines if line.strip()) + b"]")
    if problem is None:
        return [value for value in values if is_line(value)]
    return [line for line in map(parsed, lines) if line]


def read_tail(path: Path) -> Tail:
    """Look at the end of a log, as far back as the last loss of every kind is; links are not followed."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - TAIL))
            lines = stream.read(TAIL).split(b"\n")[:-1]  # what follows the last line break is not whole
    except OSError:
        return Tail()
    last: dict[str, Any] = {}
    before: dict[str, Any] = {}
    values: dict[str, float] = {}
    for raw in reversed(lines if size <= TAIL else lines[1:]):
        wanted = [name for name in LAST if name not in values and f'"{name}"'.encode() in raw]
        if last and before and not wanted:
            continue
        line = parsed(raw)
        if not last:
            last = line
        elif not before:
            before = line
        values |= {name: line[name] for name in wanted if number(line.get(name)) is not None}
        if len(values) == len(LAST):
            break
    gap = (number(last.get("elapsed")) or 0.0) - (number(before.get("elapsed")) or 0.0)
    return Tail(last, values, max(0.0, gap))


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object of a run; {} for one that is damaged, a link or not there."""
    try:
        if path.is_symlink():
            return {}
        return files.read_object(path)
    except UserError:
        return {}


def held_locks() -> Locks:
    """Files that processes of this machine (and container) hold a lock on."""
    try:
        lines = LOCKS.read_text(encoding="ascii").splitlines()
    except OSError:
        return set()
    found = (re.search(r" FLOCK .* ([0-9a-f]+):([0-9a-f]+):(\d+) ", line) for line in lines)
    return {(int(match[1], 16), int(match[2], 16), int(match[3])) for match in found if match}


def is_held(path: Path, locks: Locks) -> bool:
    """Whether a file is among those that are locked."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    devices = {(major, minor) for major, minor, inode in locks if inode == found.st_ino}
    if not devices or (os.major(found.st_dev), os.minor(found.st_dev)) in devices:
        return bool(devices)
    mounted = mounted_device(path)
    return mounted is None or mounted in devices


def mounted_device(path: Path) -> tuple[int, int] | None:
    """The device of the file system that a file lies in: stat tells another one where there are subvolumes (btrfs).

    None: that cannot be told.
    """
    try:
        with open(path, "rb") as stream:
            told = Path(f"/proc/self/fdinfo/{stream.fileno()}").read_text(encoding="ascii")
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    place = re.search(r"^mnt_id:\s*(\d+)$", told, re.MULTILINE)
    line = re.search(rf"^{place[1]} \d+ (\d+):(\d+) ", mounts, re.MULTILINE) if place else None
    return (int(line[1]), int(line[2])) if line else None


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return sorted(int(match[1]) for match in map(CHECKPOINT.fullmatch, names) if match)


class Runs:
    """The runs of a mount. What was read of a file is kept while the file stays as it is."""

    def __init__(self, mounted: Mounted) -> None:
        self.mounted = mounted
        self.tail = Cached(read_tail)
        self.settings = Cached(read_settings)

    def newest(self) -> list[str]:
        """Names of all runs, the one that was written to last first."""
        return sorted(self.mounted.look().runs, key=lambda name: (-changed(self.mounted.root / name), name))

    def several(self, names: Iterable[str]) -> list[Run]:
        """Runs by name; one that is gone meanwhile is left out."""
        locks = held_locks()
        folders = [(name, self.mounted.root / name) for name in names]
        return [self._run(name, folder, locks) for name, folder in folders if files.is_folder(folder)]

    def one(self, name: str) -> Run:
        """A run by name. Raises mount.NotFound."""
        return self._run(name, self.mounted.folder(name), held_locks())

    def _run(self, name: str, folder: Path, locks: Locks) -> Run:
        tail, settings = self.tail(folder / LOG_NAME), self.settings(folder / RUN_SETTINGS)
        results = self.settings(folder / RESULTS_NAME)
        touched = changed(folder)
        step = int(tail.line.get("step", 0))
        state = state_of(folder, step, bool(results), touched, tail, locks)
        epoch, epochs = number(tail.line.get("epoch")), epochs_of(settings)
        steps = whole_steps(step, epoch, epochs, settings, results)
        remaining = number(tail.line.get("remaining")) if state in RUNNING else None
        if remaining is not None:
            remaining = max(0.0, remaining - (time.time() - touched))
        losses, before = {key: tail.values[key] for key in LOSSES if key in tail.values}, {}
        if results:  # of the weights that were kept, which need not be the last ones
            losses |= {key: value for key in LOSSES if (value := number(results.get(key))) is not None}
            told = {key: number(results.get(f"{key}_before")) for key in LOSSES}
            before = {key: value for key, value in told.items() if value is not None}
        return Run(
            name, state, step, steps, min(1.0, step / steps) if steps else None, epoch, remaining, losses, before,
            tail.values.get("tokens_per_second"), touched, text(settings.get("scenario")),
            text(settings.get("train_type")), text(settings.get("model_name_or_path")),
        )  # fmt: skip

    def about(self, name: str) -> dict[str, Any]:
        """Settings and data report of a run, for its page."""
        folder = self.mounted.folder(name)
        reports = {}
        for path in sorted((folder / "cache").glob("*/meta.json")):
            if files.same_or_inside(path, folder):
                reports[path.parent.name.rpartition("-")[0]] = self.settings(path)
        return {
            "settings": self.settings(folder / RUN_SETTINGS), "chosen": chosen(folder / LOG_NAME),
            "reports": {key: reports[key] for key in SETS if reports.get(key)},
        }  # fmt: skip

    def checkpoints(self, name: str) -> list[dict[str, Any]]:
        """The checkpoints of a run, ascending: {"step", "changed", "best"}."""
        folder = self.mounted.folder(name)
        best = self.settings(folder / RESULTS_NAME).get("best_step")
        return [
            {"step": step, "changed": changed(folder / f"checkpoint-{step}"), "best": step == best}
            for step in checkpoint_steps(folder)
        ]

    def log(self, name: str, offset: int, identity: str) -> dict[str, Any]:
        """Columns of the log from a byte on, up to its last whole line and at most PIECE bytes.

        `identity` is what the answer before said, a text because browsers round large numbers; where the log is another
        one by now (a resume writes it anew) or is shorter, the answer begins at 0 and `restart` is true. `more`: there
        is more to ask for at once.
        """
        path = self.mounted.folder(name) / LOG_NAME
        empty: dict[str, Any] = {key: [] for key in COLUMNS}
        if not files.is_file(path) or path.is_symlink():
            return {"offset": 0, "identity": "", "restart": offset > 0, "more": False, "columns": empty}
        with files.open_regular(path, "the log") as stream:
            found = os.fstat(stream.fileno())
            restart = offset > 0 and (identity != str(found.st_ino) or found.st_size < offset)
            start = 0 if restart else max(0, min(offset, found.st_size))
            stream.seek(start)
            piece = stream.read(PIECE)
        whole = piece[: piece.rfind(b"\n") + 1]
        rows = [row for row in parsed_lines(whole.split(b"\n")) if "chosen" not in row]
        columns = {key: [number(row.get(key)) for row in rows] for key in COLUMNS}
        stop = start + len(whole)
        more = bool(whole) and stop < found.st_size and len(piece) == PIECE
        return {"offset": stop, "identity": str(found.st_ino), "restart": restart, "more": more, "columns": columns}

    def ask_to_stop(self, name: str) -> None:
        """Put the STOP file into a run's folder. Raises UserError for a run that is not running."""
        run = self.one(name)
        if run.state not in RUNNING:
            raise UserError(f"{name} is not running ({run.state}), so there is nothing to stop")
        path = self.mounted.folder(name) / STOP_NAME
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
        except OSError as error:
            raise files.unwritable(path, error) from error


def text(value: Any) -> str:
    """A text of the settings, or ""."""
    return value if isinstance(value, str) else ""


def changed(folder: Path) -> float:
    """When a run was written to last: its log's time, else the folder's; 0 for one that is gone."""
    for path in (folder / LOG_NAME, folder):
        try:
            return os.stat(path).st_mtime
        except OSError:
            continue
    return 0.0


def chosen(path: Path) -> dict[str, Any]:
    """What the run chose by itself: the first line of its log."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
            found = parsed(stream.readline(TAIL)).get("chosen")
    except OSError:
        return {}
    return found if isinstance(found, dict) else {}


def state_of(folder: Path, step: int, finished: bool, touched: float, tail: Tail, locks: Locks) -> str:
    """One of STATES."""
    held = is_held(folder / LOCK_NAME, locks)
    asked = os.path.lexists(folder / STOP_NAME)
    saved = checkpoint_steps(folder)
    in_order = bool(saved) and saved[-1] >= step > 0
    fresh = time.time() - touched < max(FRESH, 3 * tail.interval) and not in_order
    if held or (fresh and not finished):
        return "stopping" if asked else "running"
    if finished:
        return "finished"
    return "stopped" if asked or in_order else "interrupted"


def epochs_of(settings: Mapping[str, Any]) -> float | None:
    """How many epochs a run was given, or chose where it was given none."""
    resolved = settings.get("resolved")
    found = resolved if isinstance(resolved, dict) else {}
    return number(settings.get("num_train_epochs")) or number(found.get("num_train_epochs"))


def whole_steps(
    step: int, epoch: float | None, epochs: float | None, settings: Mapping[str, Any], results: Mapping[str, Any]
) -> int | None:
    """How many steps the run has: told by its results or settings, else from the epochs that were done."""
    told = number(results.get("steps")) or number(settings.get("max_steps"))
    if told and told > 0:
        return int(told)
    return round(step * epochs / epoch) if epoch and epochs and step else None
