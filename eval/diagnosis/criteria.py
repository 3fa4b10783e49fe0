"""Three risks judged from loss curves. Pure: curves and thresholds in, findings out.

Overfitting: Prechelt, "Early Stopping - But When?" (1998): generalisation loss GL = 100 (E_va / E_opt - 1), where
E_opt is the lowest evaluation loss so far, and its quotient with the training progress PQ = GL / P_k, where
P_k = 1000 (mean training loss of a strip / the lowest of the strip - 1) over a strip of k = 5 epochs; persistence as
early stopping's patience and min_delta (Keras, Lightning; theirs is absolute, this one a share of the loss); the gap
between training and evaluation loss. A rise lasts when the lowest of the last `patience` evaluations is over the best
one, and it says little when the same curve has risen as much before and came back.
Underfitting: share of the starting loss that training took away, and how much of that came in the second half of the
learning that was spent (steps weighted by their learning rate, so that a schedule that ends at 0 does not look like a
plateau): a run that has converged gets nearly nothing there, one that has not gets up to one half. The start is the
earliest evidence of either curve: what the training loss fell by before the first evaluation belongs to both. A curve
whose start is not in the log, and a training loss that falls on data it has seen before, are judged on less.
Forgetting: rise of the loss on abilities held before, against its first value (measured so by Luo et al. 2308.08747 and
Jin & Ren 2406.14026). Without it sudden lasting rises of the loss can only hint.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median, stdev
from typing import Any

from eval.diagnosis.curves import Series
from eval.diagnosis.training_run import TrainingRun, series_of

HIGH, MEDIUM, LOW = "High", "Medium", "Low"
RISKS = ("overfitting", "underfitting", "catastrophic_forgetting")


def limit(default: float, help: str) -> Any:
    """A threshold with its help text."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Thresholds:
    """Every threshold; `help` says what it is. The flags of eval/diagnosis_monitoring.py have these names."""

    gl_high: float = limit(10.0, "overfitting High from this generalisation loss on, percent")
    gl_medium: float = limit(3.0, "overfitting Medium from this generalisation loss on, percent")
    gl_slight: float = limit(1.0, "overfitting Medium from this on, percent, when it lasted for twice the patience")
    floor: float = limit(0.005, "a late rise or fall under this share of the loss at the start is nothing")
    patience: int = limit(2, "evaluations without a better one for a rise to count as lasting")
    min_delta: float = limit(0.005, "an evaluation is better when it is lower by this share of the best one")
    pq: float = limit(2.0, "a rise to gl_high that is not lasting yet is Medium when GL / progress reaches this")
    gap: float = limit(0.5, "a rise counts when this share of it is a wider gap to the training loss")
    gain_high: float = limit(0.05, "underfitting High when training took away less than this share of the loss")
    gain_medium: float = limit(0.10, "underfitting Medium below this share")
    gain_enough: float = limit(0.6, "from this share on only the last quarter of the run tells, see recent")
    recent: float = limit(0.05, "underfitting Medium when the evaluation loss fell by this share in the last quarter")
    late_high: float = limit(
        0.35, "underfitting High when this share of the fall came in the second half of the learning"
    )
    late_medium: float = limit(0.25, "underfitting Medium from this share on")
    high_loss: float = limit(4.0, "underfitting Medium when every loss ended over this, nats per token (perplexity 55)")
    retention_high: float = limit(0.4, "forgetting High when retention_loss rose by this over its first value, nats")
    retention_medium: float = limit(0.2, "forgetting Medium from this rise on")
    retention_factor: float = limit(1.1, "a rise to less than the first value times this is never forgetting")
    spike: float = limit(1.5, "without retention_loss: a sudden lasting rise of the loss by this factor is Medium")
    min_evaluations: int = limit(3, "evaluations needed to judge overfitting")
    min_points: int = limit(4, "training losses needed to judge underfitting")


@dataclass(frozen=True)
class Finding:
    """A risk's level, what led to it in words, the measured numbers, and what evidence was missing ("" for none).

    `diverged`: the training made nothing better, so that more of it is no cure.
    """

    risk: str
    level: str
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    missing: str = ""
    diverged: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """The findings by risk, the curves they were made from, and what the steps are counted in."""

    findings: Mapping[str, Finding]
    curves: Mapping[str, Series]
    axis: str


