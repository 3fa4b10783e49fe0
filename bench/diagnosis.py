"""Diagnosis judged on labelled logs: our own trainings into known states, and other people's; precision and recall.

Our own trainings are those of bench/diagnosis_runs.py. A run's label is its true behaviour on conversations that its
log never saw, by these rules; what lies between them is unclear and left out for that risk:
    overfitting   the held-out loss ends 5% (and 0.02 nats) over its best: yes; under 2% (or 0.01 nats): no
    underfitting  on other phrasings of the taught topics it gained under half of what the best healthy run of the same
                  base gained: yes; over three quarters: no
    forgetting    of the skills' tokens that the base knew, it lost over 10%: yes; under 5%: no
Runs whose behaviour is not what they were made for are listed. Other people's trainings (bench/diagnosis_real.py) were
labelled by eye from their numbers. Thresholds are chosen on the own runs with an even number under 12 together with one
half of the real ones, and reported on the others: own runs with an odd number, those from 12 on (trained when the rules
of version 0.1 were fixed), the other half. A risk counts as found when it is not Low, and beside it when it is High.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from diagnosis_real import LABELLED, Judged, halves, load_real
from diagnosis_runs import KINDS, make_run, specs

from eval.diagnosis.criteria import HIGH, LOW, RISKS, Thresholds
from eval.diagnosis.judge import judge
from eval.diagnosis.training_run import TrainingRun
from eval.diagnosis_monitoring import read
from llmops.console import log, stdout_to_stderr

LATER = 12  # runs from this number on were trained when rules and thresholds were fixed
MADE_FOR = {"overfit": RISKS[0], "low_rate": RISKS[1], "few_steps": RISKS[1], "forgetting": RISKS[2]}
# one threshold after the other, from the risk that others lean on; a Medium and what it may be
CHOICES: dict[str, Sequence[float]] = {
    "gl_medium": (0.5, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20),
    "gl_slight": (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3),
    "floor": (0.0, 0.001, 0.002, 0.005, 0.01, 0.02),
    "late_medium": (0.1, 0.15, 0.18, 0.2, 0.22, 0.25, 0.28, 0.3, 0.35),
    "gain_enough": (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "recent": (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2),
    "retention_medium": (0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.18, 0.2, 0.22, 0.25, 0.3, 0.35, 0.4, 0.5),
}
RISK_OF = {
    "gl": RISKS[0],
    "floor": RISKS[0],
    "late": RISKS[1],
    "gain": RISKS[1],
    "recent": RISKS[1],
    "retention": RISKS[2],
}
REAL = HERE.parent.parent / "shared" / "data" / "real_curves"  # where they lie when somebody has them


def between(value: float, no: float, yes: float) -> bool | None:
    """False up to `no`, True from `yes` on, None between."""
    return True if value >= yes else False if value <= no else None


def load(folders: Sequence[Path]) -> list[Judged]:
    """Every run with its labels."""
    rows: list[tuple[dict[str, Any], list[dict[str, float]], TrainingRun]] = []
    for folder in folders:
        spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
        truth = [json.loads(line) for line in (folder / "truth.jsonl").read_text(encoding="utf-8").splitlines()]
        rows.append((spec, truth, read(str(folder / "log.txt")).run))
    reachable = {
        base: min(min(t["taught_loss"] for t in truth) for spec, truth, _ in rows
                     if spec["kind"] == "healthy" and spec["base"] == base)
        for base in {spec["base"] for spec, _, _ in rows}
    }  # fmt: skip
    found = []
    for spec, truth, run in rows:
        first, last = truth[0], truth[-1]
        best = min(t["loss"] for t in truth)
        rise = last["loss"] - best
        overfitted = between(rise / best, 0.02, 0.05) if rise > 0.01 else False
        if overfitted and rise < 0.02:
            overfitted = None
        share = (first["taught_loss"] - min(t["taught_loss"] for t in truth)) / (
            first["taught_loss"] - reachable[spec["base"]]
        )
        underfitted = between(-share, -0.75, -0.5)
        forgotten = between(1 - last["skill_known"] / first["skill_known"], 0.05, 0.10)
        labels = dict(zip(RISKS, (overfitted, underfitted, forgotten), strict=True))
        found.append(Judged(spec["name"], spec["kind"], run, labels))
    return found


def judged_levels(runs: Sequence[Judged], limits: Thresholds) -> list[dict[str, str]]:
    """The product's levels by risk, per run."""
    return [{risk: f.level for risk, f in judge(row.run, limits).findings.items()} for row in runs]


def naive_levels(runs: Sequence[Judged]) -> list[dict[str, str]]:
    """The naive rule: last evaluation over the one before; last training loss over 0.5; forgetting is not seen."""
    levels = []
    for row in runs:
        evals, losses = ([c.last for c in row.run.curves[name].all_cells()] for name in ("eval_loss", "loss"))
        said = (len(evals) > 1 and evals[-1] > evals[-2], bool(losses) and losses[-1] > 0.5, False)
        levels.append({risk: HIGH if found else LOW for risk, found in zip(RISKS, said, strict=True)})
    return levels


def rates(
    runs: Sequence[Judged], levels: Sequence[dict[str, str]], risk: str, found: Callable[[str], bool]
) -> dict[str, float]:
    """Precision, recall and what they were counted from."""
    pairs = [(row.truth[risk], found(level[risk])) for row, level in zip(runs, levels, strict=True)]
    pairs = [(true, said) for true, said in pairs if true is not None]
    hits = sum(true and said for true, said in pairs)
    said, true = sum(said for _, said in pairs), sum(true for true, _ in pairs)
    precision, recall = hits / said if said else 0.0, hits / true if true else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"runs": len(pairs), "true": true, "found": said, "precision": precision, "recall": recall, "f1": f1}


