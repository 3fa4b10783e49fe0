"""Evaluation results as the commands of eval/ write them: scores with interval, floor and ceiling, their samples."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

from llmops import files
from llmops.console import UserError
from serve.console.mount import KEPT_BYTES, SAMPLES, Cached, Mounted, NotFound
from serve.console.runs import number, text

FIVE, PERFORMANCE = "evaluate_model_from_five_dimensions", "model_performance_evaluation"  # eval/answers.py's
DIMENSIONS = (
    "inference_ability", "reading_comprehension", "chinese_language_skill", "command_compliance", "innovation_capacity",
)  # fmt: skip
PERFORMANCE_SAMPLES = "model_performance"
CURE = "the evaluation commands write such a file"
BIGGEST = 256 << 20  # bytes of a file of samples or predictions
Row = Mapping[str, Any]
FILTERS = ("all", "right", "wrong", "unscored", "differ", "better", "worse", "unpaired")  # the first four of one result


@dataclass(frozen=True)
class Score:
    """A score from 0 to 1 with what it is to be held against; None for what the file does not tell."""

    value: float
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    ceiling: float | None = None
    floor_is: str = ""
    ceiling_is: str = ""
    samples: int | None = None
    metric: str = ""
    shipped: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """One results file. `scores` by dimension, or by metric for a data set of the user's."""

    name: str
    model: str
    label: str
    five: bool
    finished: bool
    seconds: float | None
    about: str
    scores: Mapping[str, Score]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sets(self) -> list[str]:
        """The names of its files of samples."""
        return list(self.scores) if self.five else [PERFORMANCE_SAMPLES]

    def shares(self, other: "Result", of: str) -> bool:
        """Whether another result has samples of the same set; of a data set, of a file of the same name."""
        mine, theirs = (Path(one.about).name for one in (self, other))
        return of in self.sets and of in other.sets and (self.five or not mine or not theirs or mine == theirs)


def section(value: Any) -> dict[str, Any]:
    """A JSON object, or an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def read_result(path: Path) -> Result:
    """A results file. Raises UserError for one that no evaluation wrote."""
    found = files.read_object(path, "the results", CURE)
    command, model = found.get("command"), text(found.get("model"))
    if command not in (FIVE, PERFORMANCE):
        raise UserError(f"{path.name} was written by no evaluation of this toolkit; {CURE}")
    five = command == FIVE
    scores = dimension_scores(found) if five else metric_scores(found)
    label = Path(model).name or path.parent.name
    about = "" if five else text(found.get("dataset_path"))
    return Result(
        "", model, label, five, found.get("finished", True) is True, number(found.get("seconds")), about, scores,
        section(found.get("settings")),
    )  # fmt: skip


def interval(metrics: Any, name: str) -> tuple[float | None, float | None, int | None]:
    """(low, high, samples) of a metric."""
    metric = section(section(metrics).get(name))
    bounds = metric.get("interval_95")
    low, high = map(number, bounds) if isinstance(bounds, list) and len(bounds) == 2 else (None, None)
    if low is None or high is None or low > high:
        low = high = None
    samples = metric.get("samples")
    return low, high, samples if isinstance(samples, int) else None


def dimension_scores(found: dict[str, Any]) -> dict[str, Score]:
    """Scores of the five dimensions, in their order."""
    scores = {}
    told = section(found.get("evaluation_results"))
    for dimension in [d for d in (*DIMENSIONS, *told) if number(told.get(d)) is not None]:
        part = section(section(found.get("dimensions")).get(dimension))
        floor, ceiling = section(part.get("floor")), section(part.get("ceiling"))
        notes = section(found.get("diagnosis")).get(dimension)
        notes = [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
        low, high, samples = interval(part.get("metrics"), text(part.get("metric")))
        scores[dimension] = Score(
            told[dimension], low, high, number(floor.get("score")), number(ceiling.get("score")),
            text(floor.get("what")), text(ceiling.get("what")), samples, text(part.get("metric")),
            part.get("shipped_sample") is True, tuple(notes),
        )  # fmt: skip
    return scores


def metric_scores(found: dict[str, Any]) -> dict[str, Score]:
    """Scores of a data set by metric; the floor is the best answer without a model."""
    scores = {}
    for metric, value in section(found.get("evaluation_results")).items():
        if number(value) is None:
            continue
        low, high, samples = interval(found.get("metrics"), metric)
        floors = {
            name: reached
            for name, of in section(found.get("baselines")).items()
            if (reached := number(section(of).get(metric))) is not None
        }
        best = max(floors, key=floors.__getitem__, default="")
        scores[metric] = Score(value, low, high, floors.get(best), 1.0, best, "", samples, metric)
    return scores


def refuse_large(path: Path) -> None:
    """Raise UserError for a file that is too large."""
    if path.stat().st_size > BIGGEST:
        raise UserError(
            f"{path.name} has more than {BIGGEST >> 20} MiB, too much for a page; look at it with other tools"
        )


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rows behind a score. Raises UserError for a file that is too large or no file of samples."""
    refuse_large(path)
    rows: list[dict[str, Any]] = []
    for line in files.json_lines(path, "the samples", CURE):
        row = line.value
        if line.problem or not isinstance(row, dict) or not isinstance(row.get("prediction"), str):
            raise UserError(f"{path.name}:{line.number}: {line.problem or 'no prediction'}; {CURE}")
        references = row.get("references")
        rows.append({
            "place": len(rows), "id": str(row.get("id", "")), "group": text(row.get("group")),
            "asked": text(row.get("asked")), "prompt": text(row.get("prompt")), "prediction": row["prediction"],
            "references": [r for r in references if isinstance(r, str)] if isinstance(references, list) else [],
            "scores": {k: v for k, v in section(row.get("scores")).items() if number(v) is not None},
            "cut": row.get("prompt_cut") is True, "ended": row.get("ended") is not False,
        })  # fmt: skip
    return rows


