"""Talk to a model in the terminal: a conversation, or one question; beside an adapter its base model, too.

python serve/chat.py --help        every setting
Answers go to stdout as they are written, everything else to stderr. Every line is a question, an empty one begins a new
conversation.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from llmops.console import Parser, UserError, log, run_main, stdout_to_stderr, to_bool
from llmops.conversations.records import Message
from llmops.imports import quick_imports
from llmops.machine import devices
from serve.answers import ApiError
from serve.settings import Limits, add_model_settings, check_model

if TYPE_CHECKING:
    from serve.model.service import Service

HINT = "Ask; an empty line begins a new conversation, Ctrl-C stops an answer, Ctrl-D ends."


def build_parser() -> argparse.ArgumentParser:
    """Every setting with its default."""
    parser = Parser(prog="chat.py", description="Talk to a model in the terminal.", allow_abbrev=False)
    add = parser.add_argument
    add("--model_name_or_path", default="mnt/output_path", help="adapter, merged or whole model")
    add("--question", default="", help="one question; empty: a conversation, a question a line")
    add("--compare", type=to_bool, default=False, metavar="true|false",
        help="let an adapter's base model answer, too")  # fmt: skip
    add("--system", default="", help="system message; empty: the chat template's own, if it has one")
    add("--max_new_tokens", type=int, default=512, help="longest answer")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    add("--top_p", type=float, default=1.0, help="choose among the likeliest tokens with this share")
    add("--seed", type=int, default=0, help="of the choice")
    add_model_settings(parser)
    return parser


def visible(text: str) -> str:
    """A text that is safe to print: control characters, which could drive the terminal, are left out."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


class Talk:
    """A conversation with every model of a service."""

    def __init__(self, service: "Service", given: argparse.Namespace, runner: asyncio.Runner) -> None:
        self.service = service
        self.wait_for = runner.run  # one loop for all turns: the engine still tells it of answers that were stopped
        self.given = given
        self.names = service.names if given.compare else service.names[:1]
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        system: list[Message] = [{"role": "system", "content": self.given.system}] if self.given.system else []
        self.messages = {name: list(system) for name in self.names}

    def ask(self, question: str) -> None:
        """Answer a question. Raises UserError where that cannot be; a KeyboardInterrupt ends the answer alone."""
        try:
            if self.service.intents:
                self.wait_for(self._name_intent(question))
                return
            for name in self.names:
                if len(self.names) > 1:
                    say(f"[{name}] ")
                self.wait_for(self._answer(name, question))
        except ApiError as error:
            raise UserError(str(error)) from error

    async def _answer(self, name: str, question: str) -> None:
        from serve.model.asked import read_chat
        from serve.model.exchange import Exchange

        messages = [*self.messages[name], {"role": "user", "content": question}]
        chosen = {key: getattr(self.given, key) for key in ("temperature", "top_p", "seed")}
        body = {"model": name, "messages": messages, "stream": True, "max_tokens": self.given.max_new_tokens} | chosen
        asked = read_chat(body, self.service.limits)
        ids = await self.service.prompt(asked.messages, asked.tools, asked.variables)
        pieces: list[str] = []
        async for _, event in Exchange(self.service, asked.asked, [ids]).told():
            pieces.append(event.text)
            say(visible(event.text))
            if event.finish == "length":
                log(f"the answer was cut at {self.given.max_new_tokens} tokens (--max_new_tokens)")
        say("\n")
        self.messages[name] = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    async def _name_intent(self, question: str) -> None:
        from serve.model.intents import Questions

        intents = self.service.intents
        assert intents is not None
        news: asyncio.Queue[Any] = asyncio.Queue()
        prepared = await self.service.in_order(lambda: intents.prepare([question]))
        asked = Questions([question], prepared, 3, news.put_nowait, time.monotonic() + self.service.limits.seconds)
        self.service.engine.ask(intents.waiting, asked, asyncio.get_running_loop().call_soon_threadsafe)
        found = await news.get()
        if isinstance(found, ApiError):
            raise found
        (row,) = found
        others = ", ".join(f"{one['intent']} {one['probability']:.0%}" for one in row["top"])
        say(visible(f"{row['intent']} ({others})" + (f": {row['reply']}" if row["reply"] else "")) + "\n")


def turns() -> Iterator[str]:
    """Lines of the terminal, or of a file or pipe that stands for it, until they end."""
    people = sys.stdin.isatty()
    if people:
        import readline  # noqa: F401 - input() then has a history and can be edited

        log(HINT)
    while True:
        try:
            yield (input("> ") if people else next(sys.stdin)).strip()
        except (EOFError, StopIteration):
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)


def check(given: argparse.Namespace) -> None:
    """Raise UserError for settings that cannot be."""
    if given.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {given.max_new_tokens}, expected at least 1")
    if not given.temperature >= 0:
        raise UserError(f"--temperature is {given.temperature}, expected at least 0")
    if not 0 < given.top_p <= 1:
        raise UserError(f"--top_p is {given.top_p}, expected more than 0 and at most 1")


def run(given: argparse.Namespace) -> int:
    """Open the model and talk."""
    check(given)
    given.base_too = given.compare
    settings = check_model(given)
    if settings is None:
        raise UserError("--model_name_or_path is none; expected a model's folder")
    devices.tune_cpu()
    with stdout_to_stderr():
        with quick_imports():
            from serve.model.service import open_service

        service = open_service(settings, Limits(rows=2, tokens=given.max_new_tokens), Path(os.devnull))
    if given.compare and len(service.names) == 1:
        log(f"{given.model_name_or_path} is no adapter, so there is no base model to compare with")
    with asyncio.Runner() as runner:
        try:
            converse(Talk(service, given, runner), given.question)
        finally:
            service.close()
    return 0


def say(text: str) -> None:
    """Write a part of an answer."""
    print(text, end="", flush=True)


def converse(talk: Talk, only: str) -> None:
    """Answer the `only` question, or every turn."""
    for question in [only] if only else turns():
        if not question:
            talk.begin()
            continue
        try:
            talk.ask(question)
        except KeyboardInterrupt:
            if only:
                raise
            say("\n")
        except UserError as error:
            if only:
                raise
            log(f"error: {error}")
            talk.begin()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, open, talk."""
    return run_main(lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
