"""Processes that work together: those of one machine meet on its loopback address, where nobody else can reach them.

torch's own store listens on every address of the machine, without a login. torch is imported when it is needed.
"""

import errno
import ipaddress
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from llmops.console import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

LOOPBACK = "127.0.0.1"
SCHEME = "loopback"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # what gloo and NCCL listen on and connect from


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def is_loopback(host: str) -> bool:
    """Whether an address reaches nothing but this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def init_method() -> str | None:
    """What to pass as `init_method` when the process group is made: None (torch's own way) across machines.

    Reads MASTER_ADDR, which the launchers set. On one machine gloo and NCCL are held to the loopback interface, too.
    """
    if not is_loopback(os.environ.get("MASTER_ADDR", "")):
        return None
    for name in INTERFACES:
        os.environ.setdefault(name, "lo")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None  # torchrun holds the store and listens itself
    register()
    return f"{SCHEME}://"


@cache
def register() -> None:
    """Tell torch what `loopback://` means; once, because torch takes a name once."""
    import torch.distributed as dist

    dist.register_rendezvous_handler(SCHEME, meet)


def meet(url: str, timeout: timedelta = timedelta(minutes=30), **_: Any) -> Iterator[tuple["Store", int, int]]:
    """torch's rendezvous for `loopback://`: (store, rank, number of processes) from RANK, WORLD_SIZE, MASTER_PORT.

    Raises UserError in the first process when the port is taken.
    """
    import torch.distributed as dist

    rank, count, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    listening = listen(port) if rank == 0 else None
    yield dist.TCPStore(LOOPBACK, port, count, rank == 0, timeout, master_listen_fd=listening), rank, count
    raise RuntimeError("a group of processes that was left is not entered again")


def listen(port: int) -> int:
    """The file descriptor of a socket that listens on the loopback address; the store owns it."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((LOOPBACK, port))
        server.listen(1024)
    except OSError as error:
        server.close()
        reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise UserError(f"port {port}, where the processes meet, {reason}; choose another --master_port") from error
    return server.detach()
