"""Processes that work together: those of one machine meet on its loopback address, where nobody else can reach them.

torch's own store listens on every address of the machine, without a login. torch is imported when it is needed.
"""

import atexit
import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from llmops.console import RunStopped, UserError

if TYPE_CHECKING:
    from torch.distributed import Store

LOOPBACK = "127.0.0.1"
SCHEME = "loopback"
NO_INTERFACE = "Unable to find address for"  # gloo's words
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

    Reads MASTER_ADDR, which the launchers set. On one machine gloo and NCCL are held to the loopback interface, too. On
    several, gloo gets the interface that leads to the first one: by itself it takes that of the machine's own name,
    which Debian's /etc/hosts gives to the loopback interface. NCCL looks for a good one.
    """
    address = os.environ.get("MASTER_ADDR", "")
    if not is_loopback(address):
        interface = interface_to(address)
        if interface:
            os.environ.setdefault(INTERFACES[0], interface)
        return None
    for name in INTERFACES:
        os.environ.setdefault(name, "lo")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None  # torchrun holds the store and listens itself
    register()
    return f"{SCHEME}://"


def interface_to(host: str) -> str | None:
    """The network interface from which this machine reaches `host`; None where that cannot be told."""
    import psutil

    try:
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # a route is looked up, nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    names = [
        name for name, found in psutil.net_if_addrs().items() if any(one.address.split("%")[0] == own for one in found)
    ]
    return names[0] if names and not is_loopback(own) else None


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


@contextmanager
def meeting() -> Iterator[None]:
    """Turns what torch says when processes do not find each other, or their network, into a sentence."""
    import torch.distributed as dist

    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        yield
    except dist.DistError as error:
        text = str(error)
        if "EADDRINUSE" in text:
            raise UserError(f"{place}, where the machines meet, is taken; choose another --master_port") from error
        if "timed out" in text.lower():
            raise RunStopped(f"the other machines did not come to {place}; start the command on all of them") from error
        raise
    except RuntimeError as error:
        if NO_INTERFACE not in str(error):
            raise
        name = INTERFACES[0]
        raise UserError(
            f"{name} is {os.environ.get(name)} and this machine has {', '.join(interfaces())}; name one of these that "
            "has an address, or unset it"
        ) from error


def interfaces() -> list[str]:
    """The names of this machine's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


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


def leave(code: int) -> NoReturn:
    """End this process with `code`; one that belongs to a group, without taking its interpreter down first.

    gloo's threads let go of the tensors of a collective a little later, and need the interpreter for it: where that is
    being taken down meanwhile, the process ends by SIGABRT ("terminate called without an active exception").
    """
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)
