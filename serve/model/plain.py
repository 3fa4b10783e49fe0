"""Answers of a model whose attention cannot be ours (old checkpoints): by its own `generate`, batch by batch."""

import torch
from transformers import LogitsProcessor

from llmops.console import UserError, log
from llmops.generation.generator import MOST_PLAIN_ROWS, plain_greedy
from llmops.generation.passes import check_numbers
from serve.answers import RETRY_SECONDS, ApiError
from serve.model.lanes import Answer, Event, Lane, Outbox


class PlainLane(Lane):
    """Requests join when a batch begins, and leave it when their answer ends; the batch ends with the last of them."""

    batch: tuple[Answer, ...] = ()

    @property
    def going(self) -> list[Answer]:
        """The answers that are being written."""
        return [answer for answer in self.batch if not answer.done]

    def clear(self) -> list[Answer]:
        """Forget what runs; the answers that are not done."""
        going, self.batch = self.going, ()
        return going

    def turn(self, out: Outbox) -> bool:
        """Answer some requests to their end; whether there were any."""
        self._expire(out)
        if not self.waiting:
            return False
        self.activate()
        count = min(len(self.waiting), self.rows, MOST_PLAIN_ROWS)
        self.batch = tuple(self.waiting.popleft() for _ in range(count))
        self.metrics.add("llmops_prompt_tokens_total", sum(len(answer.prompt) for answer in self.batch))
        most = max(answer.limit for answer in self.batch)
        prompts = [answer.prompt for answer in self.batch]
        try:
            plain_greedy(self.passes, prompts, most, self.stop_ids, Steering(self, out))
            self._went_well(count)
        except torch.OutOfMemoryError:
            self.rows, self._well = max(1, count // 2), 0
            log(f"out of memory with {count} answers at once; going on with {self.rows}")
            sentence = "the device's memory does not suffice for these requests"
            self._refuse(ApiError(503, sentence, code="memory", retry=RETRY_SECONDS), out)
        except UserError as error:  # no numbers
            log(f"error: {error}")
            self._refuse(ApiError(500, str(error)), out)
        self.batch = ()
        return True

    def _refuse(self, error: ApiError, out: Outbox) -> None:
        for answer in self.clear():
            out.say(answer.tell, Event(error=error))

    def steer(self, logits: torch.Tensor, out: Outbox) -> list[int]:
        """The next token of every row by logits [B, V], an end token for those that are done; tells what is new."""
        self._expire(out)
        stop = self.stop_ids[0]
        if not self.going:  # the last of them ran out of time or hung up just now
            out.send()
            return [stop] * len(self.batch)
        found = []
        for answer, (token, logp) in zip(self.batch, self._choose(self.batch, logits), strict=True):
            if not answer.done:
                answer.take(token, logp, frozenset(self.stop_ids))
                event = answer.ended() if answer.done else answer.piece()
                if event:
                    out.say(answer.tell, event)
            found.append(stop if answer.done else token)
        out.send()
        return found


class Steering(LogitsProcessor):
    """Makes greedy search take the tokens that the rows' requests ask for."""

    def __init__(self, lane: PlainLane, out: Outbox) -> None:
        self.lane = lane
        self.out = out

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] that leave one token to each row."""
        check_numbers(scores)
        tokens = torch.tensor(self.lane.steer(scores, self.out), device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter(1, tokens, 0.0)
