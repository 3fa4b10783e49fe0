"""The tuned model and the linear classifier as one: their log probabilities, weighted and added (a conditional logit).

Where a row has the probabilities of all its candidates they count; else what best answer and runner-up leave is shared
evenly by the others. Two weights are fitted on one half of the questions and judged on the other, both ways.
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
        named = [*row.get("probabilities", {}).items()]
        if not named:
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


def logs_of(
    rows: Sequence[dict[str, Any]], linear: "np.ndarray", classes: Sequence[str], none: str
) -> "tuple[np.ndarray, list[str]]":
    """(log probabilities (2, n, classes) of model and classifier, the classes with the none answer among them).

    `linear`: the classifier's values (n, classes), below 0 where a candidate is not listed. A classifier that knows no
    question without an intent says nothing of the none answer: it gets an even share.
    """
    import numpy as np

    names = list(classes)
    if none not in names:
        names.append(none)
        linear = np.hstack([linear, np.full((len(linear), 1), 1 / len(names))])
    logs = np.stack([log_of_model(rows, names), np.log(np.maximum(FLOOR, linear))])
    logs[:, linear < 0] = -1e3
    return logs, names


def join(
    rows: Sequence[dict[str, Any]], linear: "np.ndarray", classes: Sequence[str], none: str
) -> tuple[list[dict[str, Any]], list[float]]:
    """(predictions of both together, each by weights of the half that it is not in; the weights on all rows)."""
    import numpy as np

    logs, names = logs_of(rows, linear, classes, none)
    place = {intent: k for k, intent in enumerate(names)}
    truth = np.array([place.get(row["reference"], -1) for row in rows])
    found = np.empty(logs.shape[1:])
    for known, rest in halves(len(rows)):
        found[rest] = probabilities(fit(logs[:, known], truth[known]), logs[:, rest])
    weights = [round(float(weight), 4) for weight in fit(logs, truth)]
    return [row | said for row, said in zip(rows, named(found, names), strict=True)], weights


def apply(
    rows: Sequence[dict[str, Any]], linear: "np.ndarray", classes: Sequence[str], none: str, weights: Sequence[float]
) -> list[dict[str, Any]]:
    """`intent`, `probability` and `runner_up` of both together for every row, by weights that were kept."""
    import numpy as np

    logs, names = logs_of(rows, linear, classes, none)
    return named(probabilities(np.array(weights), logs), names)


def named(values: "np.ndarray", names: Sequence[str]) -> list[dict[str, Any]]:
    """The two best of each row of probabilities (n, classes), as faq/predict writes them."""
    import numpy as np

    order = np.argsort(-values, axis=1, kind="stable")[:, :2]
    return [
        {
            "intent": names[first], "probability": round(float(row[first]), 6),
            "runner_up": {"intent": names[second], "probability": round(float(row[second]), 6)},
        }
        for row, (first, second) in zip(values, order, strict=True)
    ]  # fmt: skip
