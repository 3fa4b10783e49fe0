"""A request's answers while they are written, and who waits for them over HTTP."""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.answers import ApiError
from serve.model.asked import MOST_TOLD, Asked

if TYPE_CHECKING:
    from serve.model.lanes import Answer, Event
    from serve.model.service import Service

T = TypeVar("T")
Told = tuple[int, "Event"]  # which of a request's answers, what is new


class Exchange:
    """One request's answers while they are written."""

    def __init__(self, service: "Service", asked: Asked, prompts: Sequence[list[int]]) -> None:
        self.service = service
        self.asked = asked
        self.name = service.name_of(asked.model)
        self.created = int(time.time())
        self.news: asyncio.Queue[Told] = asyncio.Queue()
        self.answers: list[Answer] = [
            service.answer(asked, ids, partial(self._hear, place)) for place, ids in enumerate(prompts)
        ]

        told = sum(answer.limit for answer in self.answers) * (1 + asked.sampling.logprobs)
        if told > MOST_TOLD:
            raise ApiError(
                400, f"the answers may have {told} log-probabilities, and {MOST_TOLD} are told at most; ask for fewer "
                "tokens (max_tokens), prompts or logprobs", "logprobs", "invalid_value",
            )  # fmt: skip

    def _hear(self, place: int, event: "Event") -> None:
        self.news.put_nowait((place, event))

    async def told(self) -> AsyncGenerator[Told, None]:
        """What is new, until all answers have ended. Raises ApiError for an answer that is not given.

        Who stops listening before the end gives the rows free.
        """
        self.service.engine.submit(self.name, self.answers, asyncio.get_running_loop().call_soon_threadsafe)
        left = len(self.answers)
        first = False
        try:
            while left:
                place, event = await self.news.get()
                if event.error:
                    raise event.error
                if not first:
                    first = True
                    self._took("llmops_first_token_seconds", self.answers[place].began or time.monotonic())
                left -= event.finish is not None
                yield place, event
            self._took("llmops_answer_seconds", time.monotonic())
        finally:
            if left:
                self.service.engine.cancel(self.answers)

    def _took(self, name: str, until: float) -> None:
        self.service.metrics.took(name, until - self.answers[0].asked)

    def usage(self) -> dict[str, Any]:
        """How many tokens were read and written."""
        read = sum(len(answer.prompt) for answer in self.answers)
        written = sum(len(answer.ids) for answer in self.answers)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": sum(answer.cached for answer in self.answers)},
        }


class HungUp(ApiError):
    """Nobody waits for the answer any more."""

    def __init__(self) -> None:
        super().__init__(499, "the client hung up")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is ended when the client hangs up. Raises HungUp then."""

    async def hung_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HungUp
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class EventStream(Response):
    """A stream of events that ends when the client hangs up."""

    def __init__(self, lines: AsyncGenerator[str, None]) -> None:
        super().__init__(None, 200, {"x-accel-buffering": "no"}, "text/event-stream")
        del self.headers["content-length"]
        self.lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the lines; whoever writes them is told when nobody reads any more."""

        async def write() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self.lines):
                async for line in self.lines:
                    await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        with suppress(HungUp):
            await unless_gone(receive, write())
