"""What the dimensions share: their description, and readers that name file, line, what was found and expected."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.samples import Answer, Loaded, Sample
from llmops import files
from llmops.console import UserError

Scores = dict[str, float]


@dataclass(frozen=True)
class Dimension:
    """One ability: its data, how an answer is scored (`metric` names the score that counts), what it may generate.

    `files` are patterns below a data folder, the first that fits is read; `get` says where the official files go.
    `baselines` are scores without a model. `by_group` asks for a score per group (a subject) in the report.
    """

    name: str
    dataset: str
    files: tuple[str, ...]
    get: str
    read: Callable[[Path], Loaded]
    metric: str
    score: Callable[[str, Sample], Scores]
    baselines: Callable[[Sequence[Sample], int], Scores]
    max_new_tokens: int = 1
    by_group: bool = False

    def find(self, folder: Path) -> Path | None:
        """The data in a folder, or None."""
        for pattern in self.files:
            found = sorted(folder.glob(pattern))
            if found:
                return found[0]
        return None

    def unread(self, sample: Sample, answer: Answer) -> bool:
        """Whether nothing in an answer can be scored."""
        return not sample.choices and not answer.text.strip("\"'“”。，,.、 \n")


def read_json(path: Path) -> Any:
    """A JSON file."""
    return files.read_json(path, "the data")


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) for every line that is not blank."""
    for number, record, problem in files.json_lines(path, "the data", "copy it again"):
        if problem:
            raise UserError(f"{path}:{number}: {problem}; mend the line")
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: found {files.kind_of(record)}, expected an object")
        yield number, record


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
