"""Start a command in several processes that work together: on this machine, or on the machines of a hostfile.

python llmops/launcher/launch.py [settings] SCRIPT ARGUMENTS...
Signals are passed on to the processes, and the exit code is that of the first that fails; 128 + signal after a signal.
"""

import argparse
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llmops.console import Parser, UserError, has_gpu, log, run_main
from llmops.launcher.hosts import choose, read_hostfile
from llmops.launcher.machine import Machine, Plan
from llmops.launcher.ssh import Led
from llmops.machine import devices
from llmops.machine.process_group import LOOPBACK, free_port, is_loopback
from llmops.machine.processes import to_heed

PORT = 29500  # where machines meet


def build_parser() -> argparse.ArgumentParser:
    """Every setting; the names are those of the shell commands, which say more."""
    parser = Parser(prog="launch.py", description="Start a command in several processes.", allow_abbrev=False)
    add = parser.add_argument
    add("--num_processes", type=int, default=0, help="on each machine; 0: one per GPU or slot, or one")
    add("--on_cpu", action="store_true", help="although there are GPUs")
    add("--hostfile", default="", help="lines like 'worker-1 slots=8'")
    add("--include_hosts", default="", help="of the hostfile: NAME[:SLOT,SLOT][@NAME...]")
    add("--exclude_hosts", default="", help="not these, in the same form")
    add("--master_addr", default="", help="address of the first machine")
    add("--master_port", type=int, default=0, help="its port")
    add("--no_ssh", action="store_true", help="this is one of the machines, the others are started by hand, too")
    add("--node_rank", type=int, default=0, help="which of them, from 0")
    add("--check", action="store_true", help="look at the settings only")
    add("--alone", action="store_true", help="one process, here, which hears how many there would be: for a dry run")
    add("command", nargs=argparse.REMAINDER)
    return parser


def machines_of(given: argparse.Namespace) -> dict[str, list[str]]:
    """The slots of the machines that take part. Raises UserError for settings that do not fit."""
    chosen = choose(read_hostfile(Path(given.hostfile)), given.include_hosts, given.exclude_hosts)
    short = [name for name, slots in chosen.items() if len(slots) < given.num_processes]
    if short:
        raise UserError(
            f"--num_processes is {given.num_processes} and {short[0]} takes part with {len(chosen[short[0]])}; "
            "give it more slots in the hostfile"
        )
    if given.no_ssh and given.node_rank >= len(chosen):
        raise UserError(f"--node_rank is {given.node_rank} and {len(chosen)} machines take part, from 0")
    return {name: slots[: given.num_processes or None] for name, slots in chosen.items()}


def meeting_address(given: argparse.Namespace, machines: dict[str, list[str]]) -> str:
    """Where machines that are started by hand meet: --master_addr, or the first one's name. Raises UserError for one
    that cannot be reached from elsewhere."""
    if len(machines) == 1:
        return given.master_addr or LOOPBACK
    address = given.master_addr or next(iter(machines))
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise UserError(f"{address} has no address here ({error}); give the first machine's: --master_addr") from error
    if is_loopback(str(found)) and given.node_rank == 0 and not is_loopback(given.master_addr):
        raise UserError(
            f"{address} is {found} on this machine, where no other reaches it; give its address in your network: "
            "--master_addr"
        )
    return address


def be_alone(machines: dict[str, list[str]], command: list[str]) -> NoReturn:
    """Become the command, which hears how many processes there would be, and how many on the fullest machine."""
    sizes = [len(devices) for devices in machines.values()]
    os.environ.update(WORLD_SIZE=str(sum(sizes)), LOCAL_SIZE=str(max(sizes)))
    os.execv(sys.executable, [sys.executable, *command])


def run(given: argparse.Namespace) -> int:
    """Start and wait."""
    machines = machines_of(given) if given.hostfile else {}
    for name in ("include_hosts", "exclude_hosts"):
        if getattr(given, name) and not given.hostfile:
            raise UserError(f"--{name} chooses machines of a --hostfile; on one, CUDA_VISIBLE_DEVICES chooses GPUs")
    if given.check:
        return 0
    folder, command = os.getcwd(), given.command
    if given.hostfile and given.alone:
        be_alone(machines, command)
    if given.hostfile and not given.no_ssh:
        chosen = os.environ.get(devices.VISIBLE, "")
        if chosen and not given.on_cpu:
            name = devices.VISIBLE
            log(f"warning: {name} ({chosen}) chooses nothing on the machines of a hostfile; --include_hosts does")
        led = Led(Plan(machines, given.master_addr, given.master_port or PORT, command, folder, given.on_cpu))
        passing_on(led.ask_to_end)
        return led.run()
    devices.check_gpu()
    number = 0
    if given.hostfile:
        number, address, port = given.node_rank, meeting_address(given, machines), given.master_port or PORT
        if has_gpu() and not given.on_cpu:
            name = list(machines)[number]
            machines[name] = devices.of_slots(os.environ, machines[name])
        if len(machines) > 1:
            log(f"machine {number} of {len(machines)}; they meet at {address}:{port}, and each waits for the others")
    else:
        on_gpus = has_gpu() and not given.on_cpu
        found = devices.of_processes(os.environ, given.num_processes) if on_gpus else range(given.num_processes or 1)
        machines = {"this machine": [str(device) for device in found]}
        if given.alone:
            be_alone(machines, command)
        address, port = LOOPBACK, given.master_port or free_port()  # several runs on one machine
    machine = Machine(Plan(machines, address, port, command, folder, given.on_cpu), number)
    passing_on(machine.ask_to_end)
    machine.start()
    return machine.wait()


def passing_on(ask: Callable[[int, FrameType | None], None]) -> None:
    """Hand SIGTERM, SIGINT and SIGHUP on."""
    for number in to_heed():
        signal.signal(number, ask)


def main() -> int:
    """Run this program's arguments."""
    return run_main(lambda: run(build_parser().parse_args()))


if __name__ == "__main__":
    sys.exit(main())
