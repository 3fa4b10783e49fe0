"""Questions that are asked in several orders of their candidates, and what the answers come to (faq/predict --orders).

A small model prefers places of the list, whatever stands there. Where it learned from lists in random order, each
candidate stands at other places in turn, and the preferences cancel out.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from faq.queries import Query
from llmops import files
from llmops.console import UserError
from llmops.intents.catalog import Catalog
from llmops.intents.prediction import agreed, top_prediction


def in_orders(catalog: Catalog, queries: list[Query], asked: int, embedding_model: str) -> tuple[list[Query], int]:
    """(the queries, each in several orders one after the other; how many these are).

    `asked` orders, 0: as faq/score kept. Raises UserError for a prompt that was not made from this catalog.
    """
    if not asked and "orders" not in catalog.decision:
        return queries, 1
    from llmops.intents import retrieval

    orders = retrieval.orders_of(catalog, asked)
    if orders == 1:
        return queries, 1
    retriever = retrieval.retriever_of(catalog, embedding_model)
    rows = [(query.question, query.variant) for query in queries if query.variant is not None]
    shown, found = retrieval.shown_with(catalog, rows, retriever), list[Query]()
    for query in queries:
        listed = query.variant
        beside = next(shown) if listed is not None else ()
        if listed is None or tuple(catalog.prompt(query.question, listed, beside)) != query.prompt:
            raise UserError(
                f"the prompt of {files.shown(query.question, 40)} was not made from these intents, so its candidates "
                "cannot be put into another order; leave --orders out, or prepare the questions anew"
            )
        for variant, turned in retrieval.in_orders(catalog, listed, beside, orders):
            found.append(replace(query, prompt=tuple(catalog.prompt(query.question, variant, turned)), variant=variant))
    return found, orders


def as_one(catalog: Catalog, rows: Sequence[dict[str, Any]], queries: Sequence[Query]) -> list[dict[str, Any]]:
    """Predictions of every query in several orders, one after the other, as one prediction for each query."""
    orders, found = len(rows) // len(queries), []
    for k, query in enumerate(queries):
        named = agreed([row["probabilities"] for row in rows[k * orders : (k + 1) * orders]])
        shares = {"probabilities": {name: round(share, 6) for name, share in named}, "orders": orders}
        found.append({"question": query.question} | top_prediction(catalog, named) | shares | query.known)
    return found


def took(count: int, seconds: float, what: str) -> str:
    """How long so many questions took, or prompts where a question has several."""
    if what == "prompts":
        return f"{count} prompts in {seconds:.1f} s, {count / seconds:.1f} prompts/s"
    return f"{count} questions in {seconds:.1f} s, {count / seconds:.1f} questions/s"