def judge(run: TrainingRun, thresholds: Thresholds) -> Diagnosis:
    """Judge a run as it stands."""
    axis = run.axis()
    curves = {name: series_of(run, name, axis) for name in ("loss", "eval_loss", "retention_loss", "lr")}
    overfitting = judge_overfitting(curves, run, thresholds)
    findings = (
        overfitting,
        judge_underfitting(curves, run, overfitting, thresholds),
        judge_forgetting(curves, run, thresholds),
    )
    return Diagnosis({finding.risk: finding for finding in findings}, curves, axis)


def recent(train: Series, x: float, share: float = 0.1) -> tuple[float, float]:
    """Mean training loss over the last tenth of the points up to x (at least 3 where there are so many), and its
    standard error.
    """
    stop = max(1, sum(1 for value in train.x if value <= x))
    start = max(0, stop - max(3, round(share * stop)))
    spread = stdev(train.y[start:stop]) if stop - start > 1 else 0.0
    return weighted(train, start, stop), spread / math.sqrt(stop - start)


def weighted(curve: Series, start: int, stop: int) -> float:
    """Mean of the points in cells start to stop."""
    total = sum(curve.counts[start:stop])
    return sum(y * n for y, n in zip(curve.y[start:stop], curve.counts[start:stop], strict=True)) / total


def persistence(evaluation: Series, min_delta: float) -> int:
    """Evaluations since the last one that was better by min_delta, as early stopping counts them."""
    best, index = math.inf, 0
    for i, value in enumerate(evaluation.y):
        if value < best * (1 - min_delta) or best == math.inf:
            best, index = value, i
    return len(evaluation) - 1 - index


def lasting_rise(values: Sequence[float], best: float, patience: int) -> float:
    """How far the lowest of the last `patience` values (or of all) is over the best, percent."""
    return 100 * (min(values[-max(1, patience) :]) / best - 1) if best > 0 else 0.0


def recovered(evaluation: Series, limits: Thresholds) -> tuple[float, int]:
    """The largest rise (percent) over its lowest value that this curve had before its best and came back from, and the
    most evaluations in a row that were not better, up to its best. (0, 0) for a curve that only fell.
    """
    before = evaluation.y[: evaluation.best_index + 1]
    largest, longest, lowest, spell = 0.0, 0, before[0], 0
    for i, value in enumerate(before[1:], 1):
        if value < lowest * (1 - limits.min_delta):
            lowest, spell = value, 0
            continue
        spell += 1
        if i < evaluation.best_index and lowest > 0:
            longest, largest = max(longest, spell), max(largest, 100 * (value / lowest - 1))
    return largest, longest


def typical_rise(evaluation: Series, patience: int) -> float:
    """How far the median of the evaluations since the best (the last 2 `patience` of them) is over it, percent."""
    since = evaluation.y[evaluation.best_index + 1 :][-2 * max(1, patience) :]
    return 100 * (median(since) / evaluation.best - 1) if since and evaluation.best > 0 else 0.0


def progress(strips: Sequence[float], k: int = 5) -> float:
    """Prechelt's P_k, per mille, of the last k mean training losses."""
    last = strips[-k:]
    low = min(last, default=0.0)
    return 1000 * (sum(last) / len(last) / low - 1) if low > 0 else 0.0


def strip_losses(train: Series, evaluation: Series, epochs: Sequence[float | None]) -> list[float]:
    """Mean training losses, one per epoch where the log tells at least 5, else one per evaluation."""
    told = [math.ceil(epoch - 1e-6) if epoch is not None else None for epoch in epochs]
    if None in told or len(set(told)) < 5:
        told = [sum(1 for x in evaluation.x if x < place) for place in train.x]
    groups: dict[int | None, list[int]] = {}
    for i, group in enumerate(told):
        groups.setdefault(group, []).append(i)
    return [weighted(train, cells[0], cells[-1] + 1) for cells in groups.values()]


