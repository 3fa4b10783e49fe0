"""HTTP calls: one attempt, and again with growing pauses. What must stay secret is taken out of every text.

Standard library only: a job that cannot install its packages must still be able to say so.
"""

import base64
import http.client
import random
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from email.message import Message
from typing import TypeVar
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

from llmops.console import UserError

T = TypeVar("T")

ATTEMPT_SECONDS = 30.0  # for a connection, and for each piece of an answer
LONGEST_PAUSE = 60.0
LONGEST_REPLY = 1 << 20
AGAIN = (408, 425, 429)  # of the codes below 500: come back later
UNSURE = (502, 504)  # a proxy has no answer of what it passed on
HIDDEN = "***"


class CallFailed(Exception):
    """An attempt that came to nothing: why in words, whether another one may help, and what pause was asked for.

    `unsure`: what was sent may have arrived, its answer did not.
    """

    def __init__(self, reason: str, again: bool, pause: float = 0.0, unsure: bool = False) -> None:
        super().__init__(reason)
        self.again, self.pause, self.unsure = again, pause, unsure


class Secrets:
    """Texts that no message may hold; short ones and those of one kind of letter would hide half the language."""

    def __init__(self, texts: Iterable[str]) -> None:
        parts = {part for text in texts for part in (text.strip(), *text.split())}
        self.texts = sorted((part for part in parts if len(part) >= 8), key=len, reverse=True)

    def hidden(self, text: str) -> str:
        """A text with *** in the place of every secret."""
        for secret in self.texts:
            text = text.replace(secret, HIDDEN)
        return text


def secrets_in(address: str) -> list[str]:
    """The parts of an address that may be secret: name and password, query, fragment."""
    parts = urlsplit(address) if is_address(address) else SplitResult("", "", "", "", "")
    login = parts.netloc.rpartition("@")[0]
    return [text for text in (login, login.partition(":")[2], parts.query, parts.fragment) if text]


def is_address(text: str) -> bool:
    """Whether a text is meant as an address of the web and not as a path."""
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def shown_address(address: str) -> str:
    """An address for people: without name and password, query and fragment."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def check_address(name: str, address: str) -> str:
    """The address, when a request can be made to it. Raises UserError, which does not show it."""
    try:
        parts = urlsplit(address)
        good = parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, half a bracket
        good = False
    if not is_address(address) or not good or re.search(r"[^!-~]", address):
        raise UserError(f"{name} is no address; expected one such as https://example.org/jobs/1 in printable ASCII")
    return address


def check_header(name: str, value: str) -> str:
    """A header's value without blanks around it. Raises UserError, which does not show it, for what no header can hold.

    http.client would name it in its own error.
    """
    value = value.strip()
    if re.search(r"[^ -~]", value):
        raise UserError(f"{name} holds a character that no HTTP header can; expected printable ASCII on one line")
    return value


def opener(redirects: bool) -> urllib.request.OpenerDirector:
    """What makes requests: http and https and nothing else, through the proxies of the environment.

    With `redirects` False an answer that names another address is an error: nothing is told to somebody else.
    """
    made = urllib.request.OpenerDirector()
    kinds: list[Callable[[], urllib.request.BaseHandler]] = [
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
        urllib.request.HTTPErrorProcessor, urllib.request.HTTPDefaultErrorHandler,
    ]  # fmt: skip
    if redirects:
        kinds.append(urllib.request.HTTPRedirectHandler)
    for kind in kinds:
        made.add_handler(kind())
    return made


def attempt(work: Callable[[], T]) -> T:
    """Do one attempt; everything that a network does to it becomes CallFailed."""
    try:
        return work()
    except urllib.error.HTTPError as error:
        with error:
            again = error.code >= 500 or error.code in AGAIN
            reason, pause = f"HTTP {error.code} {error.reason}", pause_of(error.headers)
            raise CallFailed(reason, again, pause, unsure=error.code in UNSURE) from error
    except urllib.error.URLError as error:  # before all was sent
        raise CallFailed(str(getattr(error.reason, "strerror", None) or error.reason), True) from error
    except http.client.HTTPException as error:
        raise CallFailed(f"the answer is no HTTP ({type(error).__name__})", True, unsure=True) from error
    except OSError as error:  # a time that ran out, a connection that broke
        raise CallFailed(error.strerror or str(error) or type(error).__name__, True, unsure=True) from error


def pause_of(headers: Mapping[str, str] | Message) -> float:
    """The seconds of Retry-After; 0 where it says none."""
    text = headers.get("Retry-After") or ""
    return min(float(text), LONGEST_PAUSE) if re.fullmatch(r"\d{1,6}", text) else 0.0


def asking(method: str, address: str, headers: Mapping[str, str], body: bytes | None = None) -> urllib.request.Request:
    """A request. Name and password of an address become its login, which no redirect takes to another address."""
    parts = urlsplit(address)
    login, _, place = parts.netloc.rpartition("@")
    asked = urllib.request.Request(
        parts._replace(netloc=place, fragment="").geturl(), data=body, headers=dict(headers), method=method
    )
    if login and "Authorization" not in headers:
        coded = base64.b64encode(unquote_to_bytes(login)).decode()
        asked.add_unredirected_header("Authorization", f"Basic {coded}")
    return asked


def request(method: str, address: str, headers: Mapping[str, str], body: bytes, timeout: float) -> bytes:
    """The body of a good answer, its first MiB. Raises CallFailed. Redirects are not followed."""

    def work() -> bytes:
        asked = asking(method, address, headers, body)
        with opener(redirects=False).open(asked, timeout=timeout) as answer:
            reply = answer.read(LONGEST_REPLY)
            if answer.length and len(reply) < LONGEST_REPLY:
                raise CallFailed("the answer broke off", True, unsure=True)
            return reply

    return attempt(work)


def persist(
    work: Callable[[], T], seconds: float, stopped: threading.Event, tell: Callable[[str], None], what: str
) -> T:
    """Try until it works: pauses of 1, 2, 4 … 60 seconds with some chance in them, `seconds` of pauses in all.

    Raises the last CallFailed when that was not enough, when another attempt cannot help, or when `stopped` is set.
    """
    waited, number = 0.0, 0
    while True:
        try:
            return work()
        except CallFailed as failed:
            pause = max(failed.pause, min(2.0**number, LONGEST_PAUSE) * random.uniform(0.75, 1.0))
            if not failed.again or waited + pause > seconds or stopped.is_set():
                raise
            tell(f"{what}: {failed}; again in {pause:.0f} s")
            if stopped.wait(pause):
                raise
            waited += pause
            number += 1
