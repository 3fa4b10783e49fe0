"""OpenAI's routes: /v1/chat/completions and /v1/completions, whole or as a stream of events."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from llmops import json_text
from serve.answers import ApiError, json_response
from serve.model.asked import Asked, read_chat, read_completion, read_object

if TYPE_CHECKING:
    from serve.model.intents import Intents
    from serve.model.lanes import Answer, Event
    from serve.model.sampling import Logprob
    from serve.model.service import Service

T = TypeVar("T")
Told = tuple[int, "Event"]  # which of a request's answers, what is new


class HungUp(ApiError):
    """Nobody waits for the answer any more."""

    def __init__(self) -> None:
        super().__init__(499, "the client hung up")


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


class Form:
    """How the two routes word their answers. `head` is what every chunk has."""

    def __init__(self, exchange: Exchange, chat: bool) -> None:
        self.exchange = exchange
        self.chat = chat
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex

    def head(self, stream: bool) -> dict[str, Any]:
        """Id, kind, time and model."""
        kind = "chat.completion" + (".chunk" if stream else "") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.exchange.created, "model": self.exchange.name}

    def logprobs(self, found: Sequence["Logprob"]) -> dict[str, Any] | None:
        """Log-probabilities as the route words them; None when they were not asked for."""
        if self.exchange.asked.sampling.logprobs < 0:
            return None
        text = self.exchange.service.token_text
        if not self.chat:
            return {
                "tokens": [text(one.token) for one in found],
                "token_logprobs": [one.value for one in found],
                "top_logprobs": [{text(token): value for token, value in one.top} for one in found],
                "text_offset": [*accumulate([len(text(one.token)) for one in found], initial=0)][: len(found)],
            }

        def told(token: int, value: float) -> dict[str, Any]:
            return {"token": text(token), "logprob": value, "bytes": list(text(token).encode())}

        return {
            "content": [
                told(one.token, one.value) | {"top_logprobs": [told(*pair) for pair in one.top]} for one in found
            ]
        }

    def whole(self, texts: list[str], found: list[list["Logprob"]], ends: list[str]) -> dict[str, Any]:
        """The body of an answer that is given at once."""
        choices = []
        for place, (text, own, end) in enumerate(zip(texts, found, ends, strict=True)):
            said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": place, **said, "logprobs": self.logprobs(own), "finish_reason": end})
        return self.head(False) | {"choices": choices, "usage": self.exchange.usage()} | self.warned()

    def warned(self) -> dict[str, Any]:
        """What was left out of the request, if anything."""
        return {"warnings": self.exchange.asked.warnings} if self.exchange.asked.warnings else {}

    def chunk(
        self, place: int, text: str | None, found: Sequence["Logprob"] = (), end: str | None = None
    ) -> dict[str, Any]:
        """A piece of an answer; the text None: its beginning."""
        said: dict[str, Any] = {"text": text or ""}
        if self.chat:
            delta = {"role": "assistant", "content": ""} if text is None else {"content": text} if text else {}
            said = {"delta": delta}
        return {"index": place, **said, "logprobs": self.logprobs(found) if found else None, "finish_reason": end}


def routes(service: "Service") -> list[BaseRoute]:
    """The model's routes."""

    async def chat(request: Request) -> Response:
        found = read_chat(read_object(await request.body()), service.limits)
        ids = await service.prompt(found.messages, found.tools, found.variables)
        return await respond(request, Exchange(service, found.asked, [ids]), True)

    async def completion(request: Request) -> Response:
        found = read_completion(read_object(await request.body()), service.limits)
        ids = [one if isinstance(one, list) else await service.encode(one) for one in found.prompts]
        return await respond(request, Exchange(service, found.asked, ids), False)

    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completion, methods=["POST"]),
        *(intent_routes(service, service.intents) if service.intents else ()),
    ]


def intent_routes(service: "Service", intents: "Intents") -> list[BaseRoute]:
    """The routes of a model that knows FAQ intents."""
    from serve.model.intents import Questions, keep_feedback, read_feedback, read_questions

    async def predict(request: Request) -> Response:
        questions, top = read_questions(read_object(await request.body()))
        prepared = await service.in_order(lambda: intents.prepare(questions))
        news: asyncio.Queue[Any] = asyncio.Queue()
        until = time.monotonic() + service.limits.seconds
        asked = Questions(questions, prepared, top, news.put_nowait, until)
        service.engine.ask(intents.waiting, asked, asyncio.get_running_loop().call_soon_threadsafe)
        try:
            found = await unless_gone(request.receive, news.get())
        finally:
            asked.gone = True
        if isinstance(found, ApiError):
            raise found
        return json_response({"object": "list", "model": service.names[0], "data": found})

    async def correct(request: Request) -> Response:
        row = read_feedback(read_object(await request.body()))
        await service.in_order(lambda: keep_feedback(service.feedback, row))
        known = row["intent"] in intents.catalog.intents or row["intent"] == intents.catalog.none
        return json_response({"kept": row, "known": known}, 201)

    return [
        Route("/v1/intents", predict, methods=["POST"]),
        Route("/v1/intents/feedback", correct, methods=["POST"]),
    ]


async def respond(request: Request, exchange: Exchange, chat: bool) -> Response:
    """An answer at once, or its stream as soon as there is a first piece: until then it may still be refused."""
    form = Form(exchange, chat)
    told = exchange.told()
    if not exchange.asked.stream:
        return json_response(await unless_gone(request.receive, gathered(form, told)))
    first = await unless_gone(request.receive, anext(told))
    return EventStream(events(form, first, told))


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


async def gathered(form: Form, told: AsyncGenerator[Told, None]) -> dict[str, Any]:
    """A whole answer's body."""
    count = len(form.exchange.answers)
    texts, found, ends = [""] * count, [list["Logprob"]() for _ in range(count)], [""] * count
    async for place, event in told:
        texts[place] += event.text
        found[place] += event.logprobs
        ends[place] = event.finish or ""
    return form.whole(texts, found, ends)


async def events(form: Form, first: Told, told: AsyncGenerator[Told, None]) -> AsyncGenerator[str, None]:
    """The lines of a stream, to `data: [DONE]`."""
    exchange = form.exchange
    usage = {"usage": None} if exchange.asked.with_usage else {}

    def line(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json_text.dumps(form.head(True) | {'choices': choices} | usage | more)}\n\n"

    def lines(place: int, event: "Event") -> str:
        piece = line([form.chunk(place, event.text, event.logprobs)]) if event.text or event.logprobs else ""
        return piece + (line([form.chunk(place, "", (), event.finish)]) if event.finish else "")

    try:
        async with aclosing(told):
            yield (line([form.chunk(0, None)], **form.warned()) if form.chat else "") + lines(*first)
            async for place, event in told:
                yield lines(place, event)
        if exchange.asked.with_usage:
            yield line([], usage=exchange.usage())
    except ApiError as error:  # the answer has begun
        yield f"data: {json_text.dumps(error.body)}\n\n"
    yield "data: [DONE]\n\n"


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
