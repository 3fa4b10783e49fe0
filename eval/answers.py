"""What an evaluation keeps in output_path: answers as soon as they are known, and which files there are its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmops import files, json_text
from llmops.console import UserError
from llmops.machine.kept import Kept, Record

FIVE, PERFORMANCE = "evaluate_model_from_five_dimensions", "model_performance_evaluation"
RESULTS_NAME = "eval_results.json"
RADAR_NAME = "five_dimensions.png"
SAMPLES = "samples"
OTHERS = ".others.jsonl"  # after the name of a data set: answers that the last run did not ask for
FIELDS = ("key", "prediction", "loglikelihoods", "ended", "new_tokens")


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


def check_foreign(folder: Path, names: Sequence[str], others: Sequence[str] = (), exports: Sequence[str] = ()) -> None:
    """Raise UserError when a file that a run would replace was not written by an evaluation.

    `names` are the data sets with a per-sample file, `others` what is written after the results, `exports` what is
    written after a per-sample file: where that is not there, such files are somebody else's.
    """
    results = folder / RESULTS_NAME
    cure = "was not written by an evaluation and would be replaced; choose another output_path"
    if results.exists():
        if writer_of(results) is None:
            raise UserError(f"{results} {cure}")
    else:
        asked = any((folder / SAMPLES / f"{name}.jsonl").exists() for name in names)
        if strange := [name for name in (*others, *(() if asked else exports)) if (folder / name).exists()]:
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


class Answers(Kept):
    """The answers of one run in a folder, or nowhere when there is no folder; `model` is the model's fingerprint."""

    def __init__(self, folder: Path | None, rank: int = 0, model: str = "") -> None:
        super().__init__(folder / SAMPLES if folder else None, rank, answer_of)
        self.model = model

    def finish(self, name: str, rows: Sequence[Record]) -> None:
        """Write the per-sample file, with scores, and drop the files that the processes kept on the way.

        Answers of the same model that this run did not ask for (it had a limit) are kept beside it.
        """
        if not self.folder:
            return
        asked = {row["key"] for row in rows}
        rest = [one for key, one in self.kept(name).items() if key not in asked and one["model"] == self.model]
        if rest:
            write_lines(self.folder / f"{name}{OTHERS}", rest)
        write_lines(self.folder / f"{name}.jsonl", [row | {"model": self.model} for row in rows])
        if not rest:
            (self.folder / f"{name}{OTHERS}").unlink(missing_ok=True)
        self.drop(name)

    def drop(self, name: str) -> None:
        """Delete the files that the processes kept on the way."""
        for part in super()._files(name):
            if part.name != f"{name}.jsonl":
                part.unlink()

    def _files(self, name: str) -> list[Path]:
        others = self.folder / f"{name}{OTHERS}" if self.folder else None
        return [*super()._files(name), *([others] if others and others.is_file() else [])]


def write_lines(path: Path, rows: Sequence[Record]) -> None:
    """Write a jsonl file."""
    files.write_text(path, "".join(json_text.dumps(row) + "\n" for row in rows))


def answer_of(value: Any) -> Record | None:
    """The answer in a line, without the scores that the per-sample file adds."""
    return {field: value[field] for field in FIELDS} | {"model": value.get("model")} if is_record(value) else None
