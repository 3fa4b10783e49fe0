"""Other people's trainings as numbers, labelled by eye, for bench/diagnosis.py: jsonl rows of name, repository, axis, a
level for each risk (H, M, L, or - where the numbers do not tell) and [x, value] pairs of loss, eval_loss and
learning_rate.

The rows are in halves by repository, so that runs of one author are never on both sides. Repositories are shuffled with
SEED within three groups (some run overfitted; else some run underfitted; neither), and every other one is taken, so
that both halves have something to find. Thresholds are chosen on the first half.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.diagnosis.criteria import RISKS
from eval.diagnosis.log_lines import Reading
from eval.diagnosis.training_run import TrainingRun
from llmops import files

SEED = 14
FOUND = {"H": True, "M": True, "L": False, "-": None}
LABELLED = RISKS[:2]  # nobody can see from these numbers what a model has forgotten


@dataclass(frozen=True)
class Judged:
    """A run: its name and kind (how it was made, or whose it is), its curves, and by risk whether it is true (None:
    unclear).
    """

    name: str
    kind: str
    run: TrainingRun
    truth: dict[str, bool | None]


def load_real(path: Path) -> list[Judged]:
    """Every run of a jsonl file, or of curves.jsonl in a folder; its kind is its repository."""
    path = path / "curves.jsonl" if path.is_dir() else path
    rows = [line.value for line in files.json_lines(path, "the real curves")]
    return [
        Judged(
            row["name"],
            row["repo"],
            run_of(row),
            {risk: FOUND[row[risk]] if risk in LABELLED else None for risk in RISKS},
        )
        for row in rows
    ]


def run_of(row: dict[str, Any]) -> TrainingRun:
    """The curves as if they had been read: in the order of their places, the learning rates spread evenly over them."""
    told: list[tuple[float, int, str, float]] = []
    for kind, name in enumerate(("loss", "eval_loss")):
        told += [(x, kind, name, value) for x, value in row[name]]
    rates = row["learning_rate"]
    if told and len(rates) > 1:
        first, last = min(told)[0], max(told)[0]
        low, high = rates[0][0], rates[-1][0]
        told += [(first + (last - first) * (x - low) / (high - low), -1, "lr", value) for x, value in rates]
    run = TrainingRun()
    rate = None
    place = "epoch" if row["axis"] == "epoch" else "step"
    for x, _, name, value in sorted(told):
        if name == "lr":
            rate = value
        else:
            run.add(Reading(**{place: x, name: value, "lr": rate}))
    return run


def halves(runs: Sequence[Judged]) -> tuple[list[Judged], list[Judged]]:
    """The runs that thresholds are chosen on, and the others."""
    groups: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for repository in sorted({row.kind for row in runs}):
        own = [row for row in runs if row.kind == repository]
        group = next((i for i, risk in enumerate(LABELLED) if any(row.truth[risk] for row in own)), 2)
        groups[group].append(repository)
    chosen: set[str] = set()
    draw = random.Random(SEED)
    for repositories in groups.values():
        draw.shuffle(repositories)
        chosen.update(repositories[::2])
    return [row for row in runs if row.kind in chosen], [row for row in runs if row.kind not in chosen]