def judge_overfitting(curves: Mapping[str, Series], run: TrainingRun, limits: Thresholds) -> Finding:
    """Whether the evaluation loss has turned up, for how long, and while the training loss went on falling."""
    risk, evaluation = "overfitting", curves["eval_loss"]
    if len(evaluation) < limits.min_evaluations:
        found = f"{len(evaluation)} evaluation loss{'es' if len(evaluation) != 1 else ''}"
        return Finding(risk, LOW, "not judged", missing=f"{found}, at least {limits.min_evaluations} are needed")
    if run.broken["loss"] or run.broken["eval_loss"]:
        return Finding(risk, LOW, "not judged", missing="the losses ended as NaN or inf")
    numbers = rise_numbers(curves, run, limits)
    gl, lasting_gl, since = (numbers[n] for n in ("generalisation_loss", "lasting_gl", "evaluations_since_better"))
    best = f"{evaluation.best:.4g} at {evaluation.best_x:g}"
    turned = f"evaluation loss {evaluation.last:.4g} is {gl:.1f}% over its best, {best}"
    if gl < limits.gl_slight or numbers["rise_of_eval_loss"] < limits.floor * numbers["loss_at_start"]:
        return Finding(risk, LOW, turned, numbers)
    if numbers.get("gap_share", 1.0) < limits.gap:
        return Finding(risk, LOW, f"{turned}, but the training loss rose as well: no overfitting", numbers)
    slight = since >= 2 * limits.patience and numbers["slight_gl"] >= limits.gl_slight
    if slight or (since >= limits.patience and lasting_gl >= limits.gl_medium):
        if excused(numbers, limits):
            return Finding(risk, LOW, f"{turned}, but it came back from {numbers['recovered_gl']:.1f}% before", numbers)
        reason = f"{turned}; {since} evaluations without a better one"
        return Finding(risk, HIGH if lasting_gl >= limits.gl_high else MEDIUM, reason, numbers)
    if gl >= limits.gl_high and numbers.get("progress_quotient", math.inf) >= limits.pq:
        return Finding(risk, MEDIUM, f"{turned}, so far for {since} evaluation(s)", numbers)
    return Finding(risk, LOW, f"{turned}, which has not lasted yet", numbers)


def excused(numbers: Mapping[str, float], limits: Thresholds) -> bool:
    """Whether the curve came back from such a rise before: from as large a one, until this one has lasted twice the
    patience; from one twice as large, until this one has lasted twice as long as that.
    """
    rise, before = numbers["typical_gl"], numbers["recovered_gl"]
    since, after = numbers["evaluations_since_better"], numbers["recovered_after"]
    lasted = since >= 2 * limits.patience if rise > before / 2 else since >= 2 * after
    return rise <= before and not lasted


def rise_numbers(curves: Mapping[str, Series], run: TrainingRun, limits: Thresholds) -> dict[str, float]:
    """What judge_overfitting measures; without a training loss nothing is known of the gap and the progress."""
    evaluation, train = curves["eval_loss"], curves["loss"]
    gl = 100 * (evaluation.last / evaluation.best - 1) if evaluation.best > 0 else 0.0
    back, after = recovered(evaluation, limits)
    numbers = {
        "generalisation_loss": gl, "lasting_gl": lasting_rise(evaluation.y, evaluation.best, limits.patience),
        "slight_gl": lasting_rise(evaluation.y, evaluation.best, 2 * limits.patience),
        "typical_gl": typical_rise(evaluation, limits.patience),
        "rise_of_eval_loss": min(evaluation.y[-max(1, limits.patience) :]) - evaluation.best,
        "loss_at_start": evaluation_start(evaluation, train), "best_eval_loss": evaluation.best,
        "best_at": evaluation.best_x, "last_eval_loss": evaluation.last,
        "evaluations_since_better": persistence(evaluation, limits.min_delta), "recovered_gl": back,
        "recovered_after": after,
    }  # fmt: skip
    if not train.x:
        return numbers
    (then, doubt_then), (now, doubt_now) = recent(train, evaluation.best_x), recent(train, math.inf)
    step = progress(strip_losses(train, evaluation, run.epochs_of("loss")))
    rise = evaluation.last - evaluation.best
    shared = max(0.0, now - then - 2 * math.hypot(doubt_then, doubt_now))  # what rose in training beyond its noise
    return numbers | {
        "training_loss_at_best": then, "training_loss": now, "gap_at_best": evaluation.best - then,
        "gap": evaluation.last - now, "gap_share": 1 - shared / rise if rise > 0 else 1.0,
        "progress_quotient": gl / step if step > 0 else math.inf,
    }  # fmt: skip


