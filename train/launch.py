"""DeepSpeed's launcher with signals passed on to the training processes.

The launcher on its own dies at SIGTERM and leaves its children behind (as a container's first process it ignores the
signal altogether). Here the training processes get it, save a checkpoint, and their exit code becomes the launcher's.
"""

import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

import psutil
from deepspeed.launcher import runner


def training_processes() -> list[psutil.Process]:
    """The processes below this one that run finetune.py themselves, not the launcher's own helpers."""
    script = str(Path(__file__).with_name("finetune.py"))
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if script in command and "deepspeed.launcher.launch" not in command:
            found.append(process)
    return found


def pass_on(number: int, frame: FrameType | None) -> None:
    """Hand a signal to the training processes; without any, end by it."""
    processes = training_processes()
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    if not processes:
        sys.exit(128 + number)


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """Run DeepSpeed's launcher on this program's arguments."""
    os.environ["LLMOPS_LAUNCHER_PID"] = str(os.getpid())
    os.environ["LLMOPS_LAUNCHER_HOST"] = socket.gethostname()
    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the training processes as well
    argv = sys.argv[1:]
    if not any(item.startswith(("--master_port", "--hostfile")) for item in argv):
        argv = ["--master_port", str(free_port()), *argv]  # several runs on one machine
    runner.main(argv)


if __name__ == "__main__":
    main()
