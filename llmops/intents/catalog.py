"""intents.json: the candidate intents, their replies, the wording of the prompts; the one source of every FAQ prompt.

A variant is a candidate list with some intents left out, whose questions then have no fitting intent, or a list that
rows of the data brought with them. Rows with the same list share their prompts' beginnings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any

from llmops import files, json_text
from llmops.console import UserError
from llmops.conversations.records import Message
from llmops.formats.families import families
from llmops.intents.candidate_lists import CandidateLists
from llmops.intents.questions import INTENTS_NAME

BETWEEN_EXAMPLES = " / "
ENGLISH = "en"
BY_NUMBER, BY_SIMILARITY, BY_CHANCE = "number", "similarity", "random"
ORDERS = (BY_NUMBER, BY_SIMILARITY, BY_CHANCE)  # how retrieved candidates are ordered in a prompt
LISTS_AT_ONCE = 10_000  # that are written
COSINE, JOINT = "cosine", "joint"  # how they are found: by similarity, or with a linear classifier's help


@dataclass(frozen=True)
class Wording:
    """How a prompt is written; a template file of llmops/formats/templates holds these texts under "faq".

    `prompt` has the places {instruction}, {candidates} and, last, {question}; `candidate` has {intent} and may have
    {number}, from 1; `separator` stands between candidates; `none` is the answer when no intent fits; `examples`, with
    the place {questions}, follows a candidate that is shown with questions of its own.
    """

    instruction: str
    candidate: str
    separator: str
    prompt: str
    none: str
    examples: str = " ({questions})"


@dataclass(frozen=True)
class Catalog:
    """The intents with their replies, in the order of the prompt; `left_out[k]` are those that variant k lacks.

    `lists` are candidate lists that the data's rows brought with them, or that faq/prepare found by similarity, in
    their own order; variants after those of `left_out`. `wording` is None for data whose prompts were made elsewhere.
    `decision` holds the calibration and the threshold that faq/score found; `retrieval` how candidates of a bare
    question are found and shown (llmops/intents/retrieval.py); both are {} where there is none.
    """

    mode: str
    wording: Wording | None
    intents: dict[str, str]
    left_out: list[list[str]] = field(default_factory=list)
    none_reply: str = ""
    lists: Sequence[list[str]] = field(default_factory=CandidateLists)
    decision: dict[str, Any] = field(default_factory=dict)
    retrieval: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.lists, CandidateLists):
            object.__setattr__(self, "lists", CandidateLists(self.lists, self.intents))

    @property
    def kept_lists(self) -> CandidateLists:
        """The lists, to be added to."""
        assert isinstance(self.lists, CandidateLists)
        return self.lists

    @property
    def variants(self) -> int:
        """How many candidate lists there are beside that of all intents."""
        return len(self.left_out) + len(self.lists)

    def variant_of(self, listed: Sequence[str]) -> int:
        """The variant that has this list of its own; a list that is new is added."""
        return len(self.left_out) + self.kept_lists.place_of(listed)

    @property
    def none(self) -> str:
        """The answer when no intent fits."""
        return (self.wording or wording_of("auto")).none

    def candidates(self, variant: int | None = None) -> list[str]:
        """The intents that a variant of the prompt lists."""
        if variant is not None and variant >= len(self.left_out):
            return [intent for intent in self.lists[variant - len(self.left_out)] if intent != self.none]
        absent = set() if variant is None else set(self.left_out[variant])
        return [intent for intent in self.intents if intent not in absent]

    def answers(self, variant: int | None = None) -> list[str]:
        """What may be answered to a variant of the prompt: its candidates and "none fits"."""
        return [*self.candidates(variant), *([] if self.none in self.intents else [self.none])]

    def prompt(self, question: str, variant: int | None = None, shown: Sequence[Sequence[str]] = ()) -> list[Message]:
        """The messages that ask for a question's intent; `shown`: questions to show beside each candidate."""
        if self.wording is None:
            raise UserError(
                "the prompts of this data were made elsewhere, so a bare question cannot be asked; "
                "give rows with 'messages', or prepare the data from questions and intents"
            )
        wording = self.wording
        listed = [
            wording.candidate.format(number=number, intent=intent)
            for number, intent in enumerate(self.candidates(variant), 1)
        ]
        for k, questions in enumerate(shown):
            if questions:
                listed[k] += wording.examples.format(questions=BETWEEN_EXAMPLES.join(questions))
        text = wording.prompt.format(
            instruction=wording.instruction.format(none=wording.none),
            candidates=wording.separator.join(listed),
            question=question,
        )
        return [{"role": "user", "content": text}]

    def reply(self, intent: str) -> str:
        """What to tell the user who has this intent."""
        return self.none_reply if intent == self.none else self.intents.get(intent, "")

    def to_json(self) -> str:
        """The text of intents.json."""
        return "".join(self.json_parts())

    def json_parts(self) -> Iterator[str]:
        """The text of intents.json, in parts. Lists that were found by similarity are numbers of intents, from 0."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "wording"}
        numbered = bool(self.lists and self.retrieval)
        given = {"mode": self.mode, "wording": self.wording and asdict(self.wording)}
        given |= values | {"lists": [] if numbered else list(self.lists)}
        text = json_text.dumps(given, indent=2) + "\n"
        if not numbered:
            yield text
            return
        before, mark, after = text.partition('\n  "lists": [')  # deeper keys have more blanks
        yield before + mark
        numbers, first = self.kept_lists.all_numbers(), "\n    "
        while some := ",\n    ".join(map(str, islice(numbers, LISTS_AT_ONCE))):
            yield first + some
            first = ",\n    "
        yield "\n  " + after


def wording_of(mode: str, instruction: str = "", language: str = "zh") -> Wording:
    """The wording of a mode's template in Chinese or English, with another instruction if one is given."""
    family = families()[mode]
    described = family.faq | (family.faq_en if language == ENGLISH else {})
    if instruction:
        described = described | {"instruction": instruction.replace("{", "{{").replace("}", "}}")}
    return check_wording(described, f"llmops/formats/templates/{mode}.json")