def choose(runs: Sequence[Judged]) -> tuple[Thresholds, dict[str, list[float]]]:
    """Thresholds by coordinate search on these runs: of all values with the best F1 the middle; these."""
    limits = Thresholds()
    ties: dict[str, list[float]] = {}
    for _ in range(2):
        for name, values in CHOICES.items():
            high = name.replace("_medium", "_high")
            risk = RISK_OF[name.split("_")[0]]
            scored = []
            for value in values:
                paired = {name: value}
                if name == "gl_medium":
                    paired["gl_slight"] = min(limits.gl_slight, value)
                if name == "gl_slight" and value > limits.gl_medium:
                    continue
                if high != name:
                    worse = min if name.startswith("gain") else max
                    paired[high] = worse(value, getattr(Thresholds(), high))
                tried = replace(limits, **paired)
                scored.append((rates(runs, judged_levels(runs, tried), risk, lambda level: level != LOW)["f1"], value))
            top = max(score for score, _ in scored)
            ties[name] = [value for score, value in scored if score == top]
            limits = replace(limits, **{name: ties[name][(len(ties[name]) - 1) // 2]})
    return limits, ties


def table(runs: Sequence[Judged], title: str, levels: Sequence[dict[str, str]]) -> None:
    """Print precision and recall per risk."""
    print(f"\n{title}\n\n| risk | runs | true | precision | recall | precision of High | recall of High |")
    print("|---|---|---|---|---|---|---|")
    for risk in RISKS if any(row.truth[RISKS[2]] is not None for row in runs) else LABELLED:
        any_, high = (rates(runs, levels, risk, f) for f in (lambda level: level != LOW, lambda level: level == HIGH))
        shown = " | ".join(f"{x:.2f}" for x in (any_["precision"], any_["recall"], high["precision"], high["recall"]))
        print(f"| {risk} | {any_['runs']} | {any_['true']} | {shown} |")


def report_kinds(runs: Sequence[Judged]) -> None:
    """What our own runs are."""
    print("| made as | runs | overfitted | underfitted | forgot | unclear in some risk |\n|---|---|---|---|---|---|")
    for kind in KINDS:
        rows = [row for row in runs if row.kind == kind]
        counts = [sum(row.truth[risk] is True for row in rows) for risk in RISKS]
        unclear = sum(None in row.truth.values() for row in rows)
        print(f"| {kind} | {len(rows)} | {' | '.join(map(str, counts))} | {unclear} |")
    other = [row.name for row in runs if row.kind in MADE_FOR and row.truth[MADE_FOR[row.kind]] is not True]
    print(f"\nmade for a state that they are not clearly in, labelled by behaviour: {', '.join(other) or 'none'}")


def report(own: Sequence[Judged], real: Sequence[Judged]) -> None:
    """All tables."""
    numbered = [(int(row.name[-2:]), row) for row in own]
    chosen, other = halves(real)
    groups = {
        "even runs, thresholds were chosen on these": [row for i, row in numbered if i < LATER and i % 2 == 0],
        "odd runs": [row for i, row in numbered if i < LATER and i % 2 == 1],
        "later runs": [row for i, row in numbered if i >= LATER],
        "odd and later runs, thresholds were not chosen on these": [
            row for i, row in numbered if i >= LATER or i % 2 == 1
        ],
        "other people's runs, the half that thresholds were chosen on": chosen,
        "other people's runs, the half that they were not chosen on": other,
        "other people's runs, both halves": list(real),
    }
    if own:
        report_kinds(own)
    limits, ties = choose([*next(iter(groups.values())), *chosen])
    print("\nthresholds on the even runs and one half of the real ones: value chosen (values as good); in the product:")
    for name, values in ties.items():
        print(f"  {name} {getattr(limits, name):g} ({values[0]:g} to {values[-1]:g}); {getattr(Thresholds(), name):g}")
    for title, rows in groups.items():
        if rows:
            table(rows, f"{title}: the product", judged_levels(rows, Thresholds()))
            table(rows, f"{title}: the thresholds as chosen", judged_levels(rows, limits))
            table(rows, f"{title}: the naive rule", naive_levels(rows))
    everything = [*own, *real]
    for row, levels in zip(everything, judged_levels(everything, Thresholds()), strict=True):
        wrong = [f"{risk} is {truth}, said {levels[risk]}" for risk, truth in row.truth.items()
                 if truth is not None and truth != (levels[risk] != LOW)]  # fmt: skip
        if wrong:
            log(f"{row.name}: {'; '.join(wrong)}")


def main() -> int:
    """Make the runs that are not there yet, judge all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--runs", type=int, default=16, help="own runs of each kind, at least 8 for a figure worth reporting; 0: none"
    )
    parser.add_argument("--real", type=Path, default=REAL, help="curves.jsonl of other people's runs, or its folder")
    parser.add_argument(
        "--minutes", type=float, default=0, help="stop training after so many and go on next time; 0: never"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    folders = []
    wanted = sorted(specs(args.runs), key=lambda spec: (spec.name[-2:], spec.kind))
    for spec in wanted:
        if args.minutes and time.monotonic() - started > 60 * args.minutes:
            log(f"{len(folders)} of {len(wanted)} runs are there; start again to make the others")
            return 1
        with stdout_to_stderr():
            folders.append(make_run(spec, args.work))
    real = load_real(args.real) if args.real != REAL or REAL.is_dir() else []
    report(load(folders), real)
    return 0


if __name__ == "__main__":
    sys.exit(main())
