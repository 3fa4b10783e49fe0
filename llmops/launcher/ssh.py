"""A run over several machines, led from one of them over ssh: all are asked first, then all begin, and all end.

A connection per machine. The plan goes through its stdin, so no setting is seen by a shell or in a list of processes;
a machine whose connection ends ends its processes. Nothing is killed by name.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty, Queue
from types import FrameType
from typing import Any, BinaryIO

from llmops import files
from llmops.console import UserError, log
from llmops.launcher.machine import READY, Plan, versions
from llmops.machine.process_group import is_loopback
from llmops.machine.processes import die_with_parent
from llmops.translation import LANGUAGE_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=10", "ServerAliveCountMax=4")
TO_ANSWER = 60  # seconds for a machine to say that it is ready
TO_END = 15  # seconds for the others when one has ended in failure: they hear of it, unless they still wait for it
TO_NOTICE = 45  # and when the connection to one broke: they find that out within llmops.machine.peers.SILENCE
LAST = 15  # seconds from there until what still runs is left
SSH_FAILED, NO_PROJECT, NO_PYTHON = 255, 101, 102
EXPORTED = (
    "NCCL_", "UCX_", "GLOO_", "TORCH_", "PYTORCH_", "PYTHON", "HF_", "MLFLOW_", "SWANLAB_", "TRACKIO_", "WANDB_",
)  # fmt: skip
MORE_VARIABLES = ".deepspeed_env"  # NAME=value a line, in the home or the current folder


class Remote:
    """The connection to one machine; `said` are the last lines of its stderr."""

    def __init__(self, name: str, prefix: str) -> None:
        self.name, self.prefix = name, prefix
        self.begun = False  # from here on its messages are shown
        self.answer: dict[str, Any] = {}  # what it says of itself
        self.said: list[str] = []
        self.ready: Queue[dict[str, Any]] = Queue()
        inner = f"cd {shlex.quote(str(ROOT))} 2>/dev/null && [ -f llmops/launcher/machine.sh ] || exit {NO_PROJECT}; "
        inner += f"exec bash llmops/launcher/machine.sh {shlex.quote(sys.executable)}"
        options = [part for option in OPTIONS for part in ("-o", option)]
        command = ["ssh", *options, name, f"sh -c {shlex.quote(inner)}"]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the launcher, which tells the machines
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )  # fmt: skip
        except FileNotFoundError as error:
            raise UserError("ssh is not installed here; install an ssh client, or start with --no_ssh true") from error
        assert self.process.stdin
        assert self.process.stdout
        assert self.process.stderr
        self.stdin = self.process.stdin
        self.readers = [
            threading.Thread(target=self._read_stdout, args=(self.process.stdout,), daemon=True),
            threading.Thread(target=self._read_stderr, args=(self.process.stderr,), daemon=True),
        ]
        for reader in self.readers:
            reader.start()

    def _read_stdout(self, stream: BinaryIO) -> None:
        begun = False
        for line in stream:
            if begun:
                os.write(1, line)
            elif line.startswith(READY.encode()):
                begun = True
                self.ready.put(json.loads(line[len(READY) :]))
        self.ready.put({})  # it has ended

    def _read_stderr(self, stream: BinaryIO) -> None:
        for line in stream:
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            self.said = [*self.said[-9:], text]
            if self.begun:
                named = not text or text.startswith(self.prefix)  # messages of the log begin with the machine
                log(text if named else self.prefix + text)

    def send(self, line: bytes) -> None:
        """Tell the machine; one that is gone hears nothing."""
        with suppress(BrokenPipeError):
            self.stdin.write(line)
            self.stdin.flush()

    def problem(self, deadline: float) -> str | None:
        """Why this machine cannot take part, or None."""
        try:
            self.answer = self.ready.get(timeout=max(0.1, deadline - time.monotonic()))
        except Empty:
            return f"{self.name} did not say within {TO_ANSWER} s that it is ready"
        if self.answer:
            own, its = versions(), self.answer["versions"]
            other = [f"{name} {its[name]} ({own[name]} here)" for name in own if its.get(name) != own[name]]
            return f"{self.name} has {', '.join(other)}; all machines need the same packages" if other else None
        code = self.process.wait()
        self.readers[1].join(5)
        last = next((text for text in reversed(self.said) if text.strip()), f"exit code {code}")
        if code == SSH_FAILED:
            return f"{self.name} cannot be reached over ssh ({last}); 'ssh {self.name} true' must work and ask nothing"
        if code == NO_PROJECT:
            return f"{self.name} has no {ROOT}; the project must be under the same path on all machines"
        if code == NO_PYTHON:
            return f"{self.name} has no {sys.executable}; the Python environment must be under the same path, too"
        return f"{self.name} is not ready ({last})"

    def leave(self) -> None:
        """Close the connection, which ends what runs there."""
        with suppress(BrokenPipeError):
            self.stdin.close()


class Led:
    """All machines of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.received = 0
        self.machines: list[Remote] = []

    def ask_to_end(self, number: int, frame: FrameType | None = None) -> None:
        """Hand a signal on to every machine; before they have begun, end by it."""
        if not all(machine.begun for machine in self.machines) or not self.machines:
            sys.exit(128 + number)
        self.received = number
        for machine in self.machines:
            machine.send(b"end\n")

    def run(self) -> int:
        """Ask all machines, let all begin, wait; the exit code. Raises UserError where one is not ready."""
        try:
            self._begin()
            return self._wait()
        finally:
            for machine in self.machines:
                machine.leave()
                machine.process.kill()

    def _begin(self) -> None:
        names = list(self.plan.machines)
        for number, name in enumerate(names):
            self.machines.append(Remote(name, f"{name}: " if number else ""))
        deadline = time.monotonic() + TO_ANSWER
        problems = [problem for machine in self.machines if (problem := machine.problem(deadline))]
        if problems:
            more = " and more" if len(problems) > 3 else ""
            raise UserError("; ".join(problems[:3]) + more)
        variables = exported(self.plan.folder) | {LANGUAGE_VARIABLE: "en"}  # what they say goes through the log here
        plan = replace(self.plan, address=self.plan.address or self._address(), variables=variables)
        ready = f"{len(names)} machines are ready" if len(names) > 1 else "ready"
        log(f"{ready}: {', '.join(names)}; they meet at {plan.address}:{plan.port}")
        for number, machine in enumerate(self.machines):
            machine.begun = True
            machine.send(plan.to_line(number))

    def _address(self) -> str:
        """Where the first machine is reached by the others: as we reach it, or as they reach us where that is here."""
        first, *others = (machine.answer for machine in self.machines)
        found = [first.get("server", ""), *(other.get("client", "") for other in others)]
        usable = [address for address in found if address and not is_loopback(address)]
        if others and not usable:
            raise UserError("no address of the first machine is known that the others reach; give its --master_addr")
        return usable[0] if usable else "127.0.0.1"

    def _wait(self) -> int:
        codes: dict[str, int] = {}
        due = told = 0.0
        while len(codes) < len(self.machines):
            for machine in self.machines:
                code = machine.process.poll()
                if machine.name not in codes and code is not None:
                    codes[machine.name] = code
                    if code and not due:
                        due = time.monotonic() + (TO_NOTICE if code == SSH_FAILED else TO_END)
            if due and time.monotonic() > due and not told:
                told = time.monotonic()
                for machine in self.machines:
                    machine.leave()
            if told and time.monotonic() - told > LAST:
                for machine in self.machines:
                    machine.process.kill()
            time.sleep(0.1)
        for machine in self.machines:
            for reader in machine.readers:
                reader.join(5)
        return self._exit_code(codes)

    def _exit_code(self, codes: dict[str, int]) -> int:
        """The command's, by those of the connections."""
        bad = [code for code in codes.values() if code]
        if not bad:
            return 0
        if self.received:  # an end that is not in good order keeps its code, as on one machine
            return next((code for code in bad if 0 < code < 128), 128 + self.received)
        lost = [name for name, code in codes.items() if code in (SSH_FAILED, -signal.SIGKILL)]
        if lost:
            log(f"the connection to {', '.join(lost)} broke")
        ends = [code for code in bad if 0 < code < SSH_FAILED]
        return ends[0] if ends else 1


def exported(folder: str) -> dict[str, str]:
    """The variables that other machines get as well. Raises UserError for a line of .deepspeed_env that sets none."""
    found = {name: value for name, value in os.environ.items() if name.startswith(EXPORTED)}
    for place in (Path(os.path.expanduser("~")), Path(folder)):  # also where there is no home
        path = place / MORE_VARIABLES
        for number, line in enumerate(files.read_text(path).splitlines() if files.is_file(path) else [], 1):
            name, equals, value = line.strip().partition("=")
            if name and not name.startswith("#"):
                if not equals:
                    raise UserError(f"{path}:{number}: found {files.shown(line)}; expected NAME=value")
                found[name.strip()] = value.strip().strip('"')
    return found
