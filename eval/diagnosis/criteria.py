"""Three risks judged from loss curves. Pure: curves and thresholds in, findings out.

Overfitting: Prechelt, "Early Stopping - But When?" (1998): generalisation loss GL = 100 (E_va / E_opt - 1), where
E_opt is the lowest evaluation loss so far, and its quotient with the training progress PQ = GL / P_k, where
P_k = 1000 (mean of the last k training losses / the lowest of them - 1); persistence as early stopping's patience and
min_delta (Keras, Lightning); the gap between training and evaluation loss.
Underfitting: share of the starting loss that training took away, and how much of that came in the second half of the
learning that was spent (steps weighted by their learning rate, so that a schedule that ends at 0 does not look like a
plateau): a run that has converged gets nearly nothing there, one that has not gets up to one half.
Forgetting: rise of the loss on abilities held before, against its first value (measured so by Luo et al. 2308.08747 and
Jin & Ren 2406.14026). Without it sudden lasting rises of the loss can only hint.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    gl_floor: float = limit(0.02, "a rise of the evaluation loss under this is never overfitting, nats per token")
    patience: int = limit(2, "evaluations without a better one for a rise to count as lasting")
    min_delta: float = limit(0.005, "an evaluation is better when it is lower by this share")
    pq: float = limit(2.0, "a rise to gl_high that is not lasting yet is Medium when GL / progress reaches this")
    gap: float = limit(0.5, "a rise counts when this share of it is a wider gap to the training loss")
    gain_high: float = limit(0.05, "underfitting High when training took away less than this share of the loss")
    gain_medium: float = limit(0.10, "underfitting Medium below this share")
    gain_enough: float = limit(
        0.6, "a loss that lost this share of its start is no underfitting, even if still falling"
    )
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
    """A risk's level, what led to it in words, the measured numbers, and what evidence was missing ("" for none)."""

    risk: str
    level: str
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    missing: str = ""


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
    overfitting = judge_overfitting(curves, thresholds)
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


def progress(train: Series, strip: int = 5) -> float:
    """Prechelt's P_k of the last `strip` training losses, per mille."""
    last = train.y[-strip:]
    low = min(last, default=0.0)
    return 1000 * (sum(last) / len(last) / low - 1) if low > 0 else 0.0


def judge_overfitting(curves: Mapping[str, Series], limits: Thresholds) -> Finding:
    """Whether the evaluation loss has turned up, for how long, and while the training loss went on falling."""
    risk, evaluation, train = "overfitting", curves["eval_loss"], curves["loss"]
    if len(evaluation) < limits.min_evaluations:
        found = f"{len(evaluation)} evaluation loss{'es' if len(evaluation) != 1 else ''}"
        return Finding(risk, LOW, "not judged", missing=f"{found}, at least {limits.min_evaluations} are needed")
    gl = 100 * (evaluation.last / evaluation.best - 1) if evaluation.best > 0 else 0.0
    since = persistence(evaluation, limits.min_delta)
    recently = min(evaluation.y[-max(1, limits.patience) :])
    lasting_gl = 100 * (recently / evaluation.best - 1) if evaluation.best > 0 else 0.0
    numbers = {"generalisation_loss": gl, "lasting_gl": lasting_gl, "rise_of_eval_loss": recently - evaluation.best,
               "best_eval_loss": evaluation.best, "best_at": evaluation.best_x, "last_eval_loss": evaluation.last,
               "evaluations_since_better": since}  # fmt: skip
    pq, gap_share = math.inf, 1.0
    if train.x:
        (then, doubt_then), (now, doubt_now) = recent(train, evaluation.best_x), recent(train, math.inf)
        step = progress(train)
        pq = gl / step if step > 0 else math.inf
        rise = evaluation.last - evaluation.best
        shared = max(0.0, now - then - 2 * math.hypot(doubt_then, doubt_now))  # what rose in training beyond its noise
        gap_share = 1 - shared / rise if rise > 0 else 1.0
        numbers |= {"training_loss_at_best": then, "training_loss": now, "gap_at_best": evaluation.best - then,
                    "gap": evaluation.last - now, "gap_share": gap_share, "progress_quotient": pq}  # fmt: skip
    lasting = since >= limits.patience and lasting_gl >= limits.gl_medium
    best = f"{evaluation.best:.4g} at {evaluation.best_x:g}"
    turned = f"evaluation loss {evaluation.last:.4g} is {gl:.1f}% over its best, {best}"
    if gl < limits.gl_medium or recently - evaluation.best < limits.gl_floor:
        return Finding(risk, LOW, turned, numbers)
    if gap_share < limits.gap:
        return Finding(risk, LOW, f"{turned}, but the training loss rose as well: no overfitting", numbers)
    if lasting:
        reason = f"{turned}; {since} evaluations without a better one"
        return Finding(risk, HIGH if lasting_gl >= limits.gl_high else MEDIUM, reason, numbers)
    if gl >= limits.gl_high and pq >= limits.pq:
        return Finding(risk, MEDIUM, f"{turned}, so far for {since} evaluation(s)", numbers)
    return Finding(risk, LOW, f"{turned}, which has not lasted yet", numbers)


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
    """How far a curve came down: levels at the start, at half of the learning and at the end."""

    name: str
    start: float
    middle: float
    end: float

    @property
    def gain(self) -> float:
        """Share of the starting loss that was taken away."""
        return 1 - self.end / self.start if self.start > 0 else 0.0

    @property
    def late(self) -> float:
        """Share of the fall that came in the second half of the learning."""
        return (self.middle - self.end) / (self.start - self.end) if self.start > self.end else 0.0


