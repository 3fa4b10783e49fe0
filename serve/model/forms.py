"""OpenAI's form of answers: whole, or as the lines of a stream."""

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from llmops import json_text
from serve.answers import ApiError
from serve.model.exchange import Exchange, Told
from serve.model.text import Offsets, token_name

if TYPE_CHECKING:
    from serve.model.lanes import Event
    from serve.model.sampling import Logprob

AT_A_TIME = 500  # log-probabilities that are written before anything else may be done


class Form:
    """How the two routes word their answers. `head` is what every chunk has."""

    def __init__(self, exchange: Exchange, chat: bool) -> None:
        self.exchange = exchange
        self.chat = chat
        self.bytes = cache(exchange.service.token_bytes)
        self.offsets = [Offsets(exchange.service.decode) for _ in exchange.answers]
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex

    def head(self, stream: bool) -> dict[str, Any]:
        """Id, kind, time and model."""
        kind = "chat.completion" + (".chunk" if stream else "") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.exchange.created, "model": self.exchange.name}

    def logprobs(self, place: int, found: Sequence["Logprob"]) -> dict[str, list[Any]] | None:
        """What is new of an answer's log-probabilities as the route words them; None when they were not asked for."""
        if self.exchange.asked.sampling.logprobs < 0:
            return None
        if not self.chat:

            def name(token: int) -> str:
                return token_name(self.bytes(token), "bytes:")

            return {
                "tokens": [name(one.token) for one in found],
                "token_logprobs": [one.value for one in found],
                "top_logprobs": [{name(token): value for token, value in one.top} for one in found],
                "text_offset": [self.offsets[place].place(one.token) for one in found],
            }

        def told(token: int, value: float) -> dict[str, Any]:
            raw = self.bytes(token)
            return {"token": token_name(raw), "logprob": value, "bytes": list(raw)}

        return {
            "content": [
                told(one.token, one.value) | {"top_logprobs": [told(*pair) for pair in one.top]} for one in found
            ]
        }

    def written(self, place: int, found: Sequence["Logprob"]) -> dict[str, str]:
        """The same as JSON: what stands in the list of each name."""
        return {name: json_text.dumps(told)[1:-1] for name, told in (self.logprobs(place, found) or {}).items()}

    def whole(self, texts: Sequence[str], logprobs: Sequence[str], ends: Sequence[str]) -> str:
        """The body of an answer that is given at once; `logprobs` are JSON already."""
        choices = []
        for place, (text, own, end) in enumerate(zip(texts, logprobs, ends, strict=True)):
            said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choice = json_text.dumps({"index": place, **said, "finish_reason": end})
            choices.append(f'{choice[:-1]}, "logprobs": {own}}}')
        body = json_text.dumps(self.head(False) | {"usage": self.exchange.usage()} | self.warned())
        return f'{body[:-1]}, "choices": [{", ".join(choices)}]}}'

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
        return {
            "index": place,
            **said,
            "logprobs": self.logprobs(place, found) if found else None,
            "finish_reason": end,
        }


async def gathered(form: Form, told: AsyncGenerator[Told, None]) -> Response:
    """A whole answer."""
    count = len(form.exchange.answers)
    texts, found, ends = [""] * count, [list["Logprob"]() for _ in range(count)], [""] * count
    async for place, event in told:
        texts[place] += event.text
        found[place] += event.logprobs
        ends[place] = event.finish or ""
    logprobs = [await told_of(form, place, own) for place, own in enumerate(found)]
    return Response(form.whole(texts, logprobs, ends), media_type="application/json")


async def told_of(form: Form, place: int, found: Sequence["Logprob"]) -> str:
    """An answer's log-probabilities as JSON, written some at a time in the thread that renders.

    Between two pieces others have their prompts rendered, and the loop is free: writing JSON stops all threads.
    """
    told = form.exchange.asked.sampling.logprobs
    if told < 0:
        return "null"
    size = max(1, AT_A_TIME // (1 + told))
    pieces = [found[at : at + size] for at in range(0, len(found), size)] or [found]
    written = [await form.exchange.service.in_order(partial(form.written, place, piece)) for piece in pieces]
    return "{" + ", ".join(f'"{name}": [{", ".join(one[name] for one in written)}]' for name in written[0]) + "}"


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
