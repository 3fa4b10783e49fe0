"""The tuned model and the linear classifier as one: their log probabilities, weighted and added (a conditional logit).

The model's predictions name its best answer and the runner-up; what is left of its probability is shared evenly by the
other candidates. Two weights are fitted on one half of the questions and judged on the other, both ways.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from faq.coverage import halves

if TYPE_CHECKING:
    import numpy as np

FLOOR = 1e-6  # the least probability that counts


def log_of_model(rows: Sequence[dict[str, Any]], classes: Sequence[str]) -> "np.ndarray":
    """The model's log probabilities (n, classes) of its predictions."""
    import numpy as np

    place = {intent: k for k, intent in enumerate(classes)}
    found = np.empty((len(rows), len(classes)))
    for i, row in enumerate(rows):
        named = [(row.get("proposed", row["intent"]), row["probability"])]
        if row.get("runner_up"):
            named.append((row["runner_up"]["intent"], row["runner_up"]["probability"]))
        left = 1 - sum(probability for _, probability in named)
        found[i] = max(FLOOR, left / max(1, len(classes) - len(named)))
        for intent, probability in named:
            if intent in place:
                found[i, place[intent]] = max(FLOOR, probability)
    return np.log(found)


def probabilities(weights: "np.ndarray", logs: "np.ndarray") -> "np.ndarray":
    """Joined probabilities (n, classes); `logs` (2, n, classes)."""
    import numpy as np

    added = np.tensordot(weights, logs, 1)
    raised = np.exp(added - added.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def fit(logs: "np.ndarray", truth: "np.ndarray") -> "np.ndarray":
    """The weights (2,), 0 or more, with the least log loss; `truth` (n,): the true class, -1 for none of them."""
    import numpy as np
    from scipy.optimize import minimize

    known = truth >= 0
    rows = np.arange(int(known.sum()))

    def loss(weights: "np.ndarray") -> float:
        return float(-np.log(np.maximum(FLOOR, probabilities(weights, logs[:, known])[rows, truth[known]])).mean())

    return minimize(loss, np.ones(2), method="L-BFGS-B", bounds=[(0, 10), (0, 10)]).x


def join(
    rows: Sequence[dict[str, Any]], linear: "np.ndarray", classes: Sequence[str]
) -> tuple[list[dict[str, Any]], list[float]]:
    """(predictions of both together, the weights of model and classifier on all rows).

    `linear`: the classifier's values (n, classes), below 0 where a candidate is not listed.
    """
    import numpy as np

    logs = np.stack([log_of_model(rows, classes), np.log(np.maximum(FLOOR, linear))])
    logs[:, linear < 0] = -1e3
    place = {intent: k for k, intent in enumerate(classes)}
    truth = np.array([place.get(row["reference"], -1) for row in rows])
    found = np.empty(linear.shape)
    for known, rest in halves(len(rows)):
        found[rest] = probabilities(fit(logs[:, known], truth[known]), logs[:, rest])
    best = found.argmax(1)
    joined = [
        {"question": row.get("question", ""), "intent": classes[k], "reference": row["reference"],
         "probability": float(values[k])}
        for row, k, values in zip(rows, best, found, strict=True)
    ]  # fmt: skip
    return joined, [round(float(weight), 4) for weight in fit(logs, truth)]