def check_wording(described: Any, where: str) -> Wording:
    """The wording that a JSON object describes. Raises UserError for one that cannot be filled in.

    A place is a plain name in braces: no format after a colon (a width of millions is no wording), no attribute.
    """
    places = {
        "instruction": {"none"}, "candidate": {"number", "intent"}, "separator": set(), "none": set(),
        "prompt": {"instruction", "candidates", "question"}, "examples": {"questions"},
    }  # fmt: skip
    if not isinstance(described, dict) or {*described, "examples"} != set(places):
        found = ", ".join(map(files.shown, described)) if isinstance(described, dict) else files.kind_of(described)
        raise UserError(f"{where}: the wording has {found or 'nothing'}; expected {', '.join(places)}")
    for name, text in described.items():
        allowed = places[name]
        if not isinstance(text, str):
            raise UserError(f"{where}: {name} is {files.kind_of(text)}, expected a text")
        if name not in ("separator", "none"):
            check_places(text, allowed, f"{where}: its {name}")
    missing = [f"{{{place}}}" for place in ("instruction", "candidates", "question") if not has_place(described, place)]
    if missing:
        raise UserError(f"{where}: its prompt has no {missing[0]}; expected it once")
    return Wording(**described)


def has_place(described: dict[str, str], place: str) -> bool:
    """Whether the prompt has a place."""
    return any(name == place for _, name, _, _ in Formatter().parse(described["prompt"]))


