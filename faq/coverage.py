"""How much can be answered by itself, and how often that is right: calibrated confidence, thresholds, their curve.

An answer is automated when it is an intent and its confidence reaches a threshold; all else is 不符合, for a person.
Confidence is the probability with its log-odds divided by a temperature and shifted (Platt 1999; without the shift it
is Guo et al. 2017, On Calibration of Modern Neural Networks, for two classes: this answer or another). All is fitted on
one half of the questions and judged on the other, both ways, so that the figures are those of unseen questions.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops import files, pictures
from llmops.console import UserError
from llmops.intents.prediction import Calibration, log_odds

if TYPE_CHECKING:
    import numpy as np

BINS = 10  # of the calibration error
POINTS = 100  # of the curve, at most
PRECISIONS = (0.9, 0.95, 0.99)


def columns(rows: Sequence[dict[str, Any]], none: str) -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
    """(probability, whether right, whether the answer is an intent), each (n,), of predictions."""
    import numpy as np

    probability = np.array([row["probability"] for row in rows], float)
    said = [row.get("proposed", row["intent"]) for row in rows]  # before a threshold that was kept
    right = np.array([intent == row["reference"] for intent, row in zip(said, rows, strict=True)])
    known = [intent != none and row.get("known", True) for intent, row in zip(said, rows, strict=True)]
    return probability, right, np.array(known)


def fit(probability: "np.ndarray", right: "np.ndarray") -> Calibration:
    """The calibration with the least log loss; the temperature is from 1/20 to 20, so that the order stays."""
    import numpy as np
    from scipy.optimize import minimize

    odds = log_odds(probability)

    def loss(given: "np.ndarray") -> float:
        value = odds / np.exp(given[0]) + given[1]
        return float(np.logaddexp(0, np.where(right, -value, value)).mean())

    found = minimize(loss, np.zeros(2), method="L-BFGS-B", bounds=[(-3, 3), (-20, 20)]).x
    return Calibration(float(np.exp(found[0])), float(found[1]))


def calibration_error(confidence: "np.ndarray", right: "np.ndarray") -> float:
    """Mean distance of confidence and share of right answers over bins of equal width, weighted by their size (ECE)."""
    import numpy as np

    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs((confidence - right)[place == k].sum()) for k in range(BINS)]
    return float(sum(gaps) / len(confidence))


def threshold_for(
    confidence: "np.ndarray", right: "np.ndarray", intent: "np.ndarray", precision: float = 0.0, share: float = 0.0
) -> float:
    """The lowest threshold whose answers are right as often as wished, or that automates this share of all; else 1.01.

    Answers of equal confidence stand or fall together.
    """
    import numpy as np

    own, good = confidence[intent], right[intent]
    order = np.argsort(-own, kind="stable")
    sorted_ = own[order]
    last = np.append(sorted_[1:] != sorted_[:-1], True) if len(own) else np.zeros(0, bool)
    count = np.arange(1, len(own) + 1)
    reached = last & (count <= share * len(confidence) + 1e-9 if share else good[order].cumsum() / count >= precision)
    return float(sorted_[reached.nonzero()[0][-1]]) if reached.any() else 1.01


def halves(count: int) -> "list[tuple[np.ndarray, np.ndarray]]":
    """(rows to fit on, rows to judge) and the other way round."""
    import numpy as np

    order = np.random.default_rng(0).permutation(count)
    first, second = order[: count // 2], order[count // 2 :]
    return [(first, second), (second, first)]


def judge(rows: Sequence[dict[str, Any]], none: str, wished: dict[str, float]) -> dict[str, Any]:
    """What a threshold as `wished` (precision or share) automates of questions that it was not fitted on."""
    import numpy as np

    probability, right, intent = columns(rows, none)
    automated = np.zeros(len(rows), bool)
    for known, rest in halves(len(rows)):
        cut = threshold_for(probability[known], right[known], intent[known], **wished)
        automated[rest] = intent[rest] & (probability[rest] >= cut)
    return {
        **wished,
        "automated": round(float(automated.mean()), 4),
        "accuracy": round(float(right[automated].mean()), 4) if automated.any() else None,
    }


def calibration(rows: Sequence[dict[str, Any]], none: str) -> dict[str, float]:
    """The calibration of all rows, and the error of confidence before and after, on halves that were not fitted."""
    import numpy as np

    probability, right, _ = columns(rows, none)
    after = np.empty(len(rows))
    for known, rest in halves(len(rows)):
        after[rest] = fit(probability[known], right[known])(probability[rest])
    whole = fit(probability, right)
    return {
        "temperature": round(whole.temperature, 4),
        "shift": round(whole.shift, 4),
        "error_before": round(calibration_error(probability, right), 4),
        "error_after": round(calibration_error(after, right), 4),
    }


def out_of_scope(rows: Sequence[dict[str, Any]], none: str) -> dict[str, float] | None:
    """How well questions that no intent fits are told from the others, by the probability of the best intent.

    `auroc`: how often a question with an intent is surer than one without; `fpr_at_95_recall`: the share of those
    without that are taken for one when 95% of the others are. None where the test has only one of the two kinds.
    """
    import numpy as np
    from sklearn.metrics import roc_auc_score, roc_curve

    inside = np.array([row["reference"] != none for row in rows])
    if inside.all() or not inside.any():
        return None
    sure = np.array([best_intent(row, none) for row in rows])
    false_rate, recall, _ = roc_curve(inside, sure, drop_intermediate=False)
    return {
        "questions": int((~inside).sum()),
        "auroc": round(float(roc_auc_score(inside, sure)), 4),
        "fpr_at_95_recall": round(float(false_rate[(recall >= 0.95 - 1e-9).nonzero()[0][0]]), 4),
    }


def best_intent(row: dict[str, Any], none: str) -> float:
    """The probability of a row's best intent: that of its answer, or of the runner-up where the answer is 不符合.

    What a threshold made 不符合 counts as it was before. A classifier's rows have a runner-up only where 不符合 was the
    likeliest of its classes.
    """
    if row.get("proposed", row["intent"]) != none or "runner_up" not in row:
        return float(row["probability"])
    return float(row["runner_up"]["probability"]) if row["runner_up"] else 0.0


def decision(rows: Sequence[dict[str, Any]], none: str, wished: dict[str, float]) -> dict[str, float]:
    """The calibration and the threshold to be kept for prediction, fitted on all rows."""
    probability, right, intent = columns(rows, none)
    found = fit(probability, right)
    kept = Calibration(round(found.temperature, 6), round(found.shift, 6))
    cut = threshold_for(kept(probability), right, intent, **wished)
    return {"temperature": kept.temperature, "shift": kept.shift, "threshold": cut, **wished}


def curve(rows: Sequence[dict[str, Any]], none: str) -> list[dict[str, float]]:
    """Share of all questions that is automated against how often that is right, from the surest answer on."""
    import numpy as np

    probability, right, intent = columns(rows, none)
    own, good = probability[intent], right[intent]
    order = np.argsort(-own, kind="stable")
    last = np.append(own[order][1:] != own[order][:-1], True).nonzero()[0] if len(own) else np.zeros(0, int)
    chosen = last[np.unique(np.linspace(0, len(last) - 1, min(POINTS, len(last))).astype(int))] if len(last) else last
    accuracy = good[order].cumsum() / np.arange(1, len(own) + 1)
    return [
        {"automated": round(float((k + 1) / len(rows)), 4), "accuracy": round(float(accuracy[k]), 4),
         "probability": round(float(own[order][k]), 6)}
        for k in chosen
    ]  # fmt: skip


def refuse_other(path: Path) -> None:
    """Raise UserError for a target that is there and holds no curves: they replace nothing but older ones."""
    if not os.path.exists(path):
        return
    curves = files.read_object(path, "the target of the coverage", "choose another name with --picture")
    points = [point for listed in curves.values() for point in (listed if isinstance(listed, list) else [listed])]
    if not all(isinstance(point, dict) and {"automated", "accuracy"} <= set(point) for point in points):
        raise UserError(f"{path} is there and is no coverage of this command, which would replace it; choose another "
                        "name with --picture")  # fmt: skip


def draw(curves: dict[str, list[dict[str, float]]], wished: dict[str, float], path: Path) -> None:
    """Coverage against accuracy, a line per way of answering, and the wished precision."""
    names = pictures.prepare_labels(list(curves))
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.2), dpi=120, layout="constrained")
    for name, points in zip(names, curves.values(), strict=True):
        axes.plot([100 * p["automated"] for p in points], [100 * p["accuracy"] for p in points], label=name, lw=1.8)
    lowest = min((p["accuracy"] for points in curves.values() for p in points), default=0)
    if "precision" in wished:
        axes.axhline(100 * wished["precision"], color="#777777", lw=1, ls="--")
    axes.set(xlim=(0, 100), ylim=(max(0, 100 * lowest - 4), 101), xlabel="questions that are answered by themselves, %",
             ylabel="of these right, %")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=9)
    axes.set_title("How much can be automated, the surest answers first", fontsize=10)
    pictures.save(figure, path)
