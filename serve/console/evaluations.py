"""Evaluation results as the commands of eval/ write them: scores with interval, floor and ceiling, their samples."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmops import files
from llmops.console import UserError
from serve.console.mount import KEPT_BYTES, SAMPLES, Cached, Mounted
from serve.console.runs import number, text

FIVE, PERFORMANCE = "evaluate_model_from_five_dimensions", "model_performance_evaluation"  # eval/answers.py's
DIMENSIONS = (
    "inference_ability", "reading_comprehension", "chinese_language_skill", "command_compliance", "innovation_capacity",
)  # fmt: skip
PERFORMANCE_SAMPLES = "model_performance"
CURE = "the evaluation commands write such a file"
BIGGEST = 256 << 20  # bytes of a file of samples or predictions
FILTERS = ("all", "right", "wrong", "differ", "better", "worse")


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
            "prompt": text(row.get("prompt")), "prediction": row["prediction"],
            "references": [r for r in references if isinstance(r, str)] if isinstance(references, list) else [],
            "scores": {k: v for k, v in section(row.get("scores")).items() if number(v) is not None},
            "cut": row.get("prompt_cut") is True, "ended": row.get("ended") is not False,
        })  # fmt: skip
    return rows


@dataclass(frozen=True)
class Asked:
    """A sample with what one or two models said to it (the same question is known by its id and group)."""

    row: Mapping[str, Any]
    other: Mapping[str, Any] | None
    score: float | None
    other_score: float | None

    def passes(self, chosen: str) -> bool:
        """Whether it belongs to one of FILTERS."""
        mine, theirs = self.score or 0.0, self.other_score or 0.0
        return {
            "right": mine >= 1, "wrong": mine < 1,
            "differ": self.other is not None and self.other["prediction"] != self.row["prediction"],
            "better": self.other is not None and mine > theirs, "worse": self.other is not None and mine < theirs,
        }.get(chosen, True)  # fmt: skip

    def has(self, wanted: str) -> bool:
        """Whether a text stands in it."""
        texts = [self.row["prompt"], self.row["prediction"], *self.row["references"], self.row["id"], self.row["group"]]
        return any(wanted in one.lower() for one in [*texts, self.other["prediction"] if self.other else ""])


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

    def asked(self, first: str, second: str, of: str) -> tuple[list[Asked], list[str]]:
        """(samples of a set with the answers of one or two results, metrics that they have)."""
        result = self.one(first)
        metric = result.scores[of].metric if of in result.scores else next(iter(result.scores), "")
        rows, metrics = self._set(first, of), Counter[str]()
        others = {key_of(row): row for row in self._set(second, of)} if second else {}
        found = []
        for row in rows:
            metrics.update(row["scores"])
            other = others.get(key_of(row))
            found.append(Asked(row, other, row["scores"].get(metric), other["scores"].get(metric) if other else None))
        return found, sorted(metrics, key=lambda name: (name != metric, name))

    def _set(self, name: str, of: str) -> list[dict[str, Any]]:
        if of not in self.one(name).sets:
            raise UserError(f"{name} has no samples of {files.shown(of)}")
        folder = name.rpartition("/")[0]
        return self.rows(self.mounted.file(f"{folder}/{SAMPLES}/{of}.jsonl" if folder else f"{SAMPLES}/{of}.jsonl"))


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """By what a question is the same in two results: the benchmark's id, else its place in the data."""
    return (row["group"], row["id"]) if row["id"] else ("", row["place"])


def labels_of(results: Sequence[tuple[str, Result]]) -> list[str]:
    """Short names of models; the folder's is added where two are the same."""
    seen = Counter(result.label for _, result in results)
    return [
        result.label if seen[result.label] == 1 else f"{result.label} ({name.rpartition('/')[0] or name})"
        for name, result in results
    ]
