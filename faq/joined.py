"""The weights of model and linear classifier together, and the offset of the none answer.

They are fitted on one half of the questions and judged on the other, both ways; those on all questions are kept.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from faq.coverage import halves
from llmops.intents.joined import FLOOR, best, logs_of, probabilities, told

if TYPE_CHECKING:
    import numpy as np


def fit(logs: "np.ndarray", truth: "np.ndarray") -> "np.ndarray":
    """The weights with the least log loss: of model and classifier, 0 or more, and the none answer's offset.

    `logs` (3, n, classes); `truth` (n,): the true class, -1 for none of the classes. The offset is 0 where no question
    has the none answer: how often it comes in use cannot be told from these.
    """
    import numpy as np
    from scipy.optimize import minimize

    known = truth >= 0
    rows = np.arange(int(known.sum()))

    def loss(weights: "np.ndarray") -> float:
        return float(-np.log(np.maximum(FLOOR, probabilities(weights, logs[:, known])[rows, truth[known]])).mean())

    with_none = bool(logs[2, known][rows, truth[known]].any())
    bounds = [(0, 10), (0, 10), (-10, 10) if with_none else (0, 0)]
    return minimize(loss, [1.0, 1.0, 0.0], method="L-BFGS-B", bounds=bounds).x


def join(
    rows: Sequence[dict[str, Any]], linear: "np.ndarray", classes: Sequence[str], none: str
) -> tuple[list[dict[str, Any]], list[float], list[dict[str, Any]]]:
    """(predictions of both together, each by weights of the half that it is not in; the weights on all rows, rounded;
    predictions by these, as faq/predict makes them)."""
    import numpy as np

    logs, names = logs_of(rows, linear, classes, none)
    place = {intent: k for k, intent in enumerate(names)}
    truth = np.array([place.get(row["reference"], -1) for row in rows])
    found = np.empty(logs.shape[1:])
    for known, rest in halves(len(rows)):
        found[rest] = probabilities(fit(logs[:, known], truth[known]), logs[:, rest])
    weights = [round(float(weight), 4) for weight in fit(logs, truth)]
    return said(rows, found, names), weights, said(rows, probabilities(np.array(weights), logs), names)


def said(rows: Sequence[dict[str, Any]], values: "np.ndarray", names: Sequence[str]) -> list[dict[str, Any]]:
    """The predictions with what joined probabilities (n, names) say."""
    return [row | told(ranked) for row, ranked in zip(rows, best(values, names, 2), strict=True)]