def learning_spent(curve: Series, rates: Series) -> list[float]:
    """Share of all learning (learning rate summed over the run) spent at each point; by position without rates."""
    if len(rates) < 2 or max(rates.y) <= 0:
        first, span = curve.x[0], curve.x[-1] - curve.x[0]
        return [(x - first) / span if span > 0 else 1.0 for x in curve.x]
    done, spent, i = 0.0, [], 0
    for order in curve.orders:
        while i < len(rates) and rates.orders[i] <= order:
            done += rates.y[i] * rates.counts[i]
            i += 1
        spent.append(done)
    total = done + sum(y * n for y, n in zip(rates.y[i:], rates.counts[i:], strict=True))
    return [share / total for share in spent]


def level(curve: Series, spent: list[float], low: float, high: float) -> float:
    """Mean loss where between `low` and `high` of the learning was spent; the straight line between the two
    nearest points where there is none.
    """
    inside = [i for i, share in enumerate(spent) if low <= share <= high]
    if inside:
        return weighted(curve, inside[0], inside[-1] + 1)
    middle = (low + high) / 2
    after = next((i for i, share in enumerate(spent) if share > middle), len(spent) - 1)
    before = max(0, after - 1)
    width = spent[after] - spent[before]
    share = min(1.0, max(0.0, (middle - spent[before]) / width)) if width > 0 else 1.0
    return curve.y[before] + share * (curve.y[after] - curve.y[before])


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


