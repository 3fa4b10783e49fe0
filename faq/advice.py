"""What would make training data better: intents with few questions, intents that eat others, questions to look at.

All of it is what cross-validation says: a classifier that was fitted without a question disagrees with its intent.
"""

from collections import Counter
from typing import TYPE_CHECKING, Any

from llmops.intents.classifiers import Classifiers

if TYPE_CHECKING:
    import numpy as np

FEW = 5  # questions an intent should have at least
SHARE_EATEN = 0.2  # of an intent's questions that go to one other intent
SURE = 0.4  # probability of the other intent from which on a question is probably mislabelled
TIMES = 10  # as probable as its own, at least
SHOWN = 20


def advise(classifiers: Classifiers, folds: "np.ndarray") -> dict[str, Any]:
    """`few_questions`, `eaten` and `suspects` of the training questions. `folds`: of `Classifiers.out_of_fold`."""
    sizes = Counter(asked.intent for asked in classifiers.own)
    few = sorted(((count, intent) for intent, count in sizes.items() if count < FEW))
    if not folds.any():
        return {"few_questions": listed(few), "eaten": [], "suspects": []}
    best = folds.argmax(1)
    lost = Counter(
        (asked.intent, classifiers.classes[k])
        for asked, k in zip(classifiers.own, best, strict=True)
        if classifiers.classes[k] != asked.intent
    )
    eaten = [
        {"intent": intent, "by": other, "questions": count, "of": sizes[intent]}
        for (intent, other), count in lost.most_common()
        if count > 1 and count >= SHARE_EATEN * sizes[intent]
    ]
    return {"few_questions": listed(few), "eaten": eaten, "suspects": suspects(classifiers, folds)}


def listed(few: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Intents with their numbers of questions."""
    return [{"intent": intent, "questions": count} for count, intent in few]


def suspects(classifiers: Classifiers, folds: "np.ndarray") -> list[dict[str, Any]]:
    """Questions that are probably mislabelled, the surest first, with the intent that fits better.

    An intent's only question is none of them: without it nobody knows the intent.
    """
    import numpy as np

    own = folds[np.arange(len(folds)), classifiers.labels]
    best = folds.argmax(1)
    top = folds[np.arange(len(folds)), best]
    found = (classifiers.judged & (top >= SURE) & (TIMES * own <= top)).nonzero()[0]
    return [
        {"line": classifiers.own[k].line, "question": classifiers.own[k].question, "intent": classifiers.own[k].intent,
         "suggested": classifiers.classes[best[k]], "probability": round(float(top[k]), 4)}
        for k in sorted(found, key=lambda k: (own[k] - top[k], k))
    ]  # fmt: skip
