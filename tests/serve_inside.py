"""The model server within this process, for tests: opened, asked without HTTP."""

import asyncio
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