@dataclass(frozen=True)
class Asked:
    """A sample with what one or two models said to it; a score is None where there is none."""

    row: Mapping[str, Any]
    other: Mapping[str, Any] | None
    score: float | None
    other_score: float | None

    def passes(self, chosen: str) -> bool:
        """Whether it belongs to one of FILTERS. What was not scored is neither right nor wrong, better nor worse."""
        mine, theirs = (nan if score is None else score for score in (self.score, self.other_score))
        return {
            "right": mine >= 1, "wrong": mine < 1, "unscored": self.score is None,
            "differ": self.other is not None and self.other["prediction"] != self.row["prediction"],
            "better": mine > theirs, "worse": mine < theirs, "unpaired": self.other is None,
        }.get(chosen, True)  # fmt: skip

    def has(self, wanted: str) -> bool:
        """Whether a text stands in it."""
        texts = [self.row["prompt"], self.row["prediction"], *self.row["references"], self.row["id"], self.row["group"]]
        return any(wanted in one.lower() for one in [*texts, self.other["prediction"] if self.other else ""])


@dataclass(frozen=True)
class Samples:
    """A set's samples and the metrics that they have, the set's own first.

    Beside another result: how many of the `others` samples that one has are not here, and whether the `prompts` had to
    tell what is the same, which models of other chat formats word in other ways.
    """

    rows: list[Asked]
    metrics: list[str]
    others: int = 0
    lacking: int = 0
    prompts: bool = False

    @property
    def alone(self) -> int:
        """How many have nothing beside them."""
        return sum(row.other is None for row in self.rows)


class Evaluations:
    """The results of a mount."""

    def __init__(self, mounted: Mounted) -> None:
        self.mounted = mounted
        self.results = Cached(read_result)
        self.rows = Cached(read_samples, KEPT_BYTES)

    def all(self) -> Iterator[tuple[str, Result | None]]:
        """(name, result) of every results file; None for one that cannot be read."""
        for name in self.mounted.look().evaluations:
            try:
                yield name, self.results(self.mounted.file(name))
            except UserError:
                yield name, None

    def one(self, name: str) -> Result:
        """A result by name. Raises NotFound, UserError."""
        return self.results(self.mounted.file(name))

    def asked(self, first: str, second: str, of: str) -> Samples:
        """The samples of a set, with the answers of one or two results."""
        result = self.one(first)
        metric = result.scores[of].metric if of in result.scores else next(iter(result.scores), "")
        rows, metrics = self._set(first, of), Counter[str]()
        others = self._set(second, of) if second else []
        beside, prompts = paired(rows, others)
        found = []
        for row, other in zip(rows, beside, strict=True):
            metrics.update(row["scores"])
            found.append(Asked(row, other, row["scores"].get(metric), other["scores"].get(metric) if other else None))
        named = sorted(metrics, key=lambda name: (name != metric, name))
        lacking = len(others) - sum(other is not None for other in beside)
        return Samples(found, named, len(others), lacking, prompts)

    def has(self, name: str, of: str) -> bool:
        """Whether a result's samples of a set are there."""
        try:
            return of in self.one(name).sets and bool(self.mounted.file(samples_of(name, of)))
        except (NotFound, UserError):
            return False

    def beside(self, name: str, of: str, among: Iterable[tuple[str, Result | None]]) -> list[str]:
        """The names of other results whose samples of a set stand for the same data."""
        own = self.one(name)
        return [other for other, one in among if one and other != name and own.shares(one, of) and self.has(other, of)]

    def _set(self, name: str, of: str) -> list[dict[str, Any]]:
        if of not in self.one(name).sets:
            raise UserError(f"{name} has no samples of {files.shown(of)}")
        return self.rows(self.mounted.file(samples_of(name, of)))


def samples_of(name: str, of: str) -> str:
    """The name of the file of samples beside a result."""
    folder = name.rpartition("/")[0]
    return f"{folder}/{SAMPLES}/{of}.jsonl" if folder else f"{SAMPLES}/{of}.jsonl"


def paired(rows: Sequence[Row], others: Sequence[Row]) -> tuple[list[Row | None], bool]:
    """(what of the others was asked as each row was, None for nothing; whether only the prompts told that).

    The benchmark's id and group tell it, else the conversation as the evaluation wrote it down, else the prompt; the
    references have to be the same, too. A question that was asked twice is paired in the order of the data.
    """
    told = "asked" if all(row["asked"] or row["id"] for row in (*rows, *others)) else "prompt"
    waiting: dict[tuple[Any, ...], deque[Row]] = {}
    for row in others:
        waiting.setdefault(key_of(row, told), deque()).append(row)
    found: list[Row | None] = []
    for row in rows:
        alike = waiting.get(key_of(row, told)) if row["id"] or row[told] else None
        found.append(alike.popleft() if alike else None)
    return found, told == "prompt" and any(not row["id"] for row in rows)


def key_of(row: Row, told: str) -> tuple[Any, ...]:
    """By what a question is the same in two results."""
    return (row["group"], row["id"], "" if row["id"] else row[told], *row["references"])


def labels_of(results: Sequence[tuple[str, Result]]) -> list[str]:
    """Short names of models; the folder's is added where two are the same."""
    seen = Counter(result.label for _, result in results)
    return [
        result.label if seen[result.label] == 1 else f"{result.label} ({name.rpartition('/')[0] or name})"
        for name, result in results
    ]
