"""What the dimensions share: their description, and readers that name file, line, what was found and expected."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.samples import Answer, Loaded, Sample
from llmops import files
from llmops.console import UserError

Scores = dict[str, float]
Asked = Sequence[tuple[Sample, Answer]]


@dataclass(frozen=True)
class Official:
    """What a benchmark's own script or submission wants: the file's name, and its text from the asked samples.

    `unlabelled` reads the samples without references that a submission is about, which lie beside the scored file.
    """

    name: str
    text: Callable[[Asked], str]
    unlabelled: Callable[[Path], list[Sample]] | None = None


@dataclass(frozen=True)
class Dimension:
    """One ability: its data, how an answer is scored (`metric` names the score that counts), what it may generate.

    `files` are patterns below a data folder, the first that fits is read; `unscored` those of files without answers;
    `get` says where the official files go. `baselines` are scores without a model. `ceiling` is (what it is, the best
    that can be expected of each sample, None where that is not known). `by_group` asks for a score per group (a
    subject) in the report.
    """

    name: str
    dataset: str
    files: tuple[str, ...]
    get: str
    read: Callable[[Path], Loaded]
    metric: str
    score: Callable[[str, Sample], Scores]
    baselines: Callable[[Sequence[Sample], int], Scores]
    ceiling: Callable[[Sequence[Sample]], tuple[str, list[float | None]]]
    max_new_tokens: int = 1
    by_group: bool = False
    unscored: tuple[str, ...] = ()
    official: Official | None = None

    def find(self, folder: Path) -> Path | None:
        """The data in a folder, or None. Raises UserError where only a file without answers lies."""
        for pattern in (*self.files, f"{self.name}.json*"):  # the last one: the names of the platform we come from
            found = sorted(folder.glob(pattern))
            if found:
                return found[0]
        for pattern in self.unscored:
            for path in sorted(folder.glob(pattern)):
                raise UserError(f"{path} has no answers to score by; put {self.get} beside it")
        return None

    def unread(self, sample: Sample, answer: Answer) -> bool:
        """Whether nothing in an answer can be scored."""
        return not sample.choices and not answer.text.strip("\"'“”。，,.、 \n")


def all_right(samples: Sequence[Sample]) -> tuple[str, list[float | None]]:
    """The ceiling of questions that have one right answer each."""
    return "every answer right", [1.0] * len(samples)


def read_json(path: Path) -> Any:
    """A JSON file."""
    return files.read_json(path, "the data file", "copy it again", files.DATA_LIMIT)


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) for every line that is not blank."""
    for number, value, problem in files.json_lines(path, "the data file"):
        if problem:
            raise UserError(f"{path}:{number}: {problem}; mend the line")
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number}: found {files.kind_of(value)}, expected an object")
        yield number, value


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """`read_jsonl`, or (row number, object) of a parquet file, as the Hugging Face hub keeps data sets."""
    if path.suffix != ".parquet":
        yield from read_jsonl(path)
        return
    import pyarrow
    from pyarrow import parquet

    with files.open_regular(path, "the data file") as stream:
        try:
            rows = parquet.read_table(stream).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is no parquet file ({type(error).__name__}); copy it again") from error
    yield from enumerate(rows, 1)


def text_of(record: dict[str, Any], key: str, where: str) -> str:
    """A value as text: numbers too, as the official files hold some. Raises UserError when it is not there."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise UserError(f"{where}: {key!r} is missing or no text (keys found: {keys})")
    return value if isinstance(value, str) else str(value)


def clean(text: str) -> str:
    """A generated answer without the words that models like to put before it."""
    text = text.strip()
    for lead in ("答案：", "答案:", "答：", "答:", "关键词：", "关键词:", "Question:", "问题："):
        text = text.removeprefix(lead).strip()
    return text


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)
