"""What an evaluation keeps in output_path: answers as soon as they are known, and which files there are its own.

Each process appends to a file of its own; all of them are read when a run is started again, so that nothing is answered
twice.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmops import files
from llmops.console import UserError

FIVE, PERFORMANCE = "evaluate_model_from_five_dimensions", "model_performance_evaluation"
RESULTS_NAME = "eval_results.json"
RADAR_NAME = "five_dimensions.png"
LOCK_NAME = ".evaluation.lock"
SAMPLES = "samples"
Record = dict[str, Any]


def is_record(value: Any) -> bool:
    """Whether a parsed line is an answer of ours, whole."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("key"), str)
        and isinstance(value.get("prediction"), str)
        and isinstance(value.get("ended"), bool)
        and isinstance(value.get("new_tokens"), int)
        and isinstance(value.get("loglikelihoods"), list)
        and all(isinstance(score, int | float) for score in value["loglikelihoods"])
    )


def check_foreign(folder: Path, names: Sequence[str], others: Sequence[str] = ()) -> None:
    """Raise UserError when a file that a run would replace was not written by an evaluation.

    `names` are the data sets with a per-sample file, `others` what is written after the results: where there are no
    results, such files are somebody else's.
    """
    results = folder / RESULTS_NAME
    cure = "was not written by an evaluation and would be replaced; choose another output_path"
    if results.exists():
        if writer_of(results) is None:
            raise UserError(f"{results} {cure}")
    elif strange := [name for name in others if (folder / name).exists()]:
        raise UserError(f"{folder / strange[0]} {cure}")
    for name in names:
        path = folder / SAMPLES / f"{name}.jsonl"
        first = next(files.json_lines(path, "the answers"), None) if path.exists() else None
        if first and not (isinstance(first.value, dict) and {"key", "prediction"} <= first.value.keys()):
            raise UserError(f"{path} {cure}")


def writer_of(results: Path) -> str | None:
    """The command of ours that wrote a results file."""
    found = files.read_json(results, "the results file", "choose another output_path")
    writer = found.get("command") if isinstance(found, dict) else None
    return writer if writer in (FIVE, PERFORMANCE) else None


def results_of(folder: Path, command: str) -> Path:
    """Where a command's results lie: under RESULTS_NAME, or aside where the other command wrote after it."""
    aside = folder / f"eval_results.{command}.json"
    return aside if aside.is_file() else folder / RESULTS_NAME


def write_results(folder: Path, command: str, results: Record) -> Path:
    """Write eval_results.json; one of the other command steps aside, under a name with that command's."""
    path = folder / RESULTS_NAME
    other = writer_of(path) if path.exists() else None
    if other and other != command:
        path.rename(folder / f"eval_results.{other}.json")
    files.write_json(path, results)
    (folder / f"eval_results.{command}.json").unlink(missing_ok=True)
    return path


class Answers:
    """The answers of one run in a folder, or nowhere when there is no folder."""

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self.folder = folder / SAMPLES if folder else None
        self.rank = rank

    def kept(self, name: str) -> dict[str, Record]:
        """The answers of earlier runs, by key. A line that a killed run left unfinished is passed over."""
        kept: dict[str, Record] = {}
        for path in self._files(name):
            for line in files.json_lines(path, "the answers"):
                if line.problem is None and is_record(line.value):
                    fields = ("key", "prediction", "loglikelihoods", "ended", "new_tokens")
                    kept[line.value["key"]] = {field: line.value[field] for field in fields}
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
            yield lambda record: append(files.dumps(record).encode() + b"\n")

    def finish(self, name: str, rows: Sequence[Record]) -> None:
        """Write the per-sample file, with scores, and drop the files that the processes kept on the way."""
        if not self.folder:
            return
        files.write_text(self.folder / f"{name}.jsonl", "".join(files.dumps(row) + "\n" for row in rows))
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
