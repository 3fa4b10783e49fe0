"""The mounted folder: every path that a page names lies in it, and one walk says what it holds.

Nothing outside the folder is ever opened: names with `..`, absolute ones and links that lead out are answered as if
there was nothing. The walk follows no links and leaves out what holds no file that a page shows.
"""

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from llmops import files, json_text
from llmops.machine.locks import EVALUATION
from llmops.models.checkpoints import RUN_SETTINGS

T = TypeVar("T")

LOG_NAME = "log.txt"
STALE = 2.0  # seconds after which the mount is walked again
REST = 50  # and at least so many times as long as the walk took: a training beside it needs the machine
DEEPEST = 8  # folders below the mount
MOST_FOLDERS = 50_000
CACHED = 4096  # parsed files that are kept
KEPT_BYTES = 64 << 20  # of files whose whole content is kept, in sum; the one that was used last is kept in any case
OF_A_RUN = ("cache", "tensorboard", "merged")  # folders that a run makes beside its settings
SAMPLES = "samples"  # the one that an evaluation makes beside its results
PASSED_STARTS = (".", "checkpoint-", "global_step")
SETTLED = 2_000_000_000  # nanoseconds: a folder that changed just now may change within the same tick of its clock
HEAD = 4096  # bytes that tell whether a file is a report for the curator
DATA_SUFFIXES = (".jsonl", ".json", ".csv")
CURATORS = (".decisions.jsonl", ".cleaned.jsonl", ".changes.json")  # what the curator writes beside data
NO_DATA = frozenset([  # what checkpoints and runs are made of
    RUN_SETTINGS, "adapter_config.json", "added_tokens.json", "chat_template.json", "config.json",
    "generation_config.json", "intents.json", "preprocessor_config.json", "run_manifest.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "train_results.json", "trainer_state.json",
    "vocab.json",
])  # fmt: skip


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
    """What was made of files, kept while they have the same size and time of change; safe between threads.

    Those that were not used for longest go first, when the files together have more than `most_bytes`.
    """

    def __init__(self, make: Callable[[Path], T], most_bytes: float = math.inf) -> None:
        self.make, self.most_bytes = make, most_bytes
        self.kept: dict[Path, tuple[tuple[int, int, int], T]] = {}
        self.lock = threading.Lock()

    def __call__(self, path: Path) -> T:
        stamp = stamp_of(path)
        with self.lock:
            known = self.kept.pop(path, None)
            if known and known[0] == stamp:
                self.kept[path] = known  # the last one now
                return known[1]
        value = self.make(path)
        if stamp:
            with self.lock:
                self.kept.pop(path, None)
                self.kept[path] = (stamp, value)
                size = sum(kept[0][2] for kept in self.kept.values())
                while len(self.kept) > 1 and (len(self.kept) > CACHED or size > self.most_bytes):
                    size -= self.kept.pop(next(iter(self.kept)))[0][2]
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
        self.found: Found | None = None
        self.due = float("-inf")
        self.listings: dict[str, Listing] = {}

    def inside(self, name: str) -> Path:
        """The path that a name stands for. Raises NotFound for everything that is not in the mount."""
        parts = name.split("/")
        if not name or "\0" in name or name.startswith("/") or ".." in parts or not json_text.encodable(name):
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
        """What there is. Known from the last walk; when that is old, another one begins meanwhile."""
        if self.found is None:
            with self.lock:
                if self.found is None:
                    self._walk()
        elif time.monotonic() > self.due and self.lock.acquire(blocking=False):
            threading.Thread(target=self._walk_aside, daemon=True).start()
        assert self.found is not None
        return self.found

    def _walk_aside(self) -> None:
        try:
            self._walk()
        finally:
            self.lock.release()

    def _walk(self) -> None:
        """Go through the folders, breadth first; those that did not change are not read again. Under the lock."""
        began = time.monotonic()
        found, listings = Found(), dict[str, Listing]()
        level = [str(self.root)]
        for _ in range(DEEPEST + 1):
            below: list[str] = []
            for folder in level:
                if len(listings) >= MOST_FOLDERS:
                    found.truncated = True
                    break
                listings[folder] = listing = listing_of(folder, self.listings.get(folder))
                self._sort_in(found, folder, listing)
                below += [f"{folder}/{name}" for name in listing.folders]
            level = below
        for listed in (found.runs, found.evaluations, found.predictions, found.pairs, found.data):
            listed.sort()
        self.listings, self.found = listings, found
        now = time.monotonic()
        self.due = now + max(STALE, REST * (now - began))

    def _sort_in(self, found: Found, folder: str, listing: "Listing") -> None:
        here = folder[len(str(self.root)) + 1 :]
        if here and listing.is_run:
            found.runs.append(here)
        for kind, names in listing.files.items():
            getattr(found, kind).extend(f"{here}/{name}" if here else name for name in names)


@dataclass(frozen=True)
class Listing:
    """What a folder held at a time of change: names of files by the kind of `Found`, folders to look into."""

    changed: int
    is_run: bool = False
    files: dict[str, list[str]] = field(default_factory=dict)
    folders: tuple[str, ...] = ()


def listing_of(folder: str, known: Listing | None) -> Listing:
    """A folder's listing; the known one where the folder did not change. Links are left out, and so is what is not
    readable.
    """
    try:
        changed = os.stat(folder).st_mtime_ns
        if known and known.changed == changed and time.time_ns() - changed > SETTLED:
            return known
        names, folders, kinds = [], [], dict[str, list[str]]()
        growing = False  # a file that a shell made for what a command is going to print
        with os.scandir(folder) as entries:
            for entry in entries:
                if not json_text.encodable(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith(PASSED_STARTS):
                        folders.append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    names.append(entry.name)
                    growing = growing or (entry.name.endswith(".json") and not entry.stat().st_size)
    except OSError:
        return Listing(-1)
    for name in names:
        if kind := kind_of(folder, name):
            kinds.setdefault(kind, []).append(name)
    evaluated = "evaluations" in kinds or EVALUATION in names  # one that has not ended yet holds its lock
    passed = (OF_A_RUN if RUN_SETTINGS in names else ()) + ((SAMPLES,) if evaluated else ())
    below = tuple(name for name in folders if name not in passed)
    return Listing(-1 if growing else changed, RUN_SETTINGS in names or LOG_NAME in names, kinds, below)


def kind_of(folder: str, name: str) -> str:
    """Which of the lists of `Found` a file belongs to; "" for none."""
    if name.endswith((*CURATORS, ".index.json")) or name in NO_DATA or not name.endswith(DATA_SUFFIXES):
        return ""
    if name.startswith("eval_results") and name.endswith(".json"):
        return "evaluations"
    path = Path(folder, name)
    if holds_suspects(path) or (name.endswith(".json") and holds_pairs(path)):
        return "pairs"
    if name.endswith(".jsonl") and "predictions" in name:
        return "predictions"
    return "data"


def holds_pairs(path: Path) -> bool:
    """Whether a file begins as the similar-questions command writes it."""
    head = head_of(path)
    return head.lstrip().startswith(b"{") and b'"mismatched_intents"' in head


def holds_suspects(path: Path) -> bool:
    """Whether a file begins as faq/score writes its suspects."""
    head = head_of(path)
    return head.startswith(b'{"line":') and b'"suggested":' in head


def head_of(path: Path) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return stream.read(HEAD)
    except OSError:
        return b""
