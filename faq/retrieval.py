"""Training and test data with the most similar candidates listed for each question (llmops/intents/retrieval.py)."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any, overload

from faq.examples import Example
from faq.prepared import TEST_NAME, TRAIN_NAME
from llmops.console import UserError, log, stdout_to_stderr
from llmops.intents.candidate_lists import CandidateLists
from llmops.intents.catalog import BY_NUMBER, BY_SIMILARITY, COSINE, JOINT, Catalog
from llmops.intents.retrieval import ROWS_AT_ONCE, Retriever, in_prompt_order

if TYPE_CHECKING:
    from faq.prepare import Config

EXAMPLES = 20  # training questions of an intent that are compared


def order_of(config: "Config") -> str:
    """How candidates are ordered: as asked, else so that prompts begin alike, unless each shows its own questions."""
    if config.candidate_order:
        return config.candidate_order
    return BY_SIMILARITY if config.candidate_examples else BY_NUMBER


def choose_ranking(examples: Mapping[str, Sequence[str]], config: "Config") -> tuple[Retriever, str]:
    """(what finds candidates, COSINE or JOINT): whichever puts the right intents of the training questions further to
    the front (mean reciprocal rank among the candidates; a question is not compared with itself)."""
    plain = Retriever(examples, config.embedding_model)
    if not plain.can_join:
        return plain, COSINE
    both = plain.with_linear()
    ranks = {kind: reciprocal_rank(one, int(config.candidates)) for kind, one in ((COSINE, plain), (JOINT, both))}
    better = JOINT if ranks[JOINT] > ranks[COSINE] else COSINE
    log(
        f"candidates are found by {'similarity and a linear classifier' if better == JOINT else 'similarity alone'}: "
        f"mean reciprocal rank {ranks[better]:.3f} on training questions, otherwise {min(ranks.values()):.3f}"
    )
    return (both if better == JOINT else plain), better


def reciprocal_rank(retriever: Retriever, count: int) -> float:
    """Mean of 1 / rank of the right intent of each known question, 0 where it is not among `count`."""
    rows = retriever.questions
    texts = [retriever.texts[row] for row in rows]
    found = retriever.ranked(texts, retriever.known[rows], count, itself=False)
    truth = retriever.labels[rows].tolist()
    return sum(1 / (listed.index(own) + 1) for own, listed in zip(truth, found, strict=True) if own in listed) / max(
        1, len(rows)
    )


def kept(examples: Mapping[str, Sequence[str]], config: "Config", ranked_by: str) -> dict[str, Any]:
    """What intents.json keeps, so that candidates of a new question are found and shown the same way."""
    return {
        "candidates": int(config.candidates), "shown": config.candidate_examples, "order": order_of(config),
        "ranked_by": ranked_by,
        "embedding_model": config.embedding_model, "examples": {k: [*v] for k, v in examples.items()},
    }  # fmt: skip


def retrieve(
    config: "Config", examples: "Mapping[str, Sequence[Example]]", catalog: Catalog
) -> "tuple[dict[str, Sequence[Example]], Catalog, dict[str, float]]":
    """(the examples of every file with the candidates most similar to each, the catalog with these lists, the recall of
    the test's).

    The lists of test and validation are as they were found: an intent that is not listed cannot be answered.
    """
    count, texts = int(config.candidates), {intent: list[str]() for intent in catalog.intents}
    if count > len(texts):
        raise UserError(f"--candidates is {count} and there are {len(texts)} intents; expected at most these, or all")
    for example in examples[TRAIN_NAME]:
        if example.intent in texts and len(texts[example.intent]) < EXAMPLES:
            texts[example.intent].append(example.question)
    with stdout_to_stderr():
        retriever, ranked_by = choose_ranking(texts, config)
        lists = CandidateLists(names=retriever.intents)
        made: dict[str, Sequence[Example]] = {}
        asked = right = 0
        for name, part in examples.items():
            some = made[name] = ListedExamples(part, retriever.texts, lists, catalog.none)
            for row in listed_rows(retriever, part, config, name):
                some.add(row)
                if name == TEST_NAME and row.known and row.answered:
                    asked, right = asked + 1, right + row.found
    recall = right / max(1, asked)
    log(
        f"{count} candidates by {retriever.features.name} hold the right intent of {recall:.1%} of the test questions, "
        "the most that can be answered rightly"
    )
    catalog = replace(catalog, lists=lists, left_out=[], retrieval=kept(texts, config, ranked_by))
    return made, catalog, {"recall": round(recall, 4)}


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
    """The number of an example with those of its candidates and, beside each, of the texts to show.

    Whether its intent is known, is the answer, and was among those found.
    """

    number: int
    candidates: list[int]
    shown: list[list[int]]
    known: bool
    answered: bool
    found: bool


class ListedExamples(Sequence["Example"]):
    """Examples of `part` with their candidate lists, made when they are asked for: a few bytes each until then."""

    def __init__(self, part: "Sequence[Example]", texts: Sequence[str], lists: CandidateLists, none: str) -> None:
        self.part, self.texts, self.lists, self.none = part, texts, lists, none
        self._number, self._variant, self._answered = array("q"), array("q"), bytearray()
        self._shown, self._firsts = (
            array("i"),
            array("q"),
        )  # beside each candidate how many texts, and these; rows' first

    def add(self, row: Listed) -> None:
        """The next one."""
        self._number.append(row.number)
        self._variant.append(self.lists.place_of_numbers(row.candidates))
        self._answered.append(row.answered)
        self._firsts.append(len(self._shown))
        if any(row.shown):
            for numbers in row.shown:
                self._shown.append(len(numbers))
                self._shown.extend(numbers)

    def __len__(self) -> int:
        return len(self._number)

    @overload
    def __getitem__(self, place: int) -> "Example": ...
    @overload
    def __getitem__(self, place: slice) -> "list[Example]": ...
    def __getitem__(self, place: int | slice) -> "Example | list[Example]":
        if isinstance(place, slice):
            return [self[k] for k in range(*place.indices(len(self)))]
        example = self.part[self._number[place]]
        intent = example.intent if self._answered[place] else self.none
        return replace(example, intent=intent, variant=self._variant[place], shown=self._texts(range(len(self))[place]))

    def _texts(self, place: int) -> tuple[tuple[str, ...], ...]:
        ends = (*self._firsts[place + 1 : place + 2], len(self._shown))
        first, shown = self._firsts[place], list[tuple[str, ...]]()
        while first < ends[0]:
            after = first + 1 + self._shown[first]
            shown.append(tuple(self.texts[number] for number in self._shown[first + 1 : after]))
            first = after
        return tuple(shown)


def listed_rows(retriever: Retriever, part: "Sequence[Example]", config: "Config", name: str) -> Iterator[Listed]:
    """The examples of a file with their candidates; some once more without their intent (`out_of_scope_ratio`)."""
    learned = name == TRAIN_NAME
    count = int(config.candidates)
    more = min(count + 1, len(retriever.intents))
    share = 0 if name == TEST_NAME and config.test_data_file else config.out_of_scope_ratio  # a given test stays
    dropped = set(Random(config.seed + 1).sample(range(len(part)), round(share * len(part))))
    for start in range(0, len(part), ROWS_AT_ONCE):
        some = part[start : start + ROWS_AT_ONCE]
        questions = [example.question for example in some]
        vectors = retriever.features.vectors(questions)
        for k, found in enumerate(retriever.ranked(questions, vectors, more, itself=False)):
            own = retriever.number.get(some[k].intent, -1)
            for answered, ranked in lists_of(own, found, count, learned, start + k in dropped):
                numbers = in_prompt_order(ranked, order_of(config), questions[k])
                shown = [
                    retriever.similar_rows(vectors[k], questions[k], number, config.candidate_examples)
                    for number in numbers
                ]
                yield Listed(start + k, numbers, shown, own >= 0, answered, own in numbers)
