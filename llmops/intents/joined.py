"""The tuned model and the linear classifier as one: their log probabilities, weighted and added (a conditional logit).

The none answer has an offset of its own: how often questions have no intent is another thing in use than in training.
Where a row has the probabilities of all its candidates they count; else what best answer and runner-up leave is shared
evenly by the others. faq/score fits the two weights and keeps them in intents.json.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops.console import UserError, stdout_to_stderr
from llmops.intents.catalog import Catalog
from llmops.intents.classifiers import Classifiers, read_asked
from llmops.intents.retrieval import FLOOR, ROWS_AT_ONCE, Features

if TYPE_CHECKING:
    import numpy as np

NONE_OFFSET = "none"  # its name beside `model` and `linear`; of files from before it is 0


class Joint:
    """The linear classifier beside a model, with the weights of both that the catalog keeps."""

    def __init__(self, classifiers: Classifiers) -> None:
        self.classifiers, self.fitted = classifiers, classifiers.fit()
        catalog = classifiers.catalog
        self.weights = [catalog.decision["model"], catalog.decision["linear"], catalog.decision.get(NONE_OFFSET, 0.0)]

    def values(self, questions: Sequence[str], catalog: Catalog, variants: Sequence[int | None]) -> "np.ndarray":
        """The classifier's probabilities (n, classes), -1 where a question's candidate list lacks the intent."""
        found, features = self.classifiers, self.classifiers.features
        inputs = features.joined(questions, features.vectors(questions), found.names)
        return found.masked(self.fitted.predict_proba(inputs), variants, catalog)

    def ranked(self, rows: Sequence[dict[str, Any]], values: "np.ndarray", count: int) -> list[list[tuple[str, float]]]:
        """The `count` best (intent, probability) of both together for every row, the most probable first.

        `rows` are the model's predictions, `values` the classifier's.
        """
        import numpy as np

        logs, names = logs_of(rows, values, self.classifiers.classes, self.classifiers.catalog.none)
        return best(probabilities(np.array(self.weights), logs), names, count)

    def join(
        self, rows: Sequence[dict[str, Any]], questions: Sequence[str], catalog: Catalog, variants: Sequence[int | None]
    ) -> list[dict[str, Any]]:
        """The model's predictions as both together say them, some at once; `model_intent` is the model's own."""
        found = []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            values = self.values(questions[part], catalog, variants[part])
            for row, ranked in zip(rows[part], self.ranked(rows[part], values, 2), strict=True):
                both = told(ranked)
                more = {"reply": catalog.reply(both["intent"]), "model_intent": row["intent"]}
                found.append(row | both | more)
        return found


def open_joint(catalog: Catalog, join_file: str, embedding_model: str) -> Joint:
    """The classifier on the questions of `join_file`. Raises UserError where it is not the one of the kept weights."""
    from llmops.embedding.folder import read_folder

    train = read_asked(Path(join_file), catalog)
    folder = read_folder(Path(embedding_model)) if embedding_model else None
    with stdout_to_stderr():
        found = Classifiers(train, catalog, Features(folder))
    kept = catalog.decision  # without "learned" where an older faq/score wrote it
    if found.width != kept["inputs"] or kept.get("learned", found.digest) != found.digest:
        raise UserError(
            "faq/score used another --embedding_model or other questions for its weights; pass the same ones"
        )
    return Joint(found)


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
    """Joined probabilities (n, classes); `logs` (3, n, classes), `weights` of the three."""
    import numpy as np

    added = np.tensordot(weights, logs, 1)
    raised = np.exp(added - added.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def logs_of(
    rows: Sequence[dict[str, Any]], linear: "np.ndarray", classes: Sequence[str], none: str
) -> "tuple[np.ndarray, list[str]]":
    """(log probabilities of model and classifier, 1 for the none answer and 0 for others (3, n, classes); the classes).

    `linear`: the classifier's values (n, classes), below 0 where a candidate is not listed. A classifier that knows no
    question without an intent says nothing of the none answer: it gets an even share.
    """
    import numpy as np

    names = list(classes)
    if none not in names:
        names.append(none)
        linear = np.hstack([linear, np.full((len(linear), 1), 1 / len(names))])
    is_none = np.broadcast_to([float(name == none) for name in names], linear.shape)
    logs = np.stack([log_of_model(rows, names), np.log(np.maximum(FLOOR, linear)), is_none])
    logs[:2, linear < 0] = -1e3
    return logs, names


def best(values: "np.ndarray", names: Sequence[str], count: int) -> list[list[tuple[str, float]]]:
    """The `count` best (name, value) of each row of probabilities (n, classes), the most probable first."""
    import numpy as np

    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    return [[(names[k], float(row[k])) for k in places] for row, places in zip(values, order, strict=True)]


def told(ranked: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """`intent`, `probability` and `runner_up` of the two best (intent, probability)."""
    (first, p), (second, q) = ranked[:2]
    return {
        "intent": first, "probability": round(p, 6), "runner_up": {"intent": second, "probability": round(q, 6)},
    }  # fmt: skip
