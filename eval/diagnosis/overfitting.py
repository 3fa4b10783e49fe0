"""Overfitting: whether the evaluation loss has turned up, for how long, and what the training loss did meanwhile.

Prechelt, "Early Stopping - But When?" (1998): generalisation loss GL = 100 (E_va / E_opt - 1), where E_opt is the
lowest evaluation loss so far, and its quotient with the training progress PQ = GL / P_k, where P_k = 1000 (mean
training loss of a strip / the lowest of the strip - 1) over a strip of k = 5 epochs; persistence as early stopping's
patience and min_delta (Keras, Lightning; theirs is absolute, this one a share of the loss); the gap between training
and evaluation loss. A rise lasts when the lowest of the last `patience` evaluations is over the best one, and it says
little when the same curve has risen as much before and came back.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median

from eval.diagnosis.criteria import HIGH, LOW, MEDIUM, Finding, Thresholds
from eval.diagnosis.curves import Series
from eval.diagnosis.measures import evaluation_start, persistence, recent, weighted
from eval.diagnosis.training_run import TrainingRun


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
    best, place = evaluation.best, evaluation.best_x
    turned = f"evaluation loss {evaluation.last:.4g} is {gl:.1f}% over its best, {best:.4g} at {place:g}"
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
