"""The mounted folder: every path that a page names lies in it, and one walk says what it holds.

Nothing outside the folder is ever opened: names with `..`, absolute ones and links that lead out are answered as if
there was nothing. The walk follows no links and leaves out what holds no file that a page shows.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from llmops import files
from llmops.checkpoints import RUN_SETTINGS

T = TypeVar("T")

LOG_NAME = "log.txt"
STALE = 2.0  # seconds after which the folder is walked again
DEEPEST = 8  # folders below the mount
MOST_FOLDERS = 50_000
CACHED = 4096  # parsed files that are kept
PASSED = ("cache", "tensorboard", "merged", "samples")
PASSED_STARTS = (".", "checkpoint-", "global_step")
PAIRS_HEAD = 4096  # bytes that tell whether a JSON file holds the pairs of similar questions
DATA_SUFFIXES = (".jsonl", ".json", ".csv")


class NotFound(Exception):
    """There is nothing of this name under the mount, or nothing that may be shown."""


@dataclass
class Found:
    """Names below the mount, relative to it: folders of runs, and files by what they are."""

    runs: list[str] = field(default_factory=list)
    evaluations: list[str] = field(default_factory=list)
    predictions: list[str] = field(default_factory=list)
    pairs: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    truncated: bool = False


class Cached(Generic[T]):
    """What was made of files, kept while they have the same size and time of change; safe between threads."""

    def __init__(self, make: Callable[[Path], T], most: int = CACHED) -> None:
        self.make, self.most = make, most
        self.kept: dict[Path, tuple[tuple[int, int, int], T]] = {}
        self.lock = threading.Lock()

    def __call__(self, path: Path) -> T:
        stamp = stamp_of(path)
        with self.lock:
            known = self.kept.get(path)
        if known and stamp and known[0] == stamp:
            return known[1]
        value = self.make(path)
        if stamp:
            with self.lock:
                while len(self.kept) >= self.most:
                    self.kept.pop(next(iter(self.kept)))
                self.kept[path] = (stamp, value)
        return value


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """Inode, time of change and size of a file; None where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


class Mounted:
    """The folder that the console shows."""

    def __init__(self, root: Path) -> None:
        self.root = files.real(root)
        self.lock = threading.Lock()
        self.found, self.walked = Found(), float("-inf")
        self.is_pairs = Cached(holds_pairs)

    def inside(self, name: str) -> Path:
        """The path that a name stands for. Raises NotFound for everything that is not in the mount."""
        parts = name.split("/")
        if not name or "\0" in name or name.startswith("/") or ".." in parts or not files.encodable(name):
            raise NotFound(name)
        path = files.real(self.root / name)
        if self.root not in path.parents or not os.path.exists(path):
            raise NotFound(name)
        return path

    def file(self, name: str) -> Path:
        """As `inside`, for a regular file."""
        path = self.inside(name)
        if not files.is_file(path):
            raise NotFound(name)
        return path

    def folder(self, name: str) -> Path:
        """As `inside`, for a folder."""
        path = self.inside(name)
        if not files.is_folder(path):
            raise NotFound(name)
        return path

    def name_of(self, path: Path) -> str:
        """The name of a path in the mount."""
        return path.relative_to(self.root).as_posix()

    def look(self) -> Found:
        """What there is; walked again when the last walk is older than STALE."""
        with self.lock:
            if time.monotonic() - self.walked > STALE:
                self.found = self._walk()
                self.walked = time.monotonic()
            return self.found

    def _walk(self) -> Found:
        found = Found()
        for count, (folder, names) in enumerate(folders_of(self.root)):
            if count >= MOST_FOLDERS:
                found.truncated = True
                break
            here = "" if folder == self.root else self.name_of(folder) + "/"
            if here and (RUN_SETTINGS in names or LOG_NAME in names):
                found.runs.append(here[:-1])
            for name in names:
                self._sort_in(found, folder / name, here + name)
        for listed in (found.runs, found.evaluations, found.predictions, found.pairs, found.data):
            listed.sort()
        return found

    def _sort_in(self, found: Found, path: Path, name: str) -> None:
        base = path.name
        if base.startswith("eval_results") and base.endswith(".json"):
            found.evaluations.append(name)
        elif base.endswith(".jsonl") and "predictions" in base:
            found.predictions.append(name)
        elif base.endswith(".json") and self.is_pairs(path):
            found.pairs.append(name)
        elif base.endswith(DATA_SUFFIXES) and not base.endswith((".decisions.jsonl", ".cleaned.jsonl")):
            found.data.append(name)


def folders_of(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its regular files), breadth first; links are not followed, unreadable folders are passed."""
    level = [root]
    for _ in range(DEEPEST + 1):
        below: list[Path] = []
        for folder in level:
            names, folders = listing(folder)
            yield folder, names
            below += [folder / name for name in folders]
        level = below


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """(files, folders to look into) of a folder."""
    names, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not files.encodable(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in PASSED and not entry.name.startswith(PASSED_STARTS):
                        folders.append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    names.append(entry.name)
    except OSError:
        return [], []
    return sorted(names), sorted(folders)


def holds_pairs(path: Path) -> bool:
    """Whether a file begins as the similar-questions command writes it."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(PAIRS_HEAD)
    except OSError:
        return False
    return head.lstrip().startswith(b"{") and b'"mismatched_intents"' in head
