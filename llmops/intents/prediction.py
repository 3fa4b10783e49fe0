"""What a model says of a question's intent: its candidates as tokens, the prediction as it is told, its confidence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmops.console import UserError
from llmops.conversations.records import Message
from llmops.formats.chat_format import ChatFormat
from llmops.intents.catalog import Catalog

if TYPE_CHECKING:
    import numpy as np

EDGE = 1e-6  # probabilities are kept this far from 0 and 1


def candidate_tokens(chat: ChatFormat, prompt: Sequence[Message], answers: Sequence[str]) -> list[list[int]]:
    """The tokens, with the end token, that each answer has after a prompt, exactly as in training."""
    start = chat.prompt(prompt)
    found = []
    for answer in answers:
        rendered = chat.conversation([*prompt, {"role": "assistant", "content": answer}])[-1]
        end = max((i for i, learned in enumerate(rendered.learned) if learned), default=-1) + 1
        if rendered.ids[: len(start)] != start or len(start) >= end:
            raise UserError(f"the chat format {chat.name} writes the answer {answer!r} into its prompt; check --mode")
        found.append(rendered.ids[len(start) : end])
    return found


def top_prediction(catalog: Catalog, named: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """The prediction of a constrained choice: (answer, probability), the most probable first."""
    return prediction(catalog, named[0], named[1] if len(named) > 1 else None, True)


def agreed(shares: Sequence[Mapping[str, float]]) -> list[tuple[str, float]]:
    """What answers to one question in several orders of its candidates come to, the most probable first.

    The geometric mean of each answer's probabilities, scaled to add up to 1: a place that the model likes by itself,
    whatever stands there, counts in every order for another candidate.
    """
    means = {name: math.exp(sum(math.log(max(EDGE, one[name])) for one in shares) / len(shares)) for name in shares[0]}
    total = sum(means.values())
    return sorted(((name, mean / total) for name, mean in means.items()), key=lambda named: -named[1])


def prediction(
    catalog: Catalog, best: tuple[str, float], second: tuple[str, float] | None, known: bool
) -> dict[str, Any]:
    """A prediction as it is printed."""
    return {
        "intent": best[0],
        "known": known,
        "reply": catalog.reply(best[0]),
        "probability": round(best[1], 6),
        "runner_up": {"intent": second[0], "probability": round(second[1], 6)} if second else None,
        "constrained": True,
    }


def decide(catalog: Catalog, predicted: dict[str, Any]) -> dict[str, Any]:
    """A prediction by the threshold that faq/score kept, if it did: too unsure an answer becomes "none fits".

    `confidence` is then the calibrated probability of `proposed`, which is what the model would have said.
    """
    kept = catalog.decision
    if not kept or not predicted["constrained"]:
        return predicted
    import numpy as np

    confidence = float(Calibration(kept["temperature"], kept["shift"])(np.asarray(predicted["probability"])))
    predicted |= {"confidence": round(confidence, 6), "proposed": predicted["intent"]}
    if confidence < kept["threshold"]:
        predicted |= {"intent": catalog.none, "reply": catalog.reply(catalog.none)}
    return predicted


@dataclass(frozen=True)
class Calibration:
    """Confidence is sigmoid(log-odds of the probability / temperature + shift)."""

    temperature: float = 1.0
    shift: float = 0.0

    def __call__(self, probability: "np.ndarray") -> "np.ndarray":
        """The confidence (n,) of probabilities (n,)."""
        import numpy as np

        return 1 / (1 + np.exp(-log_odds(probability) / self.temperature - self.shift))


def log_odds(probability: "np.ndarray") -> "np.ndarray":
    """log(p / (1 - p)), p kept a little from 0 and 1."""
    import numpy as np

    clipped = np.clip(probability, EDGE, 1 - EDGE)
    return np.log(clipped / (1 - clipped))
