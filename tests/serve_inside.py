"""The model server within this process, for tests: opened, asked without HTTP."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve.settings import Limits, Model

QUESTIONS = [f"Question {i}: what comes after {'number ' * (i % 5)}{i}?" for i in range(24)]


@contextmanager
def opened(model: Model, feedback: Path) -> Iterator[Any]:
    """The service of a model, closed at the end."""
    from serve.model.service import open_service

    found = open_service(model, Limits(rows=8), feedback)
    try:
        yield found
    finally:
        assert found.close()


def user(text: str) -> list[dict[str, str]]:
    """A question."""
    return [{"role": "user", "content": text}]


def answers(service: Any, prompts: Sequence[list[int]], **fields: Any) -> tuple[list[str], Any]:
    """(the texts that one request's prompts get, its exchange), within this process."""
    from serve.model.asked import read_completion
    from serve.model.exchange import Exchange

    async def run() -> tuple[list[str], Any]:
        asked = read_completion({"prompt": [list(ids) for ids in prompts], **fields}, service.limits).asked
        exchange = Exchange(service, asked, prompts)
        texts = [""] * len(prompts)
        async for place, event in exchange.told():
            texts[place] += event.text
        return texts, exchange

    return asyncio.run(run())


def rendered(service: Any, questions: Sequence[str]) -> list[list[int]]:
    """Questions as token ids."""
    return [service.model.chat.prompt(user(question)) for question in questions]


def ask(service: Any, *requests: tuple[str, dict[str, Any]]) -> list[tuple[int, Any]]:
    """(status, body, or a stream's events) of requests that are posted at once to the application, in this process."""
    from serve.app import build_app
    from serve.settings import Settings

    app = build_app(Settings(Path("mnt")), service)

    async def post(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        sent: list[dict[str, Any]] = []
        inbox = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> dict[str, Any]:
            if inbox:
                return inbox.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        await app(
            {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": headers, "scheme": "http", "root_path": "", "http_version": "1.1"},
            receive, send,
        )  # fmt: skip
        text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
        lines = [line[6:] for line in text.splitlines() if line.startswith("data: {")]  # a stream's
        return sent[0]["status"], [json.loads(line) for line in lines] or json.loads(text)

    async def run() -> list[tuple[int, Any]]:
        return await asyncio.gather(*(post(path, body) for path, body in requests))

    return asyncio.run(run())
