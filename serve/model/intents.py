"""Intents of questions over HTTP: as faq/predict tells them, many requests in one pass; corrections are kept."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops import files
from llmops.console import RunStopped, UserError, log
from llmops.formats.chat_format import ChatFormat
from llmops.generation.choice_search import Tree
from llmops.generation.generator import Generator
from llmops.generation.shared_prefix import MIN_SHARED, NOTHING, common_length
from llmops.intents.catalog import Catalog
from llmops.intents.prediction import agreed, candidate_tokens, decide, top_prediction
from llmops.intents.questions import check_record
from serve.answers import RETRY_SECONDS, ApiError
from serve.model.asked import Fields
from serve.model.lanes import Outbox

if TYPE_CHECKING:
    import numpy as np

    from llmops.intents.joined import Joint
    from llmops.intents.retrieval import Retriever

MOST_QUESTIONS = 256  # of one request
MOST_AT_ONCE = 512  # questions of all requests that are answered in one go
LONGEST_QUESTION = 10_000  # characters
MOST_TOP = 50


@dataclass(frozen=True)
class Prepared:
    """A question as the model reads it: token ids, its candidates as a tree, what they say.

    `values` (classes,): what the linear classifier says of it, where there is one; `turned`: the same in the other
    orders of its candidates that faq/score kept.
    """

    prompt: list[int]
    tree: Tree
    answers: list[str]
    values: "np.ndarray | None" = None
    turned: "tuple[Prepared, ...]" = ()


@dataclass(eq=False)
class Questions:
    """One request's questions; `tell` gets the predictions, or why there are none."""

    texts: list[str]
    prepared: list[Prepared]
    top: int
    tell: Callable[[Any], None]
    deadline: float
    gone: bool = False


@dataclass
class Intents:
    """The FAQ side of a model, a worker of the engine."""

    generator: Generator
    catalog: Catalog
    chat: ChatFormat
    length: int | None
    activate: Callable[[], None]
    retriever: "Retriever | None" = None
    joint: "Joint | None" = None
    waiting: deque[Questions] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.orders = int(self.catalog.decision.get("orders", 1))
        self._trees: dict[int | None, tuple[Tree, list[str]]] = {}
        if self.retriever is None:
            self._pin()

    def _pin(self) -> None:
        """Keep what all prompts begin with: the instruction and the candidates."""
        first, second = (self.chat.prompt(self.catalog.prompt(text)) for text in ("0?", "为什么"))
        shared = common_length(first, second)
        if shared >= MIN_SHARED and self.generator.plain_because is None:
            self.activate()
            self.generator.pinned = self.generator.passes.prefix(first[:shared], NOTHING)

    def prepare(self, questions: Sequence[str]) -> list[Prepared]:
        """Questions as the model reads them. Raises ApiError for one that is too long."""
        catalog = self.catalog
        lists: Sequence[tuple[int | None, Sequence[Sequence[str]]]] = [(None, ())] * len(questions)
        if self.retriever is not None:
            from llmops.intents.retrieval import candidates_of

            catalog = replace(catalog, lists=[])  # all lists are this request's own
            lists = candidates_of(catalog, questions, self.retriever)
        values: list[Any] = [None] * len(questions)
        if self.joint:
            values = [*self.joint.values(questions, catalog, [variant for variant, _ in lists])]
        found = []
        for text, (variant, shown), value in zip(questions, lists, values, strict=True):
            turned = [self._prepared(catalog, text, *one) for one in self._in_orders(catalog, variant, shown)]
            found.append(replace(self._prepared(catalog, text, variant, shown), values=value, turned=tuple(turned)))
        return found

    def _in_orders(
        self, catalog: Catalog, variant: int | None, shown: Sequence[Sequence[str]]
    ) -> list[tuple[int, Sequence[Sequence[str]]]]:
        """The other orders of a question's candidates."""
        if variant is None or self.orders == 1:
            return []
        from llmops.intents.retrieval import in_orders

        return [*in_orders(catalog, variant, tuple(map(tuple, shown)), self.orders)[1:]]

    def _prepared(self, catalog: Catalog, text: str, variant: int | None, shown: Sequence[Sequence[str]]) -> Prepared:
        messages = catalog.prompt(text, variant, shown)
        if variant is not None or None not in self._trees:
            answers = catalog.answers(variant)
            candidates = Tree(candidate_tokens(self.chat, messages, answers)), answers
            if variant is None:
                self._trees[None] = candidates
        else:
            candidates = self._trees[None]
        prompt = self.chat.prompt(messages)
        more = max(map(len, candidates[0].candidates))
        if self.length and len(prompt) + more > self.length:
            raise ApiError(
                400, f"the question {files.shown(text, 40)} makes {len(prompt)} prompt tokens and up to {more} of "
                f"answer, more than the model's {self.length}", "questions", "context_length_exceeded",
            )  # fmt: skip
        return Prepared(prompt, *candidates)

    def turn(self, out: Outbox) -> bool:
        """Answer the requests that wait, together; whether there were any."""
        taken: list[Questions] = []
        now = time.monotonic()
        while self.waiting and sum(len(asked.texts) for asked in taken) < MOST_AT_ONCE:
            asked = self.waiting.popleft()
            if now > asked.deadline:
                error = ApiError(503, "there was no time left for this request", code="timeout", retry=RETRY_SECONDS)
                out.say(asked.tell, error)
            elif not asked.gone:
                taken.append(asked)
        if not taken:
            return False
        self.activate()
        self._answer(taken, out)
        return True

    def _answer(self, taken: Sequence[Questions], out: Outbox) -> None:
        """Answer requests in one go; one by one where a prompt does not fit into memory: the others have theirs."""
        try:
            self._tell(taken, out)
        except UserError as error:  # no numbers
            log(f"error: {error}")
            self._refuse(taken, ApiError(500, str(error)), out)
        except RunStopped as error:  # one prompt does not fit
            log(f"error: {error}")
            if len(taken) == 1:
                self._refuse(taken, ApiError(503, str(error), code="memory", retry=RETRY_SECONDS), out)
                return
            for asked in taken:
                self._answer([asked], out)

    def _refuse(self, taken: Sequence[Questions], error: ApiError, out: Outbox) -> None:
        for asked in taken:
            out.say(asked.tell, error)

    def _tell(self, taken: Sequence[Questions], out: Outbox) -> None:
        """What the model says of the questions. Raises UserError and RunStopped, with nothing told."""
        rows = [one for asked in taken for row in asked.prepared for one in (row, *row.turned)]
        best = max(2, self.catalog.retrieval.get("candidates", 1) + 1, *(asked.top for asked in taken))
        chosen = dict(self.generator.choose([row.prompt for row in rows], [row.tree for row in rows], best))
        place, found = 0, []
        for asked in taken:
            told = []
            for text, row in zip(asked.texts, asked.prepared, strict=True):
                said = []
                for one in (row, *row.turned):
                    said.append([(one.answers[k], p) for k, p in chosen[place].ranked])
                    place += 1
                named = agreed([dict(one) for one in said]) if row.turned else said[0]
                told.append(self._told(text, named, row.values, asked.top))
            found.append((asked.tell, told))
        for tell, told in found:
            out.say(tell, told)

    def _told(
        self, question: str, named: Sequence[tuple[str, float]], values: "np.ndarray | None", top: int
    ) -> dict[str, Any]:
        """A prediction as faq/predict prints it, with the `top` candidates."""
        row = top_prediction(self.catalog, named)
        if self.joint and values is not None:
            shares = {"probabilities": dict(named)} if self.catalog.retrieval else {}
            alone = row["intent"]
            named = self.joint.ranked([row | shares], values[None], max(2, top))[0]
            row = top_prediction(self.catalog, named) | {"model_intent": alone}
        found = decide(self.catalog, {"question": question} | row)
        return found | {"top": [{"intent": name, "probability": round(p, 6)} for name, p in named[:top]]}

    def fail(self, error: ApiError, out: Outbox) -> None:
        """Refuse everything that waits."""
        while self.waiting:
            out.say(self.waiting.popleft().tell, error)


