"""DeepSpeed's launcher with signals passed on to the training processes.

The launcher on its own dies at SIGTERM and leaves its children behind (as a container's first process it ignores the
signal altogether). Here the training processes get it, save a checkpoint, and their exit code becomes the launcher's.
"""

import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType, SimpleNamespace

import psutil
from deepspeed.launcher import runner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmops import devices
from llmops.console import run_main
from llmops.process_group import free_port
from train.run_folder import STOP_NAME


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


class Signals:
    """Passes SIGTERM and SIGINT on and remembers which one came."""

    def __init__(self, argv: list[str]) -> None:
        self.received = 0
        over_ssh = "--hostfile" in argv and "--no_ssh" not in argv
        # training on other machines is out of a signal's reach; a file on the shared output path is not
        self.stop_file = Path(argv[argv.index("--output_path") + 1], STOP_NAME) if over_ssh else None

    def install(self) -> None:
        """Handle both signals here, and keep DeepSpeed from its own handler, which kills by name on every machine."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.pass_on)
        runner.signal = SimpleNamespace(SIGINT=signal.SIGINT, SIGTERM=signal.SIGTERM, signal=lambda *_: None)

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Hand a signal to the training processes; without any, end by it."""
        self.received = number
        if self.stop_file:
            self.stop_file.touch()
            return
        processes = training_processes()
        for process in processes:
            try:
                process.send_signal(signal.SIGTERM)
            except psutil.NoSuchProcess:
                continue
        if not processes:
            sys.exit(128 + number)


def main() -> int:
    """Run DeepSpeed's launcher on this program's arguments."""
    devices.check_gpu()
    os.environ["LLMOPS_LAUNCHER_PID"] = str(os.getpid())
    os.environ["LLMOPS_LAUNCHER_HOST"] = socket.gethostname()
    argv = sys.argv[1:]
    if not any(item.startswith(("--master_port", "--hostfile")) for item in argv):
        argv = ["--master_port", str(free_port()), *argv]  # several runs on one machine
    argv = devices.for_launcher(os.environ, argv)
    signals = Signals(argv)
    signals.install()
    try:
        runner.main(argv)
    except SystemExit as end:
        if signals.received and end.code:
            sys.exit(128 + signals.received)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
