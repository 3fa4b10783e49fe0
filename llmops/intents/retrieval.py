"""Which intents are worth listing for a question: the K most similar ones, by their names and training questions.

With thousands of intents the whole list fits no prompt. Similarity is the cosine with the nearest of an intent's texts,
by an embedding model or by character n-grams; where it helps, the log probability of a linear classifier on the same
questions is added. The list is in the order of the intents: where lists agree, prompts begin alike. A candidate may be
shown with the training questions of its own that are most similar to the one asked; then no two prompts agree, and the
list begins with the most similar intent, so that its place tells what the embedding knows. In random order the model
has to read: alone it knows less, joined with the classifier more.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from llmops.console import UserError, stdout_to_stderr
from llmops.embedding.ngrams import DIMENSION
from llmops.intents.catalog import BY_CHANCE, BY_NUMBER, BY_SIMILARITY, COSINE, JOINT, Catalog
from llmops.intents.linear import fit, out_of_fold

if TYPE_CHECKING:
    import numpy as np

    from llmops.embedding.encoder import Encoder
    from llmops.embedding.folder import ModelFolder

    Rows = Any  # an array (n, d), or NgramRows, whose slices are arrays

Shown = tuple[tuple[str, ...], ...]  # questions beside each candidate

NGRAM_WEIGHT = 0.5  # of n-grams beside an embedding's vectors: wording helps where meanings are near
NAME_WEIGHT = 0.3  # of the cosines with intents' names; both tried on banking77, where they add 0.7 points
LINEAR_WEIGHT = 0.1  # of log probabilities beside cosines; 0.05 to 0.5 serve alike on banking77's training questions
FLOOR = 1e-6  # the least probability that counts
LARGEST_RANKED = 1e9  # questions x features x intents that are fitted at every start, in about 10 s
COMPARED_AT_ONCE = 512  # questions that are compared with known ones together
KNOWN_AT_ONCE = 32768  # of these; so many cosines are 64 MiB
VALUES_AT_ONCE = 1 << 25  # questions x intents
ROWS_AT_ONCE = 4096  # questions


def load_encoder(model: "ModelFolder", device: str) -> "Encoder":
    """The embedding model of a folder that was checked."""
    from llmops.embedding.encoder import Encoder

    return Encoder(model, device, "fp32", False)


class Features:
    """Texts to rows of features of length 1: the embedding with n-grams beside it, or n-grams alone."""

    def __init__(self, model: "ModelFolder | None", device: str = "cpu") -> None:
        self.model = model
        self.encoder = load_encoder(model, device) if model else None
        self.name = f"embeddings of {model.folder.name}" if model else "character n-grams"

    def vectors(self, texts: Sequence[str]) -> "Rows":
        """Unit vectors (n, d) for comparing texts with each other; n-grams of many texts without their zeros."""
        from llmops.embedding.ngrams import NgramRows, ngram_vectors

        if self.encoder:
            return self.encoder.encode(texts)
        return ngram_vectors(texts) if len(texts) <= KNOWN_AT_ONCE else NgramRows(texts)

    def known(self, texts: Sequence[str]) -> "Rows":
        """The same of texts that are asked for at every start: kept in the cache of embeddings."""
        from llmops.embedding.cache import Cache, default_cache, embed

        if not self.model:
            return self.vectors(texts)
        assert self.encoder is not None
        encoder = self.encoder
        return embed(texts, Cache(default_cache(), self.model, "fp32", must_work=False), lambda: encoder)

    def joined(self, texts: Sequence[str], vectors: "Rows", names: "Rows") -> "np.ndarray":
        """What the linear classifier reads (n, e).

        With an embedding model its vectors, n-grams and cosines with the names of the intents (c, d), side by side;
        else the n-grams.
        """
        import numpy as np

        from llmops.embedding.ngrams import ngram_vectors

        if not self.encoder:
            return vectors[:]
        return np.hstack([vectors, NGRAM_WEIGHT * ngram_vectors(texts), NAME_WEIGHT * (vectors @ names.T)])

    def width(self, vectors: "Rows", names: int) -> int:
        """How many features `joined` makes of such vectors and so many names."""
        return vectors.shape[1] + (self.encoder is not None) * (DIMENSION + names)


def nearest(vectors: "Rows", known: "Rows", labels: "np.ndarray", own: Sequence[int] = ()) -> "np.ndarray":
    """Cosine (n, classes) of each row (n, d) with the nearest of `known` (m, d) of each class; `labels` (m,) from 0.

    `own`: the known vector that each row is, which does not count for it; -1 for none. Beside what it returns it takes
    no more memory than COMPARED_AT_ONCE rows and KNOWN_AT_ONCE known ones, or those of one class, need.
    """
    import numpy as np

    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(int(labels.max()) + 2))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    in_order = bool((order == place).all())
    found = np.empty((len(vectors), len(starts) - 1), np.float32)
    for first, last in class_blocks(starts):
        begin, end = starts[first], starts[last]
        whole = in_order or end - begin == len(labels)  # the columns stay as they are known
        block = known[begin:end] if whole else known[order[begin:end]]
        for start in range(0, len(vectors), COMPARED_AT_ONCE):
            rows = slice(start, start + COMPARED_AT_ONCE)
            cosines = vectors[rows] @ block.T
            for row, number in enumerate(own[rows]):
                if number >= 0 and begin <= place[number] < end:
                    cosines[row, number if whole and not in_order else place[number] - begin] = -1
            if whole and not in_order:
                cosines = cosines[:, order]
            found[rows, first:last] = np.maximum.reduceat(cosines, starts[first:last] - begin, axis=1)
    return found


def class_blocks(starts: "np.ndarray") -> Iterator[tuple[int, int]]:
    """(first class, one after the last) of blocks of at most KNOWN_AT_ONCE vectors, or one class; `starts` (c + 1,)."""
    first, classes = 0, len(starts) - 1
    while first < classes:
        last = first + 1
        while last < classes and starts[last + 1] - starts[first] <= KNOWN_AT_ONCE:
            last += 1
        yield first, last
        first = last


class Retriever:
    """The texts of every intent as vectors. `examples`: training questions by intent, in the order of the prompt.

    `ranked_by`: COSINE, or JOINT with a linear classifier on these questions.
    """

    def __init__(self, examples: Mapping[str, Sequence[str]], embedding_model: str, ranked_by: str = COSINE) -> None:
        import numpy as np

        from llmops.embedding.folder import read_folder

        self.intents = list(examples)
        self.number = {intent: k for k, intent in enumerate(self.intents)}
        self.features = Features(read_folder(Path(embedding_model)) if embedding_model else None)
        self.texts, labels, self.starts = list[str](), [], []
        for number, (intent, questions) in enumerate(examples.items()):
            self.starts.append(len(self.texts))
            own = [intent.replace("_", " "), *questions]
            self.texts += own
            labels += [number] * len(own)
        self.starts.append(len(self.texts))
        self.place = {text: row for row, text in enumerate(self.texts)}
        self.labels = np.array(labels)
        self.known = self.features.known(self.texts)
        self.questions = np.setdiff1d(np.arange(len(self.texts)), self.starts)  # rows that are no names
        self.linear: Any = None
        if ranked_by == JOINT:
            self._fit()

    def _fit(self) -> None:
        self.linear = fit(self._inputs, self.labels[self.questions])

    def with_linear(self) -> "Retriever":
        """The same, ranking with a linear classifier's help."""
        other = copy(self)
        other._fit()
        return other

    @cached_property
    def _inputs(self) -> "np.ndarray":
        """What the linear classifier reads of the intents' questions (n, e)."""
        texts = [self.texts[row] for row in self.questions]
        return self.features.joined(texts, self.known[self.questions], self.known[self.starts[:-1]])

    @property
    def can_join(self) -> bool:
        """Whether a linear classifier can be fitted to these questions at every start."""
        count = len(self.questions)
        width = self.features.width(self.known, len(self.intents))
        return count >= 2 * len(self.intents) and count * width * len(self.intents) <= LARGEST_RANKED

    def scores(self, questions: Sequence[str], vectors: "np.ndarray", itself: bool = True) -> "np.ndarray":
        """How similar each intent is to each question (n, intents), by its vector (n, d).

        `itself` False: a question that is one of the compared texts is not compared with itself, and judged by a
        classifier that did not see it.
        """
        import numpy as np

        own = [] if itself else [self.place.get(text, -1) for text in questions]
        found = nearest(vectors, self.known, self.labels, own)
        if self.linear is None:
            return found
        inputs = self.features.joined(questions, vectors, self.known[self.starts[:-1]])
        logs = np.full(found.shape, np.log(FLOOR), np.float32)
        logs[:, self.linear.classes_] = np.log(np.maximum(FLOOR, self.linear.predict_proba(inputs)))
        if not itself:
            seen = {row: k for k, row in enumerate(self.questions.tolist())}
            rows = [(k, seen[place]) for k, place in enumerate(own) if place in seen]
            if rows:
                at, theirs = (np.array(side) for side in zip(*rows, strict=True))
                logs[at] = np.log(np.maximum(FLOOR, self._unseen[theirs]))
        return found + LINEAR_WEIGHT * logs

    @cached_property
    def _unseen(self) -> "np.ndarray":
        """Probabilities (n, intents) of the intents' questions by classifiers that did not see them."""
        return out_of_fold(self._inputs, self.labels[self.questions], len(self.intents))

    def ranked(
        self, questions: Sequence[str], vectors: "np.ndarray", count: int, itself: bool = True
    ) -> "list[list[int]]":
        """Numbers of the `count` most similar intents of each question, the most similar first; see `scores`."""
        return [
            largest(row, count)
            for part in parts(len(questions), len(self.intents))
            for row in self.scores(questions[part], vectors[part], itself)
        ]

    def similar(self, vector: "np.ndarray", question: str, number: int, count: int) -> tuple[str, ...]:
        """The `count` questions of an intent that are most similar to this one, the most similar first; not itself."""
        return tuple(self.texts[row] for row in self.similar_rows(vector, question, number, count))

    def similar_rows(self, vector: "np.ndarray", question: str, number: int, count: int) -> list[int]:
        """The same as places in `texts`."""
        first, last = self.starts[number] + 1, self.starts[number + 1]
        if not count or first == last:
            return []
        cosines = self.known[first:last] @ vector
        rows = (first + place for place in (-cosines).argsort(kind="stable").tolist())
        return [row for row in rows if self.texts[row] != question][:count]

    def names(self, numbers: Sequence[int]) -> tuple[str, ...]:
        """The intents of these numbers."""
        return tuple(self.intents[number] for number in numbers)


