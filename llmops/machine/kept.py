"""What a run over many samples keeps as soon as it is known, so that nothing is computed twice, whoever ends it.

Each process appends to a file of its own; all of them are read when a run is started again, in whatever number of
processes.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmops import files, json_text

Record = dict[str, Any]
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "config.json", "adapter_config.json", "tokenizer*", "chat_template*")


class Kept:
    """Records by their `key` in a folder, or nowhere when there is no folder.

    `read` makes a record of a parsed line, None of a line that is none.
    """

    def __init__(self, folder: Path | None, rank: int, read: Callable[[Any], Record | None]) -> None:
        self.folder, self.rank, self.read = folder, rank, read

    def kept(self, name: str) -> dict[str, Record]:
        """The records of earlier runs, by key. A line that a killed run left unfinished is passed over."""
        kept: dict[str, Record] = {}
        for path in self._files(name):
            for line in files.json_lines(path, "the answers"):
                record = self.read(line.value) if line.problem is None else None
                if record:
                    kept[record["key"]] = record
        return kept

    @contextmanager
    def appender(self, name: str) -> Iterator[Callable[[Record], None]]:
        """A function that adds a record to this process's file, out of this process's hands before it returns."""
        if not self.folder:
            yield lambda record: None
            return
        files.make_folder(self.folder, "the answers' folder")
        path = self.folder / f"{name}.process{self.rank}.jsonl"
        if path.is_file() and path.stat().st_size:
            files.append_text(path, "\n")  # a killed run may have left half a line
        with appending(path) as append:
            yield lambda record: append(json_text.dumps(record).encode() + b"\n")

    def drop(self, name: str) -> None:
        """Delete the files that the processes kept on the way."""
        for part in self._files(name):
            if part.name != f"{name}.jsonl":
                part.unlink()

    def _files(self, name: str) -> list[Path]:
        """The per-sample file and those of the processes, where they are."""
        if not self.folder or not self.folder.is_dir():
            return []
        ours = re.compile(re.escape(name) + r"(\.process\d+)?\.jsonl")
        return sorted(path for path in self.folder.iterdir() if ours.fullmatch(path.name))


@contextmanager
def appending(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A function that adds bytes to a file at once; what the disk says about it is a sentence."""
    try:
        with open(path, "ab", buffering=0) as stream:

            def append(line: bytes) -> None:
                if stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            yield append
    except OSError as error:
        raise files.unwritable(path, error) from error


def fingerprint(folders: Sequence[Path], *more: str) -> str:
    """Names a model: the files of its folders with size and time of change. Another model has another one."""
    present = {path for folder in folders for pattern in WEIGHTS for path in folder.glob(pattern)}
    found = sorted({files.real(path) for path in present if files.is_file(path)})  # loading tells about the others
    stats: list[Any] = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    return hashlib.sha256(json.dumps([stats, more]).encode()).hexdigest()[:24]
