"""intents.json: the candidate intents, their replies, the wording of the prompts; the one source of every FAQ prompt.

A variant is a candidate list with some intents left out, whose questions then have no fitting intent. There are few,
so that rows go on sharing their prompts' beginnings.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmops.chat_formats import FAMILIES
from llmops.console import UserError
from llmops.faq_records import INTENTS_NAME
from llmops.records import Message


@dataclass(frozen=True)
class Wording:
    """How a prompt is written; a template file of faq/templates holds these texts under "faq".

    `prompt` has the places {instruction}, {candidates} and, last, {question}; `candidate` has {intent} and may have
    {number}, from 1; `separator` stands between candidates; `none` is the answer when no intent fits.
    """

    instruction: str
    candidate: str
    separator: str
    prompt: str
    none: str


@dataclass(frozen=True)
class Catalog:
    """The intents with their replies, in the order of the prompt; `left_out[k]` are those that variant k lacks.

    `wording` is None for data whose prompts were made elsewhere.
    """

    mode: str
    wording: Wording | None
    intents: dict[str, str]
    left_out: list[list[str]] = field(default_factory=list)
    none_reply: str = ""

    @property
    def none(self) -> str:
        """The answer when no intent fits."""
        return (self.wording or wording_of("auto")).none

    def candidates(self, variant: int | None = None) -> list[str]:
        """The intents that a variant of the prompt lists."""
        absent = set() if variant is None else set(self.left_out[variant])
        return [intent for intent in self.intents if intent not in absent]

    def answers(self, variant: int | None = None) -> list[str]:
        """What may be answered to a variant of the prompt: its candidates and "none fits"."""
        return [*self.candidates(variant), *([] if self.none in self.intents else [self.none])]

    def prompt(self, question: str, variant: int | None = None) -> list[Message]:
        """The messages that ask for a question's intent."""
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
        return json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n"


def wording_of(mode: str, instruction: str = "") -> Wording:
    """The wording of a mode's template, with another instruction if one is given."""
    described = FAMILIES[mode].faq
    try:
        wording = Wording(**described)
        for place in ("{instruction}", "{candidates}", "{question}"):
            if place not in wording.prompt:
                raise UserError(f"faq/templates/{mode}.json: its prompt has no {place}")
    except TypeError as error:
        raise UserError(f"faq/templates/{mode}.json: {error}; expected {', '.join(Wording.__annotations__)}") from error
    if instruction:
        wording = Wording(**(described | {"instruction": instruction.replace("{", "{{").replace("}", "}}")}))
    return wording


def load_catalog(path: Path) -> Catalog:
    """Read intents.json. Raises UserError when it is not there or not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        wording = Wording(**values["wording"]) if values["wording"] else None
        return Catalog(**(values | {"wording": wording}))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; faq/prepare.sh writes it, or pass --intents_file") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not an {INTENTS_NAME} of faq/prepare.sh ({error}); prepare the data again"
        ) from error
