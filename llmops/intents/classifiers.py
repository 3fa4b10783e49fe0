"""Simple classifiers on the training questions: the nearest one, and a linear model on the same vectors.

They see what the model sees: a question whose row lacks some candidates is not answered with those, and what is too
unsure is 不符合, by a threshold from cross-validation on the training questions.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops import files
from llmops.console import UserError
from llmops.embedding.folder import identity
from llmops.intents.catalog import Catalog
from llmops.intents.linear import fit, out_of_fold, too_large
from llmops.intents.questions import read_faq
from llmops.intents.retrieval import Features, nearest

if TYPE_CHECKING:
    import numpy as np

    from llmops.intents.retrieval import Rows

ALL = -2.0  # a threshold below every cosine and probability


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with its true intent; `variant`: the candidate list that its row has; `line`: where it stands."""

    question: str
    intent: str
    variant: int | None = None
    line: int = 0


def check_variant(asked: Asked, catalog: Catalog, place: str) -> None:
    """Raise UserError for a candidate list that the intents file does not have."""
    if asked.variant is not None and not (type(asked.variant) is int and 0 <= asked.variant < catalog.variants):
        raise UserError(f"{place}: variant {files.shown(asked.variant)} is not in the intents file, which has "
                        f"{catalog.variants}; give the file that was written with this data")  # fmt: skip


def read_asked(path: Path, catalog: Catalog) -> list[Asked]:
    """The training questions: train.jsonl of faq/prepare, or data in any shape that it reads."""
    found = [
        Asked(question, record.intent, record.variant, record.line)
        for record in read_faq(path, with_prompts=False).records
        for question in record.questions
    ]
    known = {*catalog.intents, catalog.none}
    for asked in found:
        if asked.intent not in known:
            raise UserError(
                f"{path}:{asked.line}: the intent {files.shown(asked.intent)} is not in the intents file; give the "
                "training data that the model learned from with --train_file"
            )
        check_variant(asked, catalog, f"{path}:{asked.line}")
    if len({asked.intent for asked in found if asked.intent != catalog.none}) < 2:
        raise UserError(f"{path} has fewer than two intents; expected training questions of every intent")
    return found


