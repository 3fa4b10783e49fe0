"""Training and test data with the most similar candidates listed for each question (llmops/intents/retrieval.py)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

from faq.examples import Example
from llmops.console import UserError, log, stdout_to_stderr
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
    config: "Config", examples: "list[Example]", test: "list[Example]", validation: "list[Example]", catalog: Catalog
) -> "tuple[list[list[Example]], Catalog, dict[str, float]]":
    """(training, test and validation examples with the candidates most similar to each, the catalog with these lists,
    the recall of the test's).

    The lists of test and validation are as they were found: an intent that is not listed cannot be answered.
    """
    count, texts = int(config.candidates), {intent: list[str]() for intent in catalog.intents}
    if count > len(texts):
        raise UserError(f"--candidates is {count} and there are {len(texts)} intents; expected at most these, or all")
    for example in examples:
        if example.intent in texts and len(texts[example.intent]) < EXAMPLES:
            texts[example.intent].append(example.question)
    with stdout_to_stderr():
        retriever, ranked_by = choose_ranking(texts, config)
        rows = {
            name: list(listed_rows(retriever, part, catalog.none, config, name))
            for name, part in (("train", examples), ("test", test), ("validation", validation))
        }
    asked = [row for row in rows["test"] if row.known and row.answered]
    recall = sum(row.found for row in asked) / max(1, len(asked))
    log(
        f"{count} candidates by {retriever.features.name} hold the right intent of {recall:.1%} of the test questions, "
        "the most that can be answered rightly"
    )
    made = [[row.example for row in part] for part in rows.values()]
    lists = dict.fromkeys(example.candidates for part in made for example in part)
    catalog = replace(
        catalog, lists=[list(listed) for listed in lists], left_out=[], retrieval=kept(texts, config, ranked_by)
    )  # fmt: skip
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
    """An example with its candidates; whether its intent is known, is the answer, and was among those found."""

    example: "Example"
    known: bool
    answered: bool
    found: bool


def listed_rows(
    retriever: Retriever, part: "list[Example]", none: str, config: "Config", name: str
) -> Iterator[Listed]:
    """The examples with their candidates; some of them once more without their intent (`out_of_scope_ratio`).

    `name`: train, test or validation.
    """
    learned = name == "train"
    count = int(config.candidates)
    more = min(count + 1, len(retriever.intents))
    share = 0 if name == "test" and config.test_data_file else config.out_of_scope_ratio  # a given test is not changed
    dropped = set(Random(config.seed + 1).sample(range(len(part)), round(share * len(part))))
    for start in range(0, len(part), ROWS_AT_ONCE):
        some = part[start : start + ROWS_AT_ONCE]
        questions = [example.question for example in some]
        vectors = retriever.features.vectors(questions)
        for k, found in enumerate(retriever.ranked(questions, vectors, more, itself=False)):
            own = retriever.number.get(some[k].intent, -1)
            for answered, ranked in lists_of(own, found, count, learned, start + k in dropped):
                numbers = in_prompt_order(ranked, order_of(config), questions[k])
                similar = [
                    retriever.similar(vectors[k], questions[k], number, config.candidate_examples) for number in numbers
                ]
                example = replace(
                    some[k], intent=some[k].intent if answered else none, candidates=retriever.names(numbers),
                    shown=tuple(similar),
                )  # fmt: skip
                yield Listed(example, own >= 0, answered, own in numbers)
