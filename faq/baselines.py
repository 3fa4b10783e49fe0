"""What simple classifiers make of the same questions, in seconds: the measure of what a tuned model is worth.

Nearest neighbour, a linear classifier and the most frequent intent, on an embedding model's vectors, or on hashed
character n-grams without one.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from llmops import files
from llmops.console import UserError, log
from llmops.intents.catalog import BY_CHANCE, Catalog
from llmops.intents.classifiers import Asked, Classifiers
from llmops.intents.neighbours import Neighbours
from llmops.intents.questions import compared

if TYPE_CHECKING:
    import numpy as np

ORDERS_GAIN = 0.107  # what --orders 3 added where it was measured: faq/README.md, "Is the model worth it"


@dataclass(frozen=True)
class Baseline:
    """Another way's answers to the test questions: rows as faq/predict writes them, what they cost in seconds.

    `seconds` None: not known. `values` (n, classes): probabilities, -1 where a row's list lacks the intent.
    """

    name: str
    features: str
    rows: list[dict[str, Any]]
    seconds: float | None
    values: "np.ndarray | None" = None


def compare(classifiers: Classifiers, folds: "np.ndarray", test: Sequence[Asked]) -> list[Baseline]:
    """The baselines' answers to the test questions. `folds`: of `out_of_fold`."""
    features, name = classifiers.features, classifiers.features.name
    texts = [asked.question for asked in test]
    frequent = Counter(asked.intent for asked in classifiers.own).most_common(1)[0][0]
    started = time.perf_counter()
    vectors = features.vectors(texts)
    encoded = time.perf_counter()
    neighbours = Neighbours(classifiers)
    cut = neighbours.threshold()
    near = time.perf_counter()
    answers = neighbours.answers(vectors, test, cut)
    seconds = time.perf_counter() - near + encoded - started
    found = [Baseline("nearest neighbour", name, answers, seconds)]
    rows = [{"question": a.question, "intent": frequent, "probability": 0.0, "reference": a.intent} for a in test]
    most = Baseline("most frequent intent", "", rows, 0.0)
    if classifiers.too_large:
        log(f"{len(classifiers.own)} questions with {len(classifiers.classes)} intents are too many for a linear "
            "classifier; nearest neighbours are the baseline")  # fmt: skip
        return [*found, most]
    model = classifiers.fit()
    started = time.perf_counter() - (encoded - started)
    values = model.predict_proba(features.joined(texts, vectors, classifiers.names))
    seconds = time.perf_counter() - started
    found.append(Baseline("linear classifier", name, classifiers.answers(values, test, classifiers.threshold(folds)),
                          seconds, classifiers.masked(values, [asked.variant for asked in test])))  # fmt: skip
    return [*found, most]


def advice(right: Sequence[bool], best: Baseline, figures: dict[str, Any], joined: Sequence[bool] | None = None) -> str:
    """Which to use, in one sentence; `right`: per test question, whether the tuned model has its intent; `joined`:
    whether model and linear classifier together have it."""
    theirs = [row["intent"] == row["reference"] for row in best.rows]
    what = named(best, figures)
    ours = sum(right) / len(right)
    above = beyond_chance(right, theirs)
    if joined and both_better(joined, right, theirs):
        both = sum(joined) / len(joined)
        return (
            f"Use the tuned model and the linear classifier together (--join true): their {both:.1%} are more than "
            f"chance above {what} and above the model alone ({ours:.1%})."
        )
    if above > 0:
        return f"Use the tuned model: its {ours:.1%} are more than chance above {what}."
    if above < 0:
        return f"Use {what}: the tuned model's {ours:.1%} are below it, so it is not worth its training here."
    return f"Use {what}: the tuned model's {ours:.1%} differ from it by no more than chance, and cost more."


def both_better(joined: Sequence[bool], right: Sequence[bool], theirs: Sequence[bool]) -> bool:
    """Whether model and classifier together are better than the model and than the best baseline, beyond chance."""
    return beyond_chance(joined, theirs) > 0 and beyond_chance(joined, right) > 0


def named(best: Baseline, figures: dict[str, Any]) -> str:
    """A way with how good it is and how long a question takes it, as a part of a sentence."""
    name, features, right, seconds = best.name, best.features, f"{figures['accuracy']:.1%}", best.seconds
    if not features:
        return f"the most frequent intent ({right})"
    if seconds is None:
        return f"the {name} on {features} ({right})"
    return f"the {name} on {features} ({right}, in {1000 * figures['seconds_per_question']:.2g} ms a question)"


def more_orders(
    rows: Sequence[dict[str, Any]], right: Sequence[bool], best: Baseline, joined: Sequence[bool], catalog: Catalog
) -> str:
    """What `--orders` may add to a model that is not worth its cost, "" where it cannot, or not enough.

    There is one measurement, so nothing is promised.
    """
    how = catalog.retrieval
    if how.get("order") != BY_CHANCE or any(row.get("orders", 1) != 1 or "model_intent" in row for row in rows):
        return ""
    theirs = [row["intent"] == row["reference"] for row in best.rows]
    advised = beyond_chance(right, theirs) > 0 or (joined and both_better(joined, right, theirs))
    if advised or sum(theirs) - sum(right) > ORDERS_GAIN * len(right):
        return ""
    return (
        f"Each question was asked in one order of its candidates: predict.sh --orders {min(3, how['candidates'])} asks "
        "it in so many and takes as many times as long. The one measurement that there is, with a small model, went "
        "from 57.4% to 68.1% right (faq/README.md)."
    )


def untuned(rows: list[dict[str, Any]], tuned: Sequence[dict[str, Any]]) -> Baseline:
    """The base model's answers beside the tuned one's. Raises UserError where they are to other questions."""
    nothing: dict[str, Any] = {}
    for number, (row, other) in enumerate(zip_longest(rows, tuned, fillvalue=nothing), 1):
        if any(row.get(key) != other.get(key) for key in ("question", "reference")):
            raise UserError(
                f"--untuned_file: line {number} answers {files.shown(row.get('question'))}, where the first file "
                f"answers {files.shown(other.get('question'))}; expected predictions of the base model for the same "
                "questions"
            )
    return Baseline("untuned model", "the same prompts", rows, None)


def beyond_chance(ours: Sequence[bool], theirs: Sequence[bool]) -> int:
    """1 or -1 where one way is better on the same questions by more than two standard errors (McNemar: of the
    questions that exactly one of the two has right), else 0."""
    only = sum(a > b for a, b in zip(ours, theirs, strict=True))
    other = sum(b > a for a, b in zip(ours, theirs, strict=True))
    return (only - other > 2 * (only + other) ** 0.5) - (other - only > 2 * (only + other) ** 0.5)


def say_leaks(train: Sequence[Asked], test: Sequence[Asked]) -> None:
    """Say when test questions are training questions."""
    seen = {(compared(asked.question), asked.intent) for asked in train}
    count = sum((compared(asked.question), asked.intent) in seen for asked in test)
    if count:
        log(f"warning: {count} of {len(test)} test questions are training questions; every figure is too good")