class Classifiers:
    """What is fitted on the training questions; `own`: those whose intent is the question's, not their list's doing.

    不符合 to a row's own list is the list's doing where the question has an intent in another row.
    """

    def __init__(self, train: Sequence[Asked], catalog: Catalog, features: Features) -> None:
        import numpy as np

        self.catalog, self.features, self.train = catalog, features, list(train)
        inside = {asked.question for asked in train if asked.intent != catalog.none}
        self.own = [
            asked for asked in train
            if asked.variant is None or asked.intent != catalog.none or asked.question not in inside
        ]  # fmt: skip
        self.texts = [asked.question for asked in self.own]
        self.classes = sorted({asked.intent for asked in self.own})
        self.place = {intent: k for k, intent in enumerate(self.classes)}
        self.labels = np.array([self.place[asked.intent] for asked in self.own])
        self.vectors = features.known(self.texts)

    @cached_property
    def names(self) -> "Rows":
        """The intents' names as vectors (classes, d)."""
        return self.features.vectors([intent.replace("_", " ") for intent in self.classes])

    @cached_property
    def inputs(self) -> "np.ndarray":
        """What a linear classifier reads of the training questions (n, width)."""
        return self.features.joined(self.texts, self.vectors, self.names)

    @property
    def width(self) -> int:
        """How many features a linear classifier reads of a question."""
        return self.features.width(self.vectors, len(self.classes))

    def nearest(self, vectors: "Rows", leave_out: bool = False) -> "np.ndarray":
        """Cosine (n, classes) of each row with the nearest training question of each class, itself left out."""
        return nearest(vectors, self.vectors, self.labels, list(range(len(vectors))) if leave_out else [])

    @property
    def too_large(self) -> bool:
        """Whether a linear classifier would take hours."""
        return too_large(len(self.own) * self.width, len(self.classes))

    def fit(self) -> Any:
        """A logistic regression on the training questions."""
        return fit(self.inputs, self.labels)

    def out_of_fold(self) -> "np.ndarray":
        """Probabilities (n, classes) of every training question by classifiers that did not see it; (0, classes) where
        these would take hours."""
        import numpy as np

        if self.too_large:
            return np.zeros((0, len(self.classes)), np.float32)
        return out_of_fold(self.inputs, self.labels, len(self.classes))

    @cached_property
    def digest(self) -> str:
        """A name for what is learned: the questions with their intents in any order, and the embedding model."""
        model = self.features.model
        learned = sorted({(asked.question, asked.intent) for asked in self.own})
        text = json.dumps([identity(model, "fp32") if model else "", learned])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @cached_property
    def judged(self) -> "np.ndarray":
        """Whether other questions than a training question have its intent, bool (n,); else no fold can know it."""
        import numpy as np

        return np.bincount(self.labels)[self.labels] > 1

    @cached_property
    def judged_rows(self) -> list[tuple[int, Asked]]:
        """(number of its question, row) of the training rows whose question is one of `own`."""
        row_of = {text: k for k, text in enumerate(self.texts)}
        return [(row_of[asked.question], asked) for asked in self.train if asked.question in row_of]

    def threshold(self, values: "np.ndarray") -> float:
        """The value under which 不符合 is the better answer; `values` (n, classes) are those of `out_of_fold`."""
        if not values.any():
            return ALL
        rows = self.judged_rows
        best, top = self.best(values[[k for k, _ in rows]], [asked.variant for _, asked in rows])
        return self.cut(best, top, rows)

    def cut(self, best: "np.ndarray", top: "np.ndarray", rows: Sequence[tuple[int, Asked]]) -> float:
        """The value under which 不符合 is the better answer to rows, by the likeliest class and its value of each."""
        none = self.catalog.none
        kept = [self.classes[k] == asked.intent for k, (_, asked) in zip(best, rows, strict=True)]
        return best_cut(top, kept, [asked.intent == none for _, asked in rows])

    def best(self, values: "np.ndarray", variants: Sequence[int | None]) -> "tuple[np.ndarray, np.ndarray]":
        """(class, value) of the likeliest candidate of each row."""
        import numpy as np

        masked = self.masked(values, variants)
        best = masked.argmax(1)
        return best, masked[np.arange(len(best)), best]

    def masked(
        self, values: "np.ndarray", variants: Sequence[int | None], catalog: Catalog | None = None
    ) -> "np.ndarray":
        """The values (n, classes) with -1 where a row's list lacks the intent; `catalog`: with more lists than ours."""
        import numpy as np

        masked = np.full_like(values, -1)
        lists: dict[int | None, list[int] | None] = {}
        for row, variant in enumerate(variants):
            if variant not in lists:
                lists[variant] = self.listed(variant, catalog)
            listed = lists[variant]
            if listed is None:
                masked[row] = values[row]
            else:
                masked[row, listed] = values[row, listed]
        return masked

    def listed(self, variant: int | None, catalog: Catalog | None = None) -> list[int] | None:
        """The classes that may be answered to a candidate list, ascending; None for all."""
        if variant is None:
            return None
        lists = catalog or self.catalog
        names = {*lists.candidates(variant), lists.none}
        return sorted(self.place[name] for name in names if name in self.place)

    def answers(self, values: "np.ndarray", test: Sequence[Asked], threshold: float) -> list[dict[str, Any]]:
        """Rows as faq/predict writes them; the runner-up where 不符合 is the likeliest class.

        `proposed`, whose probability a row has, where the threshold made it 不符合.
        """
        variants = [asked.variant for asked in test]
        best, top = self.best(values, variants)
        rows: list[dict[str, Any]] = [
            {"question": asked.question, "intent": self.classes[k], "probability": float(value),
             "reference": asked.intent}
            | ({"intent": self.catalog.none, "proposed": self.classes[k]} if value < threshold else {})
            for asked, k, value in zip(test, best, top, strict=True)
        ]  # fmt: skip
        if self.catalog.none in self.classes:
            place = self.classes.index(self.catalog.none)
            others = values.copy()
            others[:, place] = -1
            for row, k, second, value in zip(rows, best, *self.best(others, variants), strict=True):
                if k == place:
                    row["runner_up"] = {"intent": self.classes[second], "probability": max(0.0, float(value))}
        return rows


def best_cut(top: "np.ndarray", kept_right: Sequence[bool], none_right: Sequence[bool]) -> float:
    """The threshold with the most right answers, when those below it are 不符合; ALL when none should be."""
    import numpy as np

    order = np.argsort(-top, kind="stable")
    kept = np.concatenate([[0], np.cumsum(np.array(kept_right, int)[order])])
    below = np.array(none_right, int)[order]
    right = kept + below.sum() - np.concatenate([[0], np.cumsum(below)])
    count = len(right) - 1 - int(right[::-1].argmax())  # as many answers as possible
    return ALL if count == len(top) else float(np.nextafter(top[order[count]], np.float32(2)))
