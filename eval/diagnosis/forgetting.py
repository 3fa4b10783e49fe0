"""Forgetting: whether the loss on abilities held before rose.

Measured against its first value, as Luo et al. 2308.08747 and Jin & Ren 2406.14026 do. Without it sudden lasting rises
of the loss can only hint.
"""

import math
from collections.abc import Mapping
from statistics import median

from eval.diagnosis.criteria import HIGH, LOW, MEDIUM, Finding, Thresholds
from eval.diagnosis.curves import Series
from eval.diagnosis.training_run import TrainingRun


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