def descend(name: str, curve: Series, rates: Series) -> Descent:
    """The descent of a curve. Training losses are noisy, so their levels are means over a tenth of the learning."""
    spent = learning_spent(curve, rates)
    if name == "evaluation":
        return Descent(name, curve.y[0], level(curve, spent, 0.5, 0.5), curve.last)
    few = max(1, min(3, len(curve) // 8))
    start = weighted(curve, 0, max(few, sum(1 for share in spent if share <= 0.02)))
    return Descent(name, start, level(curve, spent, 0.4, 0.6), level(curve, spent, 0.9, 1.0))


def judge_underfitting(
    curves: Mapping[str, Series], run: TrainingRun, overfitting: Finding, limits: Thresholds
) -> Finding:
    """Whether training took little away, or was still taking much when it ended."""
    risk, train, evaluation = "underfitting", curves["loss"], curves["eval_loss"]
    diverged = [name for name in ("loss", "eval_loss") if run.broken[name]]
    if diverged:
        reason = f"the {diverged[0]} ended as NaN or inf: the weights are broken and fit nothing"
        return Finding(risk, HIGH, reason, {"values_not_finite": float(sum(run.nonfinite.values()))})
    found = []
    if len(train) >= limits.min_points:
        found.append(descend("training", train, curves["lr"]))
    if len(evaluation) >= limits.min_evaluations:
        found.append(descend("evaluation", evaluation, curves["lr"]))
    if not found:
        count = f"{len(train)} training and {len(evaluation)} evaluation losses"
        return Finding(risk, LOW, "not judged", missing=f"{count}, at least {limits.min_points} of one are needed")
    turned = overfitting.level != LOW
    steady = found[-1]  # the evaluation where there is one: the same data every time
    most = max(found, key=lambda descent: descent.gain) if turned else steady
    numbers = {"start": steady.start, "middle": steady.middle, "end": steady.end, "gain": most.gain,
               "late_share": steady.late}  # fmt: skip
    little = f"the {most.name} loss fell by {most.gain:.1%} only, {most.start:.4g} to {most.end:.4g}"
    fall = f"the {steady.name} loss's fall"
    falling = f"{steady.late:.0%} of {fall} came in the second half of the learning"
    if most.gain < limits.gain_high:
        return Finding(risk, HIGH, little, numbers)
    unfinished = not turned and most.gain < limits.gain_enough
    if steady.late >= limits.late_high and unfinished and steady.name == "evaluation":
        return Finding(risk, HIGH, f"{falling}: it was still falling steeply at the end", numbers)
    if most.gain < limits.gain_medium:
        return Finding(risk, MEDIUM, little, numbers)
    if steady.late >= limits.late_medium and unfinished:
        alone = (
            ""
            if steady.name == "evaluation"
            else " (without an evaluation it may be memorising: never more than Medium)"
        )
        return Finding(risk, MEDIUM, f"{falling}: it was still falling at the end{alone}", numbers)
    if min(descent.end for descent in found) >= limits.high_loss:
        reason = f"the losses ended flat at {most.end:.4g} and more: a perplexity of {math.exp(min(most.end, 700)):.0f}"
        return Finding(risk, MEDIUM, reason, numbers)
    lost = f"the {most.name} loss lost {most.gain:.0%} of its start ({most.start:.4g} to {most.end:.4g})"
    return Finding(risk, LOW, lost if turned else f"{lost}; {falling}", numbers)


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