def parts(questions: int, intents: int) -> Iterator[slice]:
    """Questions whose values for all intents are computed together: whole blocks of COMPARED_AT_ONCE."""
    step = COMPARED_AT_ONCE * max(1, VALUES_AT_ONCE // intents // COMPARED_AT_ONCE)
    return (slice(start, start + step) for start in range(0, questions, step))


def largest(values: "np.ndarray", count: int) -> list[int]:
    """Places of the `count` largest of some values (n,), the largest first, of equal ones the first."""
    import numpy as np

    least = np.partition(values, -count)[-count] if count < len(values) else values.min()
    places = (values >= least).nonzero()[0]
    return places[(-values[places]).argsort(kind="stable")][:count].tolist()


def in_prompt_order(numbers: Sequence[int], order: str, question: str) -> list[int]:
    """Numbers of intents, the most similar first, in the order of a prompt; a question has one order by chance."""
    if order == BY_CHANCE:
        return Random(question).sample(sorted(numbers), len(numbers))
    return list(numbers) if order == BY_SIMILARITY else sorted(numbers)


def retriever_of(catalog: Catalog, embedding_model: str = "") -> Retriever:
    """What finds candidates as faq/prepare found them. Raises UserError where the embedding model is not there."""
    how = catalog.retrieval
    folder = embedding_model or how["embedding_model"]
    if not how["embedding_model"]:
        folder = ""  # they were found by n-grams
    with stdout_to_stderr():
        return Retriever(how["examples"], folder, how.get("ranked_by", COSINE))


def orders_of(catalog: Catalog, asked: int = 0) -> int:
    """In how many orders a question's candidates are asked: `asked`, else as faq/score kept, else one. Raises UserError
    for an order that the model learned from, and for more than there are candidates."""
    kept = int(catalog.decision.get("orders", 1))
    if asked and catalog.decision and asked != kept:
        raise UserError(
            f"--orders is {asked} and the intents file keeps a threshold for {kept}; leave --orders out, or "
            "--use_threshold false"
        )
    orders, how = asked or kept, catalog.retrieval
    if orders > 1 and how.get("order", BY_NUMBER) != BY_CHANCE:
        raise UserError(
            "--orders goes with candidates in random order, which the model learned not to go by: "
            "faq/prepare --candidates K --candidate_order random"
        )
    if orders > max(1, how.get("candidates", 1)):
        raise UserError(
            f"--orders is {orders} and a question has {how['candidates']} candidates; expected at most these"
        )
    return orders


def in_orders(catalog: Catalog, variant: int, shown: Shown, orders: int) -> list[tuple[int, Shown]]:
    """A candidate list and what is shown with it, and the same turned by one place, by two: no candidate is twice at
    the same place. Lists that are new are added to the catalog."""
    names = catalog.candidates(variant)
    turned = [(variant, shown)]
    for k in range(1, orders):
        turned.append((catalog.variant_of([*names[k:], *names[:k]]), (*shown[k:], *shown[:k])))
    return turned


def shown_with(catalog: Catalog, rows: Sequence[tuple[str, int]], retriever: Retriever) -> Iterator[Shown]:
    """What is shown with the candidates of each (question, variant)."""
    count = catalog.retrieval.get("shown", 0)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        with stdout_to_stderr():
            vectors = retriever.features.vectors([question for question, _ in part])
        for vector, (question, variant) in zip(vectors, part, strict=True):
            numbers = [retriever.number[name] for name in catalog.candidates(variant)]
            yield tuple(retriever.similar(vector, question, number, count) for number in numbers)


def candidates_of(catalog: Catalog, questions: Sequence[str], retriever: Retriever) -> list[tuple[int, Shown]]:
    """The candidate lists of bare questions as numbers of variants, and what is shown with each candidate.

    Lists that are new are added to the catalog.
    """
    how, found = catalog.retrieval, []
    with stdout_to_stderr():
        for start in range(0, len(questions), ROWS_AT_ONCE):
            part = questions[start : start + ROWS_AT_ONCE]
            vectors = retriever.features.vectors(part)
            for k, found_numbers in enumerate(retriever.ranked(part, vectors, how["candidates"])):
                numbers = in_prompt_order(found_numbers, how.get("order", BY_NUMBER), part[k])
                variant = catalog.variant_of(retriever.names(numbers))
                similar = [retriever.similar(vectors[k], part[k], n, how.get("shown", 0)) for n in numbers]
                found.append((variant, tuple(similar)))
    return found
