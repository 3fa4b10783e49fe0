"""Training and test data with the most similar candidates listed for each question (llmops/faq_retrieval.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

from llmops.console import UserError, log, stdout_to_stderr
from llmops.faq_catalog import Catalog
from llmops.faq_retrieval import Retriever

if TYPE_CHECKING:
    from faq.prepare import Config, Example

EXAMPLES = 20  # training questions of an intent that are compared


def kept(examples: Mapping[str, Sequence[str]], count: int, embedding_model: str) -> dict[str, Any]:
    """What intents.json keeps, so that candidates of a new question are found the same way."""
    return {"candidates": count, "embedding_model": embedding_model, "examples": {k: [*v] for k, v in examples.items()}}


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
    more = min(count + 1, len(texts))
    with stdout_to_stderr():
        retriever = Retriever(texts, config.embedding_model)
        ranked = [
            retriever.ranked([e.question for e in part], more, itself=False).tolist() for part in (examples, test)
        ]
    asked = [(retriever.number[e.intent], found) for e, found in zip(test, ranked[1], strict=True) if e.intent in texts]
    recall = sum(own in found[:count] for own, found in asked) / max(1, len(asked))
    log(
        f"{count} candidates by {retriever.features.name} hold the right intent of {recall:.1%} of the test questions, "
        "the most that can be answered rightly"
    )
    made = []
    for part, found in zip((examples, test), ranked, strict=True):
        learned = part is examples
        share = config.out_of_scope_ratio if learned or not config.test_data_file else 0  # a given test is not changed
        dropped = set(Random(config.seed + 1).sample(range(len(part)), round(share * len(part))))
        made.append(listed_rows(retriever, part, found, catalog.none, count, learned, dropped))
    lists = dict.fromkeys(example.candidates for part in made for example in part)
    how = kept(texts, count, config.embedding_model)
    catalog = replace(catalog, lists=[list(listed) for listed in lists], left_out=[], retrieval=how)
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


def listed_rows(
    retriever: Retriever,
    part: "list[Example]",
    found: list[list[int]],
    none: str,
    count: int,
    learned: bool,
    dropped: set[int],
) -> "list[Example]":
    """The examples with their candidates, and those that are `dropped` once more without their intent."""
    return [
        replace(example, intent=example.intent if answered else none, candidates=retriever.listed(numbers))
        for k, example in enumerate(part)
        for answered, numbers in lists_of(
            retriever.number.get(example.intent, -1), found[k], count, learned, k in dropped
        )
    ]  # fmt: skip
