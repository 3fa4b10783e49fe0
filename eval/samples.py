"""What is asked and how good the answers are: the records that data sets, the engine and the reports share."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from eval import metrics
from llmops import json_text
from llmops.conversations.records import Message

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One prompt with its references.

    The last user turn is `before` + `passage` + `after`; when a prompt is too long, first the earliest turns of
    `history` (its system message stays) and then the end of the passage are cut. With `choices` the answer is the most
    likely one of them, otherwise it is generated. `id` is the benchmark's own name of the sample. `spans`: the
    references are words of the passage, so a cut may lose them.
    """

    before: str
    references: tuple[str, ...]
    passage: str = ""
    after: str = ""
    history: tuple[Message, ...] = ()
    choices: tuple[str, ...] = ()
    group: str = ""
    id: str = ""
    spans: bool = False

    @property
    def messages(self) -> list[Message]:
        """The conversation up to where the assistant answers."""
        return [*self.history, {"role": "user", "content": self.before + self.passage + self.after}]

    def shortened(self, characters: int) -> "Sample":
        """With the first so many characters of the passage."""
        return replace(self, passage=self.passage[:characters])

    def loses_answer(self, characters: int) -> bool:
        """Whether the first so many characters of the passage hold none of the references that the whole holds."""
        if not self.spans or characters >= len(self.passage):
            return False
        inside = [reference for reference in self.references if reference in self.passage]
        return bool(inside) and not any(reference in self.passage[:characters] for reference in inside)

    def without_first_turns(self) -> "Sample | None":
        """Without the earliest question and answer before the question; None when there is none."""
        system = self.history[:1] if self.history and self.history[0]["role"] == "system" else ()
        turns = self.history[len(system) :]
        return replace(self, history=(*system, *turns[2:])) if turns else None


@dataclass(frozen=True)
class Answer:
    """What a model said to a sample: the text, or the choice with the log-likelihood of every choice.

    `key` names model, prompt, choices and limit: the same key, the same answer. `cut`: something of the prompt did not
    fit; `lost`: the answer was in what was cut. `ended` is False when a generated text ran into its limit. `text` is
    what is scored; `whole` is the answer with its thought where it has one, `in_thought`: it never left that.
    """

    key: str
    text: str
    prompt: str
    prompt_tokens: int
    cut: bool
    loglikelihoods: tuple[float, ...] = ()
    choice_tokens: tuple[int, ...] = ()
    lost: bool = False
    ended: bool = True
    new_tokens: int = 0
    whole: str = ""
    in_thought: bool = False

    def normalised_choice(self, choices: Sequence[str]) -> str:
        """The choice that is the likeliest per token: sums of logarithms favour answers of fewer tokens."""
        means = [total / count for total, count in zip(self.loglikelihoods, self.choice_tokens, strict=True)]
        return choices[max(range(len(means)), key=means.__getitem__)]


@dataclass
class Loaded:
    """A data set as it was read: what is evaluated, examples by group for few-shot prompts, what a reader must know.

    `path` is where the samples are from when it is not what was read; `total` how many there were before a draw,
    `read` before some of them became few-shot examples.
    """

    samples: list[Sample]
    examples: dict[str, list[Sample]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    path: Path | None = None
    total: int = 0
    read: int = 0


def add_examples(loaded: Loaded, count: int, seed: int) -> Loaded:
    """Put `count` solved examples before every sample, the same ones within a group, drawn with `seed`.

    A group without examples of its own gives some of its samples, which are then not evaluated.
    """
    import random

    if not count:
        return loaded
    by_group: dict[str, list[Sample]] = {}
    for sample in loaded.samples:
        by_group.setdefault(sample.group, []).append(sample)
    chosen: dict[str, list[Sample]] = {}
    for group, members in by_group.items():
        pool = loaded.examples.get(group) or members[: max(0, len(members) - 1)]
        chosen[group] = random.Random(f"{seed} {group}").sample(pool, min(count, len(pool)))
    history = {
        group: tuple(
            message
            for example in examples
            for message in (*example.messages, {"role": "assistant", "content": example.references[0]})
        )
        for group, examples in chosen.items()
    }
    used = {id(example) for examples in chosen.values() for example in examples}
    samples = [replace(s, history=history[s.group]) for s in loaded.samples if id(s) not in used]
    notes = list(loaded.notes)
    taken = len(loaded.samples) - len(samples)
    if taken:
        notes.append(f"{taken} samples serve as few-shot examples and are not evaluated")
    fewest = min(map(len, chosen.values()), default=count)
    if fewest < count:
        notes.append(f"some prompts have {fewest} examples instead of the {count} asked for: the data has no more")
    return replace(loaded, samples=samples, examples={}, notes=notes)


def draw(samples: Sequence[T], limit: int, seed: int) -> list[T]:
    """`limit` of the samples drawn with `seed`, in the order of the data; all of them for 0."""
    import random

    if not limit or limit >= len(samples):
        return list(samples)
    return [samples[i] for i in sorted(random.Random(seed).sample(range(len(samples)), limit))]


def accuracy_baselines(samples: Sequence[Sample]) -> dict[str, float]:
    """Accuracy without a model: always the most frequent answer, and a choice at random."""
    counts = Counter(sample.references[0] for sample in samples)
    return {
        "majority": counts.most_common(1)[0][1] / len(samples),
        "random": sum(1 / len(sample.choices) for sample in samples) / len(samples),
    }


def spread(samples: Sequence[Sample], answers: Sequence[Answer]) -> dict[str, Any]:
    """How often each choice was right and how often it was taken: a model may take the same one every time."""
    return {
        "references": dict(sorted(Counter(sample.references[0] for sample in samples).items())),
        "predictions": dict(sorted(Counter(answer.text for answer in answers).items())),
    }


def summarise(scores: Sequence[dict[str, float]], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Mean, standard error, interval and count of every metric."""
    return {name: metrics.summary([row[name] for row in scores], seed) for name in scores[0]}


def asked_of(sample: Sample) -> str:
    """By what the same conversation is known whatever model it was put to: its prompt is in the model's own format."""
    return hashlib.sha256(json_text.dumps(sample.messages).encode()).hexdigest()[:16]


def rows_of(
    samples: Sequence[Sample], answers: Sequence[Answer], scores: Sequence[dict[str, float]]
) -> list[dict[str, Any]]:
    """The lines of the per-sample file."""
    return [
        {
            "index": i,
            "id": sample.id,
            "key": answer.key,
            "asked": asked_of(sample),
            "group": sample.group,
            "prompt": answer.prompt,
            "prompt_tokens": answer.prompt_tokens,
            "prompt_cut": answer.cut,
            "answer_cut_off": answer.lost,
            "prediction": answer.whole or answer.text,
            "new_tokens": answer.new_tokens,
            "ended": answer.ended,
            "references": list(sample.references),
            "scores": {name: round(value, 6) for name, value in score.items()},
            "choices": list(sample.choices),
            "loglikelihoods": list(answer.loglikelihoods),
        }
        for i, (sample, answer, score) in enumerate(zip(samples, answers, scores, strict=True))
    ]
