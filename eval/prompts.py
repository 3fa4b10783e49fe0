"""Samples as tokens: how long a prompt may be, what is cut where it is longer, and what cannot be asked at all.

The rule for a prompt that is too long: first the earliest turns before the question go (few-shot examples), then the
end of the passage. A prompt that is too long even without its passage is left out of the score, counted and named.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from eval.rendering import Renderer
from eval.samples import Sample
from llmops.console import UserError

ANSWER_SHARE = 4  # an answer is sure of its limit, or of this part of the whole length where that is less


@dataclass(frozen=True)
class Request:
    """A sample as tokens: its prompt, its choices or how many tokens it may generate; `key` names its answer.

    `cut`: something of the prompt did not fit; `lost`: the answer was in what was cut.
    """

    prompt: list[int]
    choices: list[list[int]]
    max_new_tokens: int
    cut: bool
    lost: bool
    key: str


@dataclass(frozen=True)
class Prepared:
    """A data set ready to be asked: what fits into `length` tokens, and what does not, with the tokens it needs.

    `model_length` is what the model was made for, None where that is not known.
    """

    name: str
    samples: list[Sample]
    requests: list[Request]
    left_out: list[tuple[Sample, int]]
    length: int
    model_length: int | None = None

    @property
    def needed(self) -> int:
        """The length with which nothing is left out."""
        return max((tokens for _, tokens in self.left_out), default=0)

    @property
    def least(self) -> int:
        """The length with which something is asked, where nothing is."""
        return min(tokens for _, tokens in self.left_out)

    def too_short(self, tokens: int) -> str:
        """That the model is too short for so many tokens, in words; "" where it is not."""
        if self.model_length is None or tokens <= self.model_length:
            return ""
        return f"the model was made for {self.model_length} tokens, {tokens} are needed; take a model that is longer"


def nothing_fits(least: Prepared, length: int) -> UserError:
    """The error of a run without a prompt that fits into `length` tokens; `least` needs the fewest."""
    cure = least.too_short(least.least) or f"give {least.least} or more"
    return UserError(f"max_seq_len {length} is too small for every prompt; {cure}")


class Fitter:
    """Cuts prompts to a length. `max_seq_len` 0 is what the data needs, up to what the model can (None: anything)."""

    def __init__(self, renderer: Renderer, fingerprint: str, max_seq_len: int, model_length: int | None) -> None:
        self.renderer = renderer
        self.fingerprint = fingerprint
        self.max_seq_len = max_seq_len
        self.model_length = model_length

    def prepare(
        self, name: str, samples: Sequence[Sample], limit: int, watch: Callable[[Sequence[Sample]], Iterable[Sample]]
    ) -> Prepared:
        """Every sample as tokens; `limit` is the most that an answer may have. `watch` shows the progress."""
        whole = []
        for sample in watch(samples):
            prompt = self.renderer.prompt(sample)
            whole.append((sample, prompt, self.renderer.choices(sample, prompt)))
        length = self.max_seq_len or max(len(p) + max(map(len, c), default=limit) for _, p, c in whole)
        length = min(length, self.model_length or length)
        kept, requests, left_out = [], [], []
        for sample, prompt, choices in whole:
            room = length - self._reserve(choices, limit, length)
            found = (prompt, False, False) if len(prompt) <= room else self._cut(sample, prompt, room)
            if isinstance(found, int):
                left_out.append((sample, self._needed(found, choices, limit)))
                continue
            kept.append(sample)
            requests.append(self._request(*found, choices, limit, length))
        return Prepared(name, kept, requests, left_out, length, self.model_length)

    def _reserve(self, choices: Sequence[Sequence[int]], limit: int, length: int) -> int:
        """The tokens that a prompt leaves to its answer."""
        return max(map(len, choices)) if choices else min(limit, max(1, length // ANSWER_SHARE))

    def _needed(self, bare: int, choices: Sequence[Sequence[int]], limit: int) -> int:
        """A length that is enough for `bare` tokens and the longest answer, or the model's where that will do."""
        enough, most = bare + max(map(len, choices), default=limit), self.model_length
        return most if most and most < enough and bare <= most - self._reserve(choices, limit, most) else enough

    def _request(
        self, prompt: list[int], cut: bool, lost: bool, choices: list[list[int]], limit: int, length: int
    ) -> Request:
        new = 0 if choices else min(limit, length - len(prompt))
        name = json.dumps([self.fingerprint, prompt, choices, new, self.renderer.stop_ids])
        return Request(prompt, choices, new, cut, lost, hashlib.sha256(name.encode()).hexdigest()[:24])

    def _cut(self, sample: Sample, prompt: list[int], room: int) -> tuple[list[int], bool, bool] | int:
        """(prompt, cut, whether its answer is lost) in at most `room` tokens, or the tokens that cannot be cut."""
        while (shorter := sample.without_first_turns()) is not None:
            sample, prompt = shorter, self.renderer.prompt(shorter)
            if len(prompt) <= room:
                return prompt, True, False
        bare = self.renderer.prompt(sample.shortened(0))
        if len(bare) > room:
            return len(bare)
        characters, prompt = self._longest(sample, bare, len(prompt), room)
        return prompt, True, sample.loses_answer(characters)

    def _longest(self, sample: Sample, bare: list[int], whole: int, room: int) -> tuple[int, list[int]]:
        """(characters, prompt) with as much of the passage as fits; `whole` tokens have all of it.

        Tokens are about proportional to characters, so every second look is where they would meet `room`.
        """
        low, high, best = 0, len(sample.passage), bare
        fewest, most = len(bare), whole
        meet = True
        while high - low > 1:
            middle = (low + high) // 2
            if meet:
                middle = low + (high - low) * (room - fewest) // max(1, most - fewest)
                middle = min(high - 1, max(low + 1, middle))
            meet = not meet
            prompt = self.renderer.prompt(sample.shortened(middle))
            if len(prompt) <= room:
                low, fewest, best = middle, len(prompt), prompt
            else:
                high, most = middle, len(prompt)
        return low, best
