"""What faq/predict is asked: each question with its prompt and the list of its candidates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops import files
from llmops.console import UserError
from llmops.conversations.records import Message
from llmops.intents.catalog import Catalog
from llmops.intents.questions import INTENTS_NAME, FaqRecord, read_faq, refuse_unfinished

if TYPE_CHECKING:
    from faq.predict import Config
    from llmops.intents.retrieval import Shown


@dataclass(frozen=True)
class Query:
    """One question with its prompt; `reference` is its true intent where the file has it.

    `variant`: the number of its candidate list; `candidates`: these, where the intents file has no such list.
    """

    question: str
    prompt: tuple[Message, ...]
    variant: int | None = None
    reference: str = ""
    candidates: tuple[str, ...] = ()

    @property
    def known(self) -> dict[str, Any]:
        """What is known of the question, for faq/score: its true intent and its candidate list."""
        found: dict[str, Any] = {"reference": self.reference} if self.reference else {}
        if self.candidates:
            return found | {"candidates": list(self.candidates)}
        return found if self.variant is None else found | {"variant": self.variant}


def read_queries(config: "Config", catalog: Catalog) -> list[Query]:
    """The questions with their prompts. Candidate lists that the intents file lacks are added to the catalog."""
    kept = catalog.variants
    if config.question:
        lists = bare_lists(config, catalog, config.question)
        both = zip(config.question, lists, strict=True)
        return [Query(text, tuple(catalog.prompt(text, k, shown)), k) for text, (k, shown) in both]
    refuse_unfinished(Path(config.input_file).parent)
    data = read_faq(Path(config.input_file), need_intent=False)
    bare = [q for record in data.records if not record.messages and not record.candidates for q in record.questions]
    found = iter(bare_lists(config, catalog, bare))
    queries = []
    for record in data.records:
        if record.variant is not None and not 0 <= record.variant < kept:
            raise UserError(
                f"{data.path}:{record.line}: variant {record.variant} is not in the intents file, which has "
                f"{kept}; give the {INTENTS_NAME} that was written with this file"
            )
        variant = record.variant
        if record.candidates:
            variant = own_variant(catalog, record, f"{data.path}:{record.line}")
        for question in record.questions:
            shown: Shown = ()
            if not record.messages and not record.candidates:
                variant, shown = next(found)
            prompt = record.messages[:-1] or tuple(catalog.prompt(question, variant, shown))
            own = tuple(catalog.candidates(variant)) if variant is not None and variant >= kept else ()
            queries.append(Query(question, prompt, variant, record.intent, own))
    return queries


def bare_lists(config: "Config", catalog: Catalog, questions: Sequence[str]) -> "list[tuple[int | None, Shown]]":
    """The candidate list of each bare question: the whole one, or the one that is found by similarity, and what it
    shows beside each candidate."""
    if not catalog.retrieval or not questions:
        return [(None, ())] * len(questions)
    from llmops.intents.retrieval import candidates_of, retriever_of

    return [*candidates_of(catalog, questions, retriever_of(catalog, config.embedding_model))]


def own_variant(catalog: Catalog, record: FaqRecord, place: str) -> int:
    """The number of the candidate list that a row brings; a list that is new is added. Raises UserError for intents
    that the model did not learn."""
    unknown = [name for name in record.candidates if name not in catalog.intents and name != catalog.none]
    if unknown:
        raise UserError(
            f"{place}: its candidate {files.shown(unknown[0])} is no intent of the {INTENTS_NAME}; give the file that "
            "was written for this model, or take the candidate out"
        )
    return catalog.variant_of(record.candidates)