def check_places(text: str, allowed: set[str], where: str) -> None:
    """Raises UserError for braces in a text that are no place."""
    try:
        found = [(name, spec, turned) for _, name, spec, turned in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise UserError(f"{where} has a brace without its other one ({error}); write {{{{ for a brace") from error
    wrong = [name for name, spec, turned in found if name not in allowed or spec or turned]
    if wrong:
        expected = ", ".join(f"{{{name}}}" for name in sorted(allowed))
        raise UserError(f"{where} has the place {{{wrong[0]}}}; expected {expected}, or {{{{ for a brace")


def load_catalog(path: Path) -> Catalog:
    """Read intents.json. Raises UserError when it is not there or not one."""
    values = files.read_object(path, "the intents file", "faq/prepare.sh writes it, or pass --intents_file")
    checks = {
        "mode": is_mode, "intents": is_texts, "left_out": is_lists, "none_reply": is_text, "lists": is_known_lists,
        "decision": is_decision, "retrieval": is_retrieval,
    }  # fmt: skip
    unknown = [key for key in values if key not in {*checks, "wording"}]
    missing = [key for key in ("mode", "wording", "intents") if key not in values]
    wrong = [key for key, good in checks.items() if key in values and not good(values[key])]
    for words, keys in (("an unknown key", unknown), ("no", missing), ("another kind of", wrong)):
        if keys:
            raise UserError(
                f"{path} is not an {INTENTS_NAME} of faq/prepare.sh ({words} {files.shown(keys[0])}); "
                "prepare the data again"
            )
    outside = [name for names in values.get("left_out", []) for name in names if name not in values["intents"]]
    if not values["intents"] or outside:
        found = f"{files.shown(outside[0])} is left out of a variant and no intent" if outside else "no intents"
        raise UserError(f"{path} is not an {INTENTS_NAME} of faq/prepare.sh ({found}); prepare the data again")
    wording = None if values["wording"] is None else check_wording(values["wording"], str(path))
    lists = CandidateLists(names=values["intents"])
    for listed in values.pop("lists", []):
        add_list(lists, listed, path)
    return Catalog(**(values | {"wording": wording, "lists": lists}))


def add_list(lists: CandidateLists, listed: list[str] | list[int], path: Path) -> None:
    """Add a list of names, or of numbers of intents. Raises UserError for a number that no intent has."""
    if not listed or isinstance(listed[0], str):
        lists.append([str(name) for name in listed])
        return
    try:
        lists.append_numbers([int(number) for number in listed])
    except (IndexError, OverflowError) as error:
        raise UserError(
            f"{path} is not an {INTENTS_NAME} of faq/prepare.sh (a candidate list has a number that no intent has, "
            f"{files.shown(listed)}); prepare the data again"
        ) from error


def is_mode(value: Any) -> bool:
    """Whether a value names a mode."""
    return isinstance(value, str) and value in families()


def is_text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def is_texts(value: Any) -> bool:
    """Whether a value is an object of texts."""
    return isinstance(value, dict) and all(map(is_text, value.values()))


def is_lists(value: Any) -> bool:
    """Whether a value is a list of lists of texts."""
    return isinstance(value, list) and all(isinstance(names, list) and all(map(is_text, names)) for names in value)


def is_known_lists(value: Any) -> bool:
    """Whether a value is a list of lists, each of texts or of numbers."""
    return isinstance(value, list) and all(
        isinstance(listed, list) and (all(map(is_text, listed)) or all(type(number) is int for number in listed))
        for listed in value
    )


def is_decision(value: Any) -> bool:
    """Whether a value is a calibration with a threshold, or nothing; all numbers, but for what a classifier learned."""
    if not isinstance(value, dict) or not is_text(value.get("learned", "")):
        return False
    numbers = all(type(number) in (int, float) for key, number in value.items() if key != "learned")
    return numbers and (not value or (value.get("temperature", 0) > 0 and {"shift", "threshold"} <= set(value)))


def is_retrieval(value: Any) -> bool:
    """Whether a value says how candidates are found, or is {}."""
    if not isinstance(value, dict) or not value:
        return value == {}
    examples = value.get("examples")
    return (
        type(value.get("candidates")) is int
        and value["candidates"] > 0
        and type(value.get("shown", 0)) is int
        and value.get("order", BY_NUMBER) in ORDERS
        and value.get("ranked_by", COSINE) in (COSINE, JOINT)
        and is_text(value.get("embedding_model"))
        and isinstance(examples, dict)
        and is_lists(list(examples.values()))
    )
