"""uvicorn as this server runs it: connections that bring nothing are closed, SIGTERM lets running answers end."""

import asyncio
import contextlib
import ipaddress
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmops.console import UserError, log
from serve.settings import Access

HEADER_SECONDS = 10.0  # from a connection's first byte, or its opening, to the end of a request's header

WAITING = 2048  # connections that the system keeps until they are taken
OTHER_FILES = 200  # that are open beside the connections: the model, libraries, what the pages read


def bound(access: Access) -> socket.socket:
    """A socket of the address, not yet listening. Raises UserError where that is not possible."""
    address = ipaddress.ip_address(access.host)
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((access.host, access.port))
    except OSError as error:
        found.close()
        raise UserError(
            f"port {access.port} of {access.host} cannot be used ({error.strerror}); pass another --port, or end what "
            "listens there"
        ) from error
    return found


def with_files_for(access: Access) -> Access:
    """Let this process open a file for every connection; fewer connections where that is not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = access.connections + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return access
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most == wanted:
        return access
    fewer = max(1, most - min(OTHER_FILES, most // 2))
    log(f"{fewer} connections at once instead of {access.connections}: this process may open {most} files (ulimit -n)")
    return replace(access, connections=fewer)


def taken_at_once(connections: int) -> int:
    """How many connections are taken before those too many are closed, which takes some turns of the loop."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = OTHER_FILES if soft == resource.RLIM_INFINITY else soft - connections
    return max(1, min(32, spare // 8))


def protocol(most: int) -> type[H11Protocol]:
    """uvicorn's HTTP protocol for at most so many connections, none of which may wait for a header for long.

    Beyond them the one that has waited longest is closed: who holds connections open keeps nobody else out.
    """
    waiting: dict[H11Protocol, asyncio.TimerHandle] = {}  # without a whole header, the longest first

    class Patient(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                victim = next(iter(waiting), self)
                victim.forget()  # type: ignore[attr-defined]
                victim.connections.discard(victim)
                victim.transport.abort()
                if victim is self:
                    return
            self.wait()

        def wait(self) -> None:
            waiting[self] = self.loop.call_later(HEADER_SECONDS, self.transport.close)

        def forget(self) -> None:
            timer = waiting.pop(self, None)
            if timer:
                timer.cancel()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self.forget()
            elif self not in waiting:
                self.wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self.forget()
            super().connection_lost(exc)

    return Patient


class Server(uvicorn.Server):
    """A server that drains at SIGTERM and SIGINT and then ends in good order; a second signal ends it at once."""

    def __init__(self, app: Starlette, access: Access, drain_seconds: float, ready: Callable[[], None]) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        config: Any = uvicorn.Config(
            app, http=protocol(access.connections), ws="none", loop="asyncio", lifespan="off", log_config=None,
            access_log=False, server_header=False, proxy_headers=False, backlog=taken_at_once(access.connections),
            timeout_graceful_shutdown=drain_seconds,  # type: ignore[arg-type]  # asyncio waits for parts of a second
        )  # fmt: skip
        super().__init__(config)
        self.app = app
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, then say so."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(WAITING)  # asyncio's number for both is one
        self.ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals while the server runs; they are not raised again afterwards: the end was asked for."""
        loop = asyncio.get_running_loop()
        taken = (signal.SIGTERM, signal.SIGINT)
        for number in taken:
            loop.add_signal_handler(number, self.drain)
        try:
            yield
        finally:
            for number in taken:
                loop.remove_signal_handler(number)

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: it was asked for, or the model's engine has failed and nothing can be answered any more."""
        model = self.app.state.model
        if model is not None and not model.alive:
            self.app.state.draining = self.should_exit = True
        return await super().on_tick(counter)

    def drain(self) -> None:
        """Take no new requests and end when the running ones have."""
        if self.should_exit:
            self.force_exit = True
            return
        self.app.state.draining = self.should_exit = True  # first: whoever read stderr may be gone
        log("ending: no new requests; running answers may end (a second signal ends them)")
