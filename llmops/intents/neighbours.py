"""What the nearest training questions say, in bounded memory: some rows at once, never all of them with all intents.

Up to LARGEST_COMPARED every row is compared with every question. Beyond that a row with a short list of candidates is
compared with their questions alone, and a threshold is chosen by some training rows, which a seed draws.
"""

from collections.abc import Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from llmops.intents.retrieval import nearest, parts

if TYPE_CHECKING:
    import numpy as np

    from llmops.intents.classifiers import Asked, Classifiers
    from llmops.intents.retrieval import Rows

LARGEST_COMPARED = 2e12  # rows x questions x features: minutes
MOST_JUDGED = 50_000  # training rows for a threshold where there are more comparisons than that
FEWEST_JUDGED = 1000
SHORT = 8  # a list is short that has less than this part of all questions


class Neighbours:
    """The training questions of `found` by their intents."""

    def __init__(self, found: "Classifiers") -> None:
        import numpy as np

        self.found = found
        self.order = np.argsort(found.labels, kind="stable")
        self.starts = np.searchsorted(found.labels[self.order], np.arange(len(found.classes) + 1))

    def all_compared(self, rows: int) -> bool:
        """Whether so many rows are compared with every question."""
        known, width = self.found.vectors.shape
        return rows * known * width <= LARGEST_COMPARED

    def answers(self, vectors: "Rows", test: "Sequence[Asked]", cut: float) -> list[dict[str, Any]]:
        """The answers to test questions with these vectors (n, d), as `Classifiers.answers` gives them."""
        rows: list[dict[str, Any]] = []
        whole = self.all_compared(len(test))
        for part in parts(len(test), len(self.found.classes)):
            variants = [asked.variant for asked in test[part]]
            values = self.found.nearest(vectors[part]) if whole else self.among_listed(vectors[part], variants)
            rows += self.found.answers(values, test[part], cut)
        return rows

    def threshold(self) -> float:
        """The cosine under which 不符合 is the better answer to a training question without itself."""
        import numpy as np

        found, rows = self.found, self.found.judged_rows
        variants = [asked.variant for _, asked in rows]
        if not any(asked.intent == found.catalog.none for _, asked in rows):
            return found.cut(np.zeros(0, int), np.zeros(0), [])
        whole = self.all_compared(len(found.own))
        if not whole:
            chosen = sorted(Random(0).sample(range(len(rows)), min(len(rows), self.most_judged(variants))))
            rows, variants = [rows[k] for k in chosen], [variants[k] for k in chosen]
        numbers = np.array([number for number, _ in rows])
        best, top = np.empty(len(rows), int), np.empty(len(rows), np.float32)
        for at, values in self.left_out(numbers) if whole else self.left_out_of_lists(numbers, variants):
            best[at], top[at] = found.best(values, [variants[k] for k in at])
        return found.cut(best, top, rows)

    def most_judged(self, variants: Sequence[int | None]) -> int:
        """How many training rows are judged: fewer where a row is compared with most questions."""
        if all(self.is_short(listed) for listed in map(self.found.listed, set(variants))):
            return MOST_JUDGED
        known, width = self.found.vectors.shape
        return max(FEWEST_JUDGED, int(LARGEST_COMPARED / known / width))

    def left_out(self, numbers: "np.ndarray") -> "Iterator[tuple[np.ndarray, np.ndarray]]":
        """(which of the rows (k,), cosines (k, classes) of their questions, itself left out), by questions.

        `numbers` (n,): the question of each row.
        """
        import numpy as np

        by_number = numbers.argsort(kind="stable")
        for part in parts(len(self.found.own), len(self.found.classes)):
            vectors = self.found.vectors[part]
            own = range(part.start, part.start + len(vectors))
            values = nearest(vectors, self.found.vectors, self.found.labels, own)
            at = by_number[slice(*np.searchsorted(numbers[by_number], [own.start, own.stop]))]
            yield at, values[numbers[at] - own.start]

    def left_out_of_lists(
        self, numbers: "np.ndarray", variants: Sequence[int | None]
    ) -> "Iterator[tuple[np.ndarray, np.ndarray]]":
        """The same by rows, with the questions of their candidates alone."""
        import numpy as np

        for part in parts(len(numbers), len(self.found.classes)):
            own = numbers[part]
            yield np.arange(len(numbers))[part], self.among_listed(self.found.vectors[own], variants[part], own)

    def is_short(self, listed: Sequence[int] | None) -> bool:
        """Whether the classes of a list have few questions, so that these are looked up."""
        if listed is None:
            return False
        return sum(int(self.starts[k + 1] - self.starts[k]) for k in listed) * SHORT <= len(self.order)

    def among_listed(
        self, vectors: "np.ndarray", variants: Sequence[int | None], own: "Sequence[int] | np.ndarray" = ()
    ) -> "np.ndarray":
        """Cosine (n, classes) of each row (n, d) with the nearest question of each candidate, -1 for other classes.

        `own`: the question that each row is, which does not count for it.
        """
        import numpy as np

        values = np.full((len(vectors), len(self.found.classes)), -1, np.float32)
        lists = {variant: self.found.listed(variant) for variant in set(variants)}
        long = [row for row, variant in enumerate(variants) if not self.is_short(lists[variant])]
        if long:
            theirs = [own[row] for row in long] if len(own) else []
            values[long] = nearest(vectors[long], self.found.vectors, self.found.labels, theirs)
        for row, variant in enumerate(variants):
            listed = lists[variant]
            if not listed or not self.is_short(listed):
                continue
            places = [self.order[self.starts[k] : self.starts[k + 1]] for k in listed]
            numbers = np.concatenate(places)
            cosines = self.found.vectors[numbers] @ vectors[row]
            if len(own):
                cosines[numbers == own[row]] = -1
            ends = np.cumsum([len(place) for place in places])
            values[row, listed] = np.maximum.reduceat(cosines, [0, *ends[:-1]])
        return values
