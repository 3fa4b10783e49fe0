"""Which intents are worth listing for a question: the K most similar ones, by their names and training questions.

With thousands of intents the whole list fits no prompt. Similarity is the cosine with the nearest of an intent's texts,
by an embedding model or by character n-grams. The list is in the order of the intents: where lists agree, prompts begin
alike. A candidate may be shown with the training questions of its own that are most similar to the one asked.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from faq.baselines import Features, nearest
from faq.catalog import Catalog
from llmops.console import UserError, log, stdout_to_stderr

if TYPE_CHECKING:
    import numpy as np

    from faq.prepare import Config, Example

EXAMPLES = 20  # training questions of an intent that are compared
ROWS_AT_ONCE = 4096  # questions


class Retriever:
    """The texts of every intent as vectors. `examples`: training questions by intent, in the order of the prompt."""

    def __init__(self, examples: Mapping[str, Sequence[str]], embedding_model: str) -> None:
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
        self.known = self.features.vectors(self.texts)

    def ranked(
        self, questions: Sequence[str], vectors: "np.ndarray", count: int, itself: bool = True
    ) -> "list[list[int]]":
        """Numbers of the `count` most similar intents of each question, the most similar first; `vectors` (n, d).

        `itself` False: a question that is one of the compared texts is not compared with itself.
        """
        import numpy as np

        own = [] if itself else [self.place.get(text, -1) for text in questions]
        cosines = nearest(vectors, self.known, self.labels, own)
        return np.argsort(-cosines, axis=1, kind="stable")[:, :count].tolist()

    def similar(self, vector: "np.ndarray", question: str, number: int, count: int) -> tuple[str, ...]:
        """The `count` questions of an intent that are most similar to this one, the most similar first; not itself."""
        first, last = self.starts[number] + 1, self.starts[number + 1]
        if not count or first == last:
            return ()
        cosines = self.known[first:last] @ vector
        texts = (self.texts[first + place] for place in (-cosines).argsort(kind="stable"))
        return tuple(text for text in texts if text != question)[:count]

    def listed(self, numbers: Sequence[int]) -> tuple[str, ...]:
        """These intents in the order of the prompt."""
        return tuple(self.intents[number] for number in sorted(numbers))


def kept(examples: Mapping[str, Sequence[str]], config: "Config") -> dict[str, Any]:
    """What intents.json keeps, so that candidates of a new question are found and shown the same way."""
    return {
        "candidates": int(config.candidates), "shown": config.candidate_examples,
        "embedding_model": config.embedding_model, "examples": {k: [*v] for k, v in examples.items()},
    }  # fmt: skip


def candidates_of(
    catalog: Catalog, questions: Sequence[str], embedding_model: str = ""
) -> list[tuple[int, tuple[tuple[str, ...], ...]]]:
    """The candidate lists of bare questions as numbers of variants, and what is shown with each candidate.

    Lists that are new are added to the catalog. Raises UserError where the embedding model is no longer in its folder.
    """
    how = catalog.retrieval
    folder = embedding_model or how["embedding_model"]
    if not how["embedding_model"]:
        folder = ""  # they were found by n-grams
    found = []
    with stdout_to_stderr():
        retriever = Retriever(how["examples"], folder)
        for start in range(0, len(questions), ROWS_AT_ONCE):
            part = questions[start : start + ROWS_AT_ONCE]
            vectors = retriever.features.vectors(part)
            for k, numbers in enumerate(retriever.ranked(part, vectors, how["candidates"])):
                variant = catalog.variant_of(retriever.listed(numbers))
                similar = [retriever.similar(vectors[k], part[k], n, how.get("shown", 0)) for n in sorted(numbers)]
                found.append((variant, tuple(similar)))
    return found


def retrieve(
    config: "Config", examples: "list[Example]", test: "list[Example]", catalog: Catalog
) -> "tuple[list[Example], list[Example], Catalog, dict[str, float]]":
    """Training and test examples with the candidates most similar to each, the catalog with these lists, their recall.

    Test lists are as they were found: an intent that is not listed cannot be answered.
    """
    count, texts = int(config.candidates), {intent: list[str]() for intent in catalog.intents}
    if count > len(texts):
        raise UserError(f"--candidates is {count} and there are {len(texts)} intents; expected at most these, or all")
    for example in examples:
        if example.intent in texts and len(texts[example.intent]) < EXAMPLES:
            texts[example.intent].append(example.question)
    with stdout_to_stderr():
        retriever = Retriever(texts, config.embedding_model)
        rows = {
            learned: list(listed_rows(retriever, part, catalog.none, config, learned))
            for learned, part in ((True, examples), (False, test))
        }
    asked = [row for row in rows[False] if row.known and row.answered]
    recall = sum(row.found for row in asked) / max(1, len(asked))
    log(
        f"{count} candidates by {retriever.features.name} hold the right intent of {recall:.1%} of the test questions, "
        "the most that can be answered rightly"
    )
    made = [[row.example for row in rows[learned]] for learned in (True, False)]
    lists = dict.fromkeys(example.candidates for part in made for example in part)
    catalog = replace(
        catalog, lists=[list(listed) for listed in lists], left_out=[], retrieval=kept(texts, config)
    )  # fmt: skip
    return made[0], made[1], catalog, {"recall": round(recall, 4)}


def lists_of(own: int, found: list[int], count: int, learned: bool, dropped: bool) -> list[tuple[bool, list[int]]]:
    """(whether its intent is the answer, numbers of the candidates) of an example's rows.

    `own`: the number of its intent, -1 for none; `found`: the most similar ones, more than `count` where there are. A
    training row always lists its intent, in place of the least similar. `dropped`: one row more, which lacks it.
    """
    first = found[:count]
    if learned and own >= 0 and own not in first:
        first = [*first[:-1], own]
    others = [other for other in found if other != own][:count]
    return [(True, first)] + ([(False, others)] if dropped and own >= 0 else [])


@dataclass(frozen=True)
class Listed:
    """An example with its candidates; whether its intent is known, is the answer, and was among those found."""

    example: "Example"
    known: bool
    answered: bool
    found: bool


def listed_rows(
    retriever: Retriever, part: "list[Example]", none: str, config: "Config", learned: bool
) -> Iterator[Listed]:
    """The examples with their candidates; some of them once more without their intent (`out_of_scope_ratio`)."""
    count = int(config.candidates)
    more = min(count + 1, len(retriever.intents))
    share = config.out_of_scope_ratio if learned or not config.test_data_file else 0  # a given test is not changed
    dropped = set(Random(config.seed + 1).sample(range(len(part)), round(share * len(part))))
    for start in range(0, len(part), ROWS_AT_ONCE):
        some = part[start : start + ROWS_AT_ONCE]
        questions = [example.question for example in some]
        vectors = retriever.features.vectors(questions)
        for k, found in enumerate(retriever.ranked(questions, vectors, more, itself=False)):
            own = retriever.number.get(some[k].intent, -1)
            for answered, numbers in lists_of(own, found, count, learned, start + k in dropped):
                similar = [
                    retriever.similar(vectors[k], questions[k], number, config.candidate_examples)
                    for number in sorted(numbers)
                ]
                example = replace(
                    some[k], intent=some[k].intent if answered else none, candidates=retriever.listed(numbers),
                    shown=tuple(similar),
                )  # fmt: skip
                yield Listed(example, own >= 0, answered, own in numbers)
