"""What stands before every part of the server: token, names of the host, origin of writes, size of requests, headers.

A web page that somebody visits can make the browser send requests to a server on the same machine. It cannot read the
token, cannot choose the Host and Origin headers, and cannot send JSON elsewhere without asking first; so these three
are looked at. Sources: OWASP's cheat sheets on cross-site request forgery and on DNS rebinding.
"""

import asyncio
import hmac
import ipaddress
import re
import time

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.answers import ApiError
from serve.settings import Access

COOKIE = "llmops_token"
OPEN_PATHS = ("/health",)  # asked by supervisors that know no token; it tells nothing but that the server is up
HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[a-z0-9_.-]+))(?::[0-9]{1,5})?")
READING = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through or refuse it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        reply = Reply(send)
        request = HTTPConnection(scope)
        try:
            login = self._check(request, scope["method"])
            if login is not None:
                await login(scope, receive, reply.send)
                return
            body = Body(receive, self.access.body_bytes, self.access.seconds_to_send)
            await self.app(scope, body.receive, reply.send)
        except ApiError as error:
            if not reply.started:
                await refused(request, error)(scope, receive, reply.send)

    def _check(self, request: HTTPConnection, method: str) -> Response | None:
        """The answer to a visit that brings the token, else None. Raises ApiError for what may not come in."""
        host = request.headers.get("host", "")
        if not self.knows(host):
            raise ApiError(421, "this name is not known here; start with --allowed_hosts and the name", code="host")
        if method == "GET" and request.scope["path"] == "/" and "token" in request.query_params:
            return self._login(request)
        if request.scope["path"] not in OPEN_PATHS and not self._has_token(request):
            raise ApiError(
                401, "the token is missing or wrong; the server's first line has it or says where it is", code="token"
            )
        if method not in READING:
            check_write(request, host, self.access.body_bytes)
        return None

    def knows(self, host: str) -> bool:
        """Whether a Host header names this machine: an address (no name that somebody else owns), or a known name."""
        found = HOST.fullmatch(host.lower())
        name = (found["address"] or found["name"]) if found else ""
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in ("localhost", *self.access.hosts)
        return True

    def _login(self, request: HTTPConnection) -> Response:
        """Give the page its cookie and take the token out of the address."""
        given = request.query_params["token"]
        if not self._is_token(given):
            raise ApiError(401, "the token is wrong; the server's first line has it or says where it is", code="token")
        response = RedirectResponse("/", 303)
        response.set_cookie(COOKIE, given, httponly=True, samesite="strict", secure=request.scope["scheme"] == "https")
        return response

    def _has_token(self, request: HTTPConnection) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._is_token(given.strip())
        return self._is_token(request.cookies.get(COOKIE, ""))

    def _is_token(self, given: str) -> bool:
        """Whether this is the token, in a time that does not tell how much of it is right."""
        token = self.access.token
        return not token or hmac.compare_digest(given.encode("utf-8", "replace"), token.encode("ascii"))


def check_write(request: HTTPConnection, host: str, limit: int) -> None:
    """Raise ApiError for a write that another site's page makes, that is no JSON, or that says it is too large."""
    origin = request.headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
        raise ApiError(403, "requests that change something come from this server's own pages alone", code="origin")
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise ApiError(403, "requests that change something come from this server's own pages alone", code="origin")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "expected a JSON body with Content-Type: application/json", code="content_type")
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length) > limit:
        raise too_large(limit)


def too_large(limit: int) -> ApiError:
    """The error of a body beyond the limit."""
    return ApiError(413, f"the request is larger than {limit} bytes (--max_body_mb)", code="body")


def refused(request: HTTPConnection, error: ApiError) -> Response:
    """An error for a program, or its sentence alone for somebody who looks at it in a browser."""
    if "text/html" not in request.headers.get("accept", ""):
        return error.response
    more = "; open the address with ?token= that stands there" if error.code == "token" else ""
    return PlainTextResponse(error.message + more + "\n", error.status)


class Body:
    """A request's body, within a size and a time; after it, what else the connection says."""

    def __init__(self, receive: Receive, limit: int, seconds: float) -> None:
        self._receive = receive
        self._limit = limit
        self._left = limit
        self._until = time.monotonic() + seconds
        self._whole = False

    async def receive(self) -> Message:
        """The next message. Raises ApiError beyond the limits."""
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(max(0, self._until - time.monotonic())):
                message = await self._receive()
        except TimeoutError as error:
            raise ApiError(408, "the request did not come in time", code="slow") from error
        self._whole = not message.get("more_body", False)
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise too_large(self._limit)
        return message


class Reply:
    """What goes out, with the headers that every answer has; and whether it has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def send(self, message: Message) -> None:
        """Send on, the headers added."""
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", "no-store")
        await self._send(message)