def read_questions(body: dict[str, Any]) -> tuple[list[str], int]:
    """(questions, how many candidates to name) of a body."""
    fields = Fields(body)

    def good(value: Any) -> bool:
        one = isinstance(value, list) and 0 < len(value) <= MOST_QUESTIONS
        return one and all(isinstance(t, str) and t.strip() and len(t) <= LONGEST_QUESTION for t in value)

    questions = fields.take(
        "questions", [], good, f"a list of 1 to {MOST_QUESTIONS} texts of at most {LONGEST_QUESTION} characters"
    )
    if not questions:
        raise ApiError(400, "questions is missing; expected a list of texts", "questions", "invalid_value")
    fields.text("model")
    top = fields.whole("top", 3, 1, MOST_TOP)
    unknown = next(iter(fields.left), None)
    if unknown is not None:
        raise ApiError(400, f"{files.plain(unknown)} is not known here; expected questions and top", unknown)
    return [text.strip() for text in questions], top


def read_feedback(body: dict[str, Any]) -> dict[str, Any]:
    """A correction as faq/prepare reads it: {"question", "intent", "output"}; `predicted` is kept beside it."""
    fields = Fields(body)
    found = {name: fields.text(name).strip() for name in ("question", "intent", "reply", "predicted")}
    unknown = next(iter(fields.left), None)
    if unknown is not None:
        expected = "expected question, intent, reply and predicted"
        raise ApiError(400, f"{files.plain(unknown)} is not known here; {expected}", unknown)
    if (
        len(found["question"]) > LONGEST_QUESTION
        or len(found["reply"]) > LONGEST_QUESTION
        or len(found["intent"]) > 200
    ):
        raise ApiError(400, f"the text is longer than {LONGEST_QUESTION} characters (an intent: 200)", "question")
    row = {"question": found["question"], "intent": found["intent"]}
    row |= {"output": found["reply"]} if found["reply"] else {}
    row |= {"predicted": found["predicted"]} if found["predicted"] else {}
    _, problem = check_record(row, 1, 0, True)
    if problem:
        raise ApiError(400, problem, "question", "invalid_value")
    return row


def keep_feedback(path: Path, row: dict[str, Any]) -> None:
    """Append a correction; it is on the disk when this returns."""
    try:
        files.make_folder(path.parent)
        files.append_line(path, row)
    except (UserError, RunStopped) as error:
        raise ApiError(500, f"the correction could not be kept: {error}") from error
