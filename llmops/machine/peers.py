"""Machines that share a run notice when one of them is gone, or the network to it.

gloo and NCCL wait for a peer that fell silent for as long as a collective may take, which is hours. Here each process
holds a connection to the first one, and the kernels ask each other whether they are still there (TCP keepalive), so a
process that computes, waits or is stopped is never taken for a dead one. The first process tells the others.
"""

import hmac
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from llmops.console import RunStopped, Terminated, log

IDLE, INTERVAL, PROBES = 10, 5, 4  # seconds of silence until the kernel asks, between questions, how many
SILENCE = IDLE + INTERVAL * PROBES
LAUNCHER_PID = "LLMOPS_LAUNCHER_PID"
HELLO = 20  # seconds for a connection to say who it is
GRACE = 5  # seconds for the main thread to end by itself
LONGEST = 1 << 16  # bytes of a line
BYE = b"bye\n"
NETWORK_MARKS = ("gloo/", "Gloo ", "NCCL", "TCPStore", "onnection closed by peer", "onnection reset")


def keep_asking(connection: socket.socket) -> None:
    """Let the kernel find out within SILENCE that the other end is gone."""
    connection.settimeout(None)
    for option, value in (
        (socket.TCP_KEEPIDLE, IDLE), (socket.TCP_KEEPINTVL, INTERVAL), (socket.TCP_KEEPCNT, PROBES),
        (socket.TCP_USER_TIMEOUT, SILENCE * 1000),
    ):  # fmt: skip
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def read_line(connection: socket.socket) -> bytes:
    """One line, or what came before the connection ended or a line is too long. Raises OSError when it breaks."""
    found = b""
    while not found.endswith(b"\n") and len(found) < LONGEST and (more := connection.recv(4096)):
        found += more
    return found


class Peers:
    """The machines of this run, as a context: an end that all take part in is none that is noticed.

    `remains` says what a run that lost a machine leaves, in a clause; `grace` seconds later what still runs is ended.
    On one machine nothing happens: its launcher sees its processes.
    """

    def __init__(self, remains: str, grace: float = GRACE) -> None:
        self.remains, self.grace = remains, grace
        self.name = os.environ.get("LLMOPS_MACHINE", socket.gethostname())
        self.speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        self.connections: list[socket.socket] = []  # at the first: to the others; there: to the first
        self.lost = ""  # the sentence, when a machine is lost
        self.known, self.over = threading.Event(), threading.Event()
        self.lock = threading.Lock()
        self.watching = False

    def __enter__(self) -> "Peers":
        return self

    def begin(self) -> None:
        """Connect the processes; called by each of them when the process group is there."""
        if int(os.environ.get("CROSS_SIZE", "1")) < 2:
            return
        import torch.distributed as dist

        first = dist.get_rank() == 0
        place: list[Any] = [None, None]
        if first:
            both = socket.has_dualstack_ipv6()  # ssh may have found the machines by IPv6
            family = socket.AF_INET6 if both else socket.AF_INET
            server = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)
            place = [server.getsockname()[1], secrets.token_hex(16)]
        dist.broadcast_object_list(place, src=0)
        self.watching = True
        if first:
            self._in_thread(self._accept, server, place[1])
        else:
            address = (os.environ["MASTER_ADDR"], place[0])
            try:
                connection = socket.create_connection(address, timeout=SILENCE)
            except OSError as error:
                raise RunStopped(
                    f"{self.name} does not reach {address[0]}:{address[1]} ({error}); machines that share a run need "
                    "all of each other's ports"
                ) from error
            keep_asking(connection)
            connection.sendall(json.dumps([place[1], self.name]).encode() + b"\n")
            self.connections.append(connection)
            self._in_thread(self._listen, connection)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.watching:
            return
        if error is None or isinstance(error, Terminated):
            self.over.set()
            with self.lock:
                for connection in self.connections:
                    send(connection, BYE)
            return
        of_network = isinstance(error, RuntimeError | OSError) and self._speaks_of_network(error)
        if of_network:
            self.known.wait(SILENCE + GRACE)
        self.over.set()  # from here on the main thread ends by itself
        if of_network and self.lost:
            raise self.end_of_run() from error

    def end_of_run(self) -> Exception:
        """What ends the main thread when a machine is lost; one process of each machine says why."""
        return RunStopped(self.lost) if self.speaks else Terminated(1)

    def _speaks_of_network(self, error: Exception) -> bool:
        import torch.distributed as dist

        text = str(error)
        return isinstance(error, dist.DistError) or any(mark in text for mark in NETWORK_MARKS)

    def _in_thread(self, function: object, *arguments: object) -> None:
        threading.Thread(target=function, args=arguments, daemon=True).start()  # type: ignore[arg-type]

    def _accept(self, server: socket.socket, secret: str) -> None:
        while True:
            connection, _ = server.accept()
            self._in_thread(self._greet, connection, secret)

    def _greet(self, connection: socket.socket, secret: str) -> None:
        """At the first machine: who is it; then wait for its end."""
        try:
            connection.settimeout(HELLO)
            said, name = json.loads(read_line(connection))
            known = hmac.compare_digest(said, secret)
        except (OSError, ValueError, TypeError):
            known = False
        if not known:
            connection.close()
            return
        keep_asking(connection)
        with self.lock:
            self.connections.append(connection)
        if self.lost:
            send(connection, self.lost.encode() + b"\n")
        try:
            line = read_line(connection)
        except OSError as error:
            self._lose(f"{name} does not answer any more ({error.strerror}): it, or the network to it, is gone", name)
            return
        if line != BYE:
            self._lose(f"the run on {name} has ended", name)

    def _listen(self, connection: socket.socket) -> None:
        """At another machine: what the first says of the others, and whether it is there itself."""
        try:
            line = read_line(connection)
        except OSError as error:
            self._lose(f"the first machine does not answer any more ({error.strerror}): it, or the network, is gone")
            return
        if line != BYE:
            self._end(line.decode().strip() or self._sentence("the run on the first machine has ended"))

    def _sentence(self, what: str, name: str = "") -> str:
        without = f", also without it (--exclude_hosts {name})" if name else ""
        return f"{what}; {self.remains}, and the same command goes on from there{without}"

    def _lose(self, what: str, name: str = "") -> None:
        with self.lock:
            if self.lost or self.over.is_set():
                return
            self.lost = self._sentence(what, name)
            for connection in self.connections:
                send(connection, self.lost.encode() + b"\n")
        self._end(self.lost)

    def _end(self, sentence: str) -> None:
        """End this process: by its main thread where that comes out of its wait, or without it."""
        if self.over.is_set():
            return
        self.lost = sentence
        self.known.set()
        if not self.over.wait(self.grace):
            if self.speaks:
                log(f"\nstopped: {sentence}")
        else:
            time.sleep(GRACE)
        os._exit(1)


def send(connection: socket.socket, line: bytes) -> None:
    """Say a line to a machine that may be gone."""
    try:
        connection.settimeout(1)
        connection.sendall(line)
    except OSError:
        connection.close()


@contextmanager
def watch_launcher() -> Iterator[None]:
    """End like by SIGTERM when the launcher of this process is gone, so that no orphan goes on writing."""
    launcher = int(os.environ.get(LAUNCHER_PID, "0"))
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1):
            try:
                os.kill(launcher, 0)
            except ProcessLookupError:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    on_this_host = os.environ.get("LLMOPS_LAUNCHER_HOST") == socket.gethostname()
    if launcher and on_this_host:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
