"""Underfitting: whether training took little away, or was still taking much when it ended.

By the share of the starting loss that training took away, and how much of that came in the second half of the
learning that was spent (steps weighted by their learning rate, so that a schedule that ends at 0 does not look like a
plateau): a run that has converged gets nearly nothing there, one that has not gets up to one half. The start is the
earliest evidence of either curve: what the training loss fell by before the first evaluation belongs to both. A curve
whose start is not in the log, and a training loss that falls on data it has seen before, are judged on less.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from eval.diagnosis.criteria import HIGH, LOW, MEDIUM, Finding, Thresholds
from eval.diagnosis.curves import Series
from eval.diagnosis.measures import evaluation_start, learning_spent, level, persistence, weighted
from eval.diagnosis.training_run import TrainingRun


@dataclass(frozen=True)
class Descent:
    """How far a curve came down: levels at the start, at half of the learning and at the end; the smallest fall that
    is no noise between the start and the end (`doubt`), and between the middle and the end (`late_doubt`).
    """

    name: str
    start: float
    middle: float
    end: float
    doubt: float
    late_doubt: float

    @property
    def gain(self) -> float:
        """Share of the starting loss that was taken away."""
        return 1 - self.end / self.start if self.start > 0 else 0.0

    @property
    def late(self) -> float:
        """Share of the fall that came in the second half of the learning."""
        return (self.middle - self.end) / (self.start - self.end) if self.start > self.end else 0.0

    def unfinished(self, limits: Thresholds) -> bool:
        """Whether it was still coming down: much of the fall came late and is no noise, or there was no real fall."""
        if self.start - self.end <= self.doubt:
            return True
        return self.late >= limits.late_medium and self.middle - self.end > self.late_doubt


def judge_underfitting(
    curves: Mapping[str, Series], run: TrainingRun, overfitting: Finding, limits: Thresholds
) -> Finding:
    """Whether training took little away, or was still taking much when it ended."""
    risk, train, evaluation = "underfitting", curves["loss"], curves["eval_loss"]
    diverged = [name for name in ("loss", "eval_loss") if run.broken[name]]
    if diverged:
        reason = f"the {diverged[0]} ended as NaN or inf: the weights are broken and fit nothing"
        return Finding(risk, HIGH, reason, {"values_not_finite": float(sum(run.nonfinite.values()))}, diverged=True)
    evaluated = len(evaluation) >= limits.min_evaluations
    found = [descend_training(train, curves["lr"])] if len(train) >= limits.min_points else []
    found += [descend_evaluation(evaluation, train, curves["lr"])] if evaluated else []
    if not found:
        count = f"{len(train)} training and {len(evaluation)} evaluation losses"
        return Finding(risk, LOW, "not judged", missing=f"{count}, at least {limits.min_points} of one are needed")
    steady = found[-1]  # the evaluation where there is one
    most = max(found, key=lambda descent: descent.gain)
    numbers = {"start": steady.start, "middle": steady.middle, "end": steady.end, "gain": most.gain,
               "late_share": steady.late}  # fmt: skip
    if evaluated:
        numbers["recent_fall"] = recent_fall(evaluation)
    begin = begins_late(train, evaluation)
    if overfitting.level != LOW:
        if most.gain < limits.gain_high and begin is None:
            reason = f"training took nothing away: {most.name} loss {most.start:.4g} to {most.end:.4g}"
            return Finding(risk, HIGH, reason, numbers, diverged=True)
        return Finding(risk, LOW, "the evaluation loss has turned: more of this training is no cure", numbers)
    missing = ""
    if begin is None:
        stopped = evaluated and not annealed(curves["lr"])
        stopped = stopped and persistence(evaluation, limits.min_delta) >= limits.patience
        seen = seen_before(train, run.epochs_of("loss"))
        verdict, reason = judge_descent(steady, most, seen, stopped, limits)
    else:
        missing = f"the log begins in the middle of the run, at {begin:g}: what was learned before is not in it"
        verdict, reason = LOW, f"judged on what is there: the {most.name} loss went {most.start:.4g} to {most.end:.4g}"
    if verdict == LOW and min(descent.end for descent in found) >= limits.high_loss:
        verdict = MEDIUM
        reason = f"the losses ended at {most.end:.4g} and more: a perplexity of {math.exp(min(most.end, 700)):.0f}"
    elif verdict == LOW and evaluated and still_falling(evaluation, curves["lr"], numbers, limits):
        verdict = MEDIUM
        reason = f"the evaluation loss fell by {numbers['recent_fall']:.1%} in the last quarter of the run"
    return Finding(risk, verdict, reason, numbers, missing, diverged=most.gain < 0)


def judge_descent(
    steady: Descent, most: Descent, seen: bool, stopped: bool, limits: Thresholds
) -> tuple[str, str]:  # fmt: skip
    """(level, reason) of a run whose start is known and whose evaluation loss has not turned.

    A training loss alone (`steady` is it) may fall by memorising (`seen`): it needs more, and never makes more than
    Medium. Where evaluations have `stopped` getting better, and no schedule made them, nothing was still falling at
    the end.
    """
    alone = steady.name == "training"
    little = f"the {most.name} loss fell by {most.gain:.1%} only, {most.start:.4g} to {most.end:.4g}"
    falling = f"{steady.late:.0%} of the {steady.name} loss's fall came in the second half of the learning"
    if steady.unfinished(limits):
        if most.gain < limits.gain_high:
            return HIGH, little
        steep = steady.late >= limits.late_high and steady.gain < limits.gain_enough and not stopped
        if steep and not alone:
            return HIGH, f"{falling}: it was still falling steeply at the end"
        if most.gain < limits.gain_medium and not alone:
            return MEDIUM, little
        if steep and not seen:
            return MEDIUM, f"{falling}: it was still falling at the end (never more than Medium without an evaluation)"
        if steady.gain < limits.gain_enough and not alone and not stopped:
            return MEDIUM, f"{falling}: it was still falling at the end"
    lost = f"the {most.name} loss lost {most.gain:.0%} of its start ({most.start:.4g} to {most.end:.4g})"
    return LOW, f"{lost}; {falling}"


def descend_evaluation(evaluation: Series, train: Series, rates: Series) -> Descent:
    """The descent of the evaluation loss: the same data every time, so its values are taken as they are."""
    spent = learning_spent(evaluation, rates)
    jumps = [abs(after - before) for before, after in pairwise(evaluation.y)]
    start = evaluation_start(evaluation, train)
    noise = median(jumps) if start - evaluation.last < sum(jumps) / 2 else 0.0
    return Descent("evaluation", start, level(evaluation, spent, 0.5, 0.5), evaluation.last, noise, 0.0)


def descend_training(train: Series, rates: Series) -> Descent:
    """The descent of the training loss, which is noisy: its levels are means over a tenth of the learning and more."""
    spent = learning_spent(train, rates)
    early = max(1, min(3, len(train) // 8))
    start, middle, end = weighted(train, 0, early), level(train, spent, 0.4, 0.6), level(train, spent, 0.9, 1.0)
    jumps = [after - before for before, after in pairwise(train.y)]
    noise = 1.4826 * median(map(abs, jumps)) / math.sqrt(2)  # of one value; robust against the fall itself
    inside = [max(1, sum(1 for share in spent if low <= share <= high)) for low, high in ((0.4, 0.6), (0.9, 1.0))]
    doubts = [2 * noise * math.sqrt(1 / a + 1 / b) for a, b in ((early, inside[1]), (inside[0], inside[1]))]
    return Descent("training", start, middle, end, *doubts)


def begins_late(train: Series, evaluation: Series) -> float | None:
    """Where the log begins when that is far from the beginning of the run: by its length, or by how often it tells a
    loss; else None.
    """
    curve = train if len(train) >= len(evaluation) else evaluation
    first = min(c.x[0] for c in (train, evaluation) if len(c))
    spacing = median(after - before for before, after in pairwise(curve.x)) if len(curve) > 1 else 0.0
    far = first > 5 * spacing and (first > 0.1 * curve.last_x or first > 50 * spacing)
    return first if spacing > 0 and far else None


def seen_before(train: Series, epochs: Sequence[float | None]) -> bool:
    """Whether the second half of the training losses is of data that was learned before: from the second epoch on, or
    (where the log tells no epochs) when most of its fall is one step of a staircase.
    """
    if epochs and epochs[-1] is not None and epochs[0] is not None:
        return epochs[-1] - math.floor(epochs[0]) > 1.5
    size = max(1, len(train) // 30)
    levels = [sum(train.y[i : i + size]) / size for i in range(len(train) // 2, len(train) - size + 1, size)]
    fall = levels[0] - levels[-1]
    drops = [before - after for before, after in pairwise(levels)]
    return len(drops) >= 6 and fall > 0 and max(drops) >= 0.5 * fall


def recent_fall(evaluation: Series) -> float:
    """Share of the evaluation loss that the last quarter of the steps took away."""
    spent = learning_spent(evaluation, Series([], [], [], []))
    then = level(evaluation, spent, 0.75, 0.75)
    return 1 - evaluation.last / then if then > 0 else 0.0


def annealed(rates: Series) -> bool:
    """Whether the learning rate was lowered to nothing: then losses are flat at the end, whatever was left to learn."""
    return len(rates) > 1 and rates.y[-1] <= 0.01 * max(rates.y)


def still_falling(evaluation: Series, rates: Series, numbers: Mapping[str, float], limits: Thresholds) -> bool:
    """Whether the last evaluations were still getting better, by much.

    Under a learning rate that is held constant a loss goes on falling slowly until the rate is lowered, so that tells
    nothing; nor does the fall that a rate brings while it is lowered to nothing (annealing): there is no more to come.
    Under one that is still on its way down, or still rises, it does.
    """
    late = rates.y[-max(2, len(rates) // 4) :]
    if len(late) > 1 and (max(late) - min(late) <= 0.01 * max(late) or annealed(rates)):
        return False
    better = persistence(evaluation, limits.min_delta) < limits.patience
    better = better and evaluation.last <= evaluation.best * (1 + limits.min_delta)
    fall = numbers["recent_fall"]
    then = evaluation.last / (1 - fall) if fall < 1 else math.inf
    return better and fall >= limits.recent and then - evaluation.last >= limits.floor * numbers["start"]
