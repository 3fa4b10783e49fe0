"""The model's routes: OpenAI's /v1/chat/completions and /v1/completions, and /v1/intents."""

import asyncio
import time
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from serve.answers import ApiError, json_response
from serve.model.asked import read_chat, read_completion, read_object
from serve.model.exchange import EventStream, Exchange, unless_gone
from serve.model.forms import Form, events, gathered

if TYPE_CHECKING:
    from serve.model.intents import Intents
    from serve.model.service import Service


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
        return await unless_gone(request.receive, gathered(form, told))
    first = await unless_gone(request.receive, anext(told))
    return EventStream(events(form, first, told))
