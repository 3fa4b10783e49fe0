"""The processes of one machine: started, told of signals, waited for. Imports nothing heavy.

Started as `llmops/launcher/machine.sh` over ssh, this machine is led by the launcher on another: it says that it is
ready on stdout, reads the plan as a line of JSON on stdin, and ends its processes when another line comes or stdin
ends.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import TYPE_CHECKING

from llmops.console import UserError, has_gpu, log, run_main
from llmops.machine.devices import VISIBLE, of_slots

if TYPE_CHECKING:
    from psutil import Process

READY = "llmops-ready "  # begins the line that says so: what a login shell prints before is no answer
PACKAGES = ("torch", "transformers", "deepspeed", "peft")
GRACE = 30  # seconds to end in when another process of the machine has failed


@dataclass(frozen=True)
class Plan:
    """What a machine must know of a run.

    `machines`: GPUs by machine, as CUDA_VISIBLE_DEVICES takes them; on CPUs their number counts. `command`: a Python
    script with its arguments, the same for every process. `folder`: where it works. `on_cpu`: although there are GPUs.
    `variables`: of the launcher's environment, for other machines.
    """

    machines: dict[str, list[str]]
    address: str
    port: int
    command: list[str]
    folder: str
    on_cpu: bool = False
    variables: dict[str, str] = field(default_factory=dict)

    def to_line(self, number: int) -> bytes:
        """This plan for machine `number` as one line."""
        return json.dumps(asdict(self) | {"number": number}).encode() + b"\n"


class Machine:
    """The processes of machine `number` of a plan."""

    def __init__(self, plan: Plan, number: int) -> None:
        self.plan, self.number = plan, number
        self.name = list(plan.machines)[number]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.received = 0  # the signal that asked for the end

    def start(self) -> None:
        """Start a process for each device."""
        plan, sizes = self.plan, [len(devices) for devices in self.plan.machines.values()]
        devices = plan.machines[self.name]
        shared = os.environ | plan.variables | {
            "MASTER_ADDR": plan.address, "MASTER_PORT": str(plan.port), "WORLD_SIZE": str(sum(sizes)),
            "LOCAL_SIZE": str(len(devices)), "CROSS_RANK": str(self.number), "CROSS_SIZE": str(len(sizes)),
            "LLMOPS_MACHINE": self.name, "LLMOPS_LAUNCHER_PID": str(os.getpid()),
            "LLMOPS_LAUNCHER_HOST": socket.gethostname(), VISIBLE: ",".join(devices),
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # not of names
        }  # fmt: skip
        if plan.on_cpu:
            shared |= {VISIBLE: "-1", "DS_ACCELERATOR": "cpu"}
        for local in range(len(devices)):
            if self.received:
                return
            mine = {"RANK": str(sum(sizes[: self.number]) + local), "LOCAL_RANK": str(local)}
            process = subprocess.Popen(
                [sys.executable, "-u", *plan.command], env=shared | mine, cwd=plan.folder, stdin=subprocess.DEVNULL
            )
            self.processes.append(process)
            if self.received:  # while it was started
                process.terminate()

    def ask_to_end(self, number: int, frame: FrameType | None = None) -> None:
        """Hand a signal on to the processes, which save a checkpoint or what they have."""
        self.received = number
        for process in self.processes:
            process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for the end: 0, or the exit code of the process that failed first, after the others were ended."""
        running = dict(enumerate(self.processes))
        while running:
            for local, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[local]
                if code:
                    end(list(running.values()))
                    return self._exit_code(local, code)
            time.sleep(0.1)
        return 128 + self.received if self.received and not self.processes else 0

    def _exit_code(self, local: int, code: int) -> int:
        if self.received and not 0 < code < 128:  # else it did not end in good order: its checkpoint found a full disk
            return 128 + self.received
        if code > 0:
            return code
        reason = "; the kernel does that when memory runs out" if code == -signal.SIGKILL else ""
        log(f"stopped: process {local} of {self.name} was ended by {signal.Signals(-code).name}{reason}")
        return 1


def end(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """End processes whose run has failed: SIGTERM, and what is then left of them and below them SIGKILL."""
    from psutil import NoSuchProcess

    below = [child for process in processes for child in children(process.pid)]
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for child in below:
        with suppress(NoSuchProcess):
            child.kill()


def children(pid: int) -> list["Process"]:
    """The processes below one."""
    from psutil import NoSuchProcess, Process

    try:
        return Process(pid).children(recursive=True)
    except NoSuchProcess:
        return []


def versions() -> dict[str, str]:
    """What must be the same on all machines."""
    found = {"Python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def main() -> int:
    """Be one of the machines of a launcher that has come over ssh."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    addresses = {"client": connection[0], "server": connection[2]} if len(connection) == 4 else {}
    print(READY + json.dumps(addresses | {"versions": versions()}), flush=True)
    line = sys.stdin.readline()
    if not line:
        return 0  # another machine was not ready
    plan = json.loads(line)
    number = plan.pop("number")
    name, variables = list(plan["machines"])[number], os.environ | plan["variables"]
    if has_gpu() and not plan["on_cpu"]:
        plan["machines"][name] = of_slots(variables, plan["machines"][name])
    machine = Machine(Plan(**plan), number)
    if not os.path.isdir(machine.plan.folder):
        raise UserError(f"{machine.plan.folder}, where the command was started, is not here; start it elsewhere")
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, machine.ask_to_end)

    def listen() -> None:
        for _ in sys.stdin:
            machine.ask_to_end(signal.SIGTERM)
        if not machine.received:  # the launcher is gone
            machine.ask_to_end(signal.SIGTERM)

    machine.start()
    threading.Thread(target=listen, daemon=True).start()
    return machine.wait()


if __name__ == "__main__":
    code = run_main(main)
    sys.stdout.flush()
    os._exit(code)  # a thread still reads stdin