def evaluation_start(evaluation: Series, train: Series) -> float:
    """The evaluation loss at the start of the run: its first value, and what the training loss fell by until then."""
    before = sum(1 for x in train.x if x < evaluation.x[0])
    if not before:
        return evaluation.y[0]
    few = max(1, min(3, len(train) // 8))
    return evaluation.y[0] + max(0.0, weighted(train, 0, min(few, before)) - recent(train, evaluation.x[0])[0])


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
    """Where the log begins when that is far from the beginning of the run, else None."""
    curve = train if len(train) >= len(evaluation) else evaluation
    first = min(c.x[0] for c in (train, evaluation) if len(c))
    spacing = median(after - before for before, after in pairwise(curve.x)) if len(curve) > 1 else 0.0
    return first if spacing > 0 and first > 5 * spacing and first > 0.1 * curve.last_x else None


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
        verdict, reason = judge_descent(steady, most, seen_before(train, run.epochs_of("loss")), limits)
    else:
        missing = f"the log begins in the middle of the run, at {begin:g}: what was learned before is not in it"
        verdict, reason = LOW, "judged on what is there: it ended flat"
    if verdict == LOW and min(descent.end for descent in found) >= limits.high_loss:
        verdict = MEDIUM
        reason = f"the losses ended at {most.end:.4g} and more: a perplexity of {math.exp(min(most.end, 700)):.0f}"
    elif verdict == LOW and evaluated and still_falling(evaluation, curves["lr"], numbers, limits):
        verdict = MEDIUM
        reason = f"the evaluation loss fell by {numbers['recent_fall']:.1%} in the last quarter of the run"
    return Finding(risk, verdict, reason, numbers, missing, diverged=most.gain < 0)


def recent_fall(evaluation: Series) -> float:
    """Share of the evaluation loss that the last quarter of the steps took away."""
    spent = learning_spent(evaluation, Series([], [], [], []))
    then = level(evaluation, spent, 0.75, 0.75)
    return 1 - evaluation.last / then if then > 0 else 0.0


def still_falling(evaluation: Series, rates: Series, numbers: Mapping[str, float], limits: Thresholds) -> bool:
    """Whether the last evaluations were still getting better, by much.

    Under a learning rate that is held constant a loss goes on falling slowly until the rate is lowered, so that tells
    nothing; nor does the fall that a rate brings while it is lowered to nothing (annealing): there is no more to come.
    Under one that is still on its way down, or still rises, it does.
    """
    late = rates.y[-max(2, len(rates) // 4) :]
    if len(late) > 1 and (max(late) - min(late) <= 0.01 * max(late) or late[-1] <= 0.01 * max(rates.y)):
        return False
    better = persistence(evaluation, limits.min_delta) < limits.patience
    better = better and evaluation.last <= evaluation.best * (1 + limits.min_delta)
    fall = numbers["recent_fall"]
    then = evaluation.last / (1 - fall) if fall < 1 else math.inf
    return better and fall >= limits.recent and then - evaluation.last >= limits.floor * numbers["start"]


def judge_descent(steady: Descent, most: Descent, seen: bool, limits: Thresholds) -> tuple[str, str]:
    """(level, reason) of a run whose start is known and whose evaluation loss has not turned.

    A training loss alone (`steady` is it) may fall by memorising: it needs more, and never makes more than Medium.
    """
    alone = steady.name == "training"
    little = f"the {most.name} loss fell by {most.gain:.1%} only, {most.start:.4g} to {most.end:.4g}"
    falling = f"{steady.late:.0%} of the {steady.name} loss's fall came in the second half of the learning"
    if steady.unfinished(limits):
        if most.gain < limits.gain_high:
            return HIGH, little
        steep = steady.late >= limits.late_high and steady.gain < limits.gain_enough
        if steep and not alone:
            return HIGH, f"{falling}: it was still falling steeply at the end"
        if most.gain < limits.gain_medium and not alone:
            return MEDIUM, little
        if steep and not seen:
            return MEDIUM, f"{falling}: it was still falling at the end (never more than Medium without an evaluation)"
        if steady.gain < limits.gain_enough and not alone:
            return MEDIUM, f"{falling}: it was still falling at the end"
    lost = f"the {most.name} loss lost {most.gain:.0%} of its start ({most.start:.4g} to {most.end:.4g})"
    return LOW, f"{lost}; {falling}"


def judge_forgetting(curves: Mapping[str, Series], run: TrainingRun, limits: Thresholds) -> Finding:
    """Whether the loss on abilities held before rose; without it, whether the loss jumped up and stayed."""
    risk, retention = "catastrophic_forgetting", curves["retention_loss"]
    if run.broken["retention_loss"]:
        return Finding(risk, HIGH, "the retention_loss ended as NaN or inf")
    if len(retention) >= 2:
        first, last = retention.y[0], retention.last
        rise, factor = last - first, last / first if first > 0 else math.inf
        numbers = {"first_retention_loss": first, "last_retention_loss": last, "factor": factor, "rise": rise}
        reason = f"retention_loss went from {first:.4g} to {last:.4g} ({factor:.2f} times)"
        if rise < limits.retention_medium or factor < limits.retention_factor:
            return Finding(risk, LOW, reason, numbers)
        return Finding(risk, HIGH if rise >= limits.retention_high else MEDIUM, reason, numbers)
    lacking = "the log has no retention_loss to compare, so forgetting can only be hinted at (never more than Medium)"
    if run.broken["loss"] or run.broken["eval_loss"]:
        return Finding(
            risk, MEDIUM, "the loss ended as NaN or inf: what was known before is lost, too", missing=lacking
        )
    curve = max(curves["loss"], curves["eval_loss"], key=len)
    jump, where = sudden_rise(curve)
    numbers = {"lasting_rise": jump, "at": where}
    if jump >= limits.spike:
        reason = f"the loss rose suddenly at {where:g} and stayed {jump:.1f} times as high to the end"
        return Finding(risk, MEDIUM, reason, numbers, lacking)
    return Finding(risk, LOW, "no sudden lasting rise of the loss", numbers, lacking)


def sudden_rise(curve: Series) -> tuple[float, float]:
    """(factor, place) of the largest rise between neighbouring windows that nothing later takes back; (1, 0) for none.

    Windows are a fiftieth of the curve, at least 3 points; the factor counts the lowest later window, not the first.
    """
    size = max(3, len(curve) // 50)
    levels = [median(curve.y[i : i + size]) for i in range(0, len(curve) - size + 1, size)]
    best, where, lowest = 1.0, 0.0, math.inf
    for i in range(len(levels) - 1, 0, -1):
        lowest = min(lowest, levels[i])
        if levels[i - 1] > 0 and lowest / levels[i - 1] > best:
            best, where = lowest / levels[i - 1], curve.x[i * size]
    return best, where
