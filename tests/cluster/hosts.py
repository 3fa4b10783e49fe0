"""Machines for tests, made of Linux namespaces: each has its own network, name, processes, /etc/hosts and sshd.

They share the file system, and a bridge connects them. All of it lives as long as the processes that hold the
namespaces: nothing of this machine is changed, and when those are gone, so are links, mounts and all processes inside.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil
from conftest import ROOT, environment

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or ""
SUBNET = "10.77.0"
TOOLS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "mount")
HOLD = Path(__file__).with_name("host.sh")
LINK = Path(__file__).with_name("bad_link.py")


def why_not() -> str:
    """Why no such machines can be made here; empty where they can."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    missing = [tool for tool in TOOLS if not shutil.which(tool)] + ([] if SSHD else ["sshd"])
    if missing:
        return f"{', '.join(missing)} not installed (Debian: openssh-server, openssh-client, iproute2)"
    kinds = ["--net", "--uts", "--mount", "--pid", "--fork"]
    bridge = "mount -t tmpfs none /mnt && ip link add br0 type bridge && ip link add veth0 type veth peer name veth1"
    tried = subprocess.run(["unshare", *kinds, "sh", "-c", bridge], capture_output=True, text=True, check=False)
    return f"namespaces, bridges or veth are not allowed here ({tried.stderr.strip()})" if tried.returncode else ""


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait; AssertionError says what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.05)


def own_network(pid: int) -> bool:
    """Whether a process has a network of its own already."""
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def checked(*command: str) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


class Running:
    """A command on a host, with what it says in a file."""

    def __init__(self, process: subprocess.Popen[bytes], said: Path) -> None:
        self.process, self.said = process, said

    @property
    def stderr(self) -> str:
        """What it has said until now."""
        return self.said.read_text(encoding="utf-8", errors="replace")

    @property
    def stdout(self) -> str:
        """What it has printed."""
        return self.said.with_suffix(".out").read_text(encoding="utf-8")

    def signal(self, number: int) -> None:
        """Send a signal to the command itself, which nsenter has started."""
        psutil.Process(self.process.pid).children()[0].send_signal(number)

    def wait(self, seconds: float = 120) -> int:
        """Its exit code."""
        return self.process.wait(seconds)


class Host:
    """One machine: `worker-N` at SUBNET.N."""

    def __init__(self, number: int, folder: Path, switch: int, stack: ExitStack) -> None:
        self.number, self.folder, self.switch, self.stack = number, folder, switch, stack
        self.name, self.address, self.port = f"worker-{number}", f"{SUBNET}.{number}", f"port{number}"
        self.pid = 0

    def begin(self) -> None:
        """Make the namespaces, plug the cable in, start sshd."""
        kinds = ("--net", "--uts", "--pid", "--mount", "--fork", "--kill-child")
        holder = subprocess.Popen(
            ["unshare", *kinds, "bash", str(HOLD), self.name, str(self.folder), SSHD], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=open(self.folder / f"{self.name}.sshd", "ab"),  # noqa: SIM115
        )  # fmt: skip
        self.stack.callback(end, holder)
        wait_until(psutil.Process(holder.pid).children, f"{self.name}'s first process")
        self.pid = psutil.Process(holder.pid).children()[0].pid
        self.stack.callback(end_by_pid, self.pid, holder)
        wait_until(lambda: own_network(self.pid), "its network")
        checked("nsenter", "-t", str(self.switch), "-n", "ip", "link", "add", self.port, "type", "veth", "peer", "name",
                "eth0", "netns", str(self.pid))  # fmt: skip
        self.on_switch("ip", "link", "set", self.port, "master", "br0", "up")
        for command in (
            ["link", "set", "lo", "up"], ["addr", "add", f"{self.address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
        ):  # fmt: skip
            self.inside("ip", *command)
        assert holder.stdin is not None
        holder.stdin.write(b"the network is there\n")
        holder.stdin.close()
        ready = self.folder / f"{self.name}.ready"
        wait_until(ready.exists, f"{self.name}'s sshd")
        ready.unlink()

    def enter(self) -> list[str]:
        """What runs a command inside."""
        return ["nsenter", "-t", str(self.pid), "--net", "--uts", "--pid", "--mount"]

    def inside(self, *command: str) -> None:
        """Run a command inside that must succeed."""
        checked(*self.enter(), *command)

    def on_switch(self, *command: str) -> None:
        """Run a command where the bridge is."""
        checked("nsenter", "-t", str(self.switch), "-n", *command)

    def start(self, said: Path, command: Sequence[str], **variables: str) -> Running:
        """Start a command inside, in the project's folder."""
        moved = ["sh", "-c", f'cd "{ROOT}" && exec "$@"', "sh"]
        with open(said, "wb") as errors, open(said.with_suffix(".out"), "wb") as answers:
            process = subprocess.Popen(
                [*self.enter(), "--", *moved, *command], env=environment() | variables, stdin=subprocess.DEVNULL,
                stdout=answers, stderr=errors,
            )  # fmt: skip
        self.stack.callback(end, process)
        return Running(process, said)

    def die(self) -> None:
        """Pull the cable, so that no word gets out, then end every process at once."""
        self.on_switch("ip", "link", "delete", self.port)
        os.kill(self.pid, signal.SIGKILL)  # the first process of the namespace: the kernel ends the others

    def running(self, word: str) -> list[psutil.Process]:
        """The processes on this host that have a word in their command line."""
        place, found = os.readlink(f"/proc/{self.pid}/ns/pid"), []
        for process in psutil.process_iter():
            try:
                here = os.readlink(f"/proc/{process.pid}/ns/pid") == place
                if here and any(word in part for part in process.cmdline()):
                    found.append(process)
            except (OSError, psutil.Error):  # it ended meanwhile
                continue
        return found

    def worsen(self, delay: float, loss: float) -> "BadLink":
        """Put a link in the way that delays each frame by `delay` seconds and drops the share `loss` of them."""
        return BadLink(self, delay, loss)


class BadLink:
    """A slow, lossy cable: two TAP devices and a program that hands frames from one to the other, or does not."""

    def __init__(self, host: Host, delay: float, loss: float) -> None:
        self.host = host
        arguments = [str(host.pid), "eth1", str(host.switch), f"tap{host.number}", str(delay), str(loss)]
        self.process = subprocess.Popen(
            [sys.executable, str(LINK), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        host.stack.callback(end, self.process)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        host.on_switch("ip", "link", "set", host.port, "down")
        hardware = subprocess.run(
            [*host.enter(), "cat", "/sys/class/net/eth0/address"], capture_output=True, text=True, check=False
        ).stdout.strip()
        for command in (
            ["addr", "flush", "dev", "eth0"], ["link", "set", "eth0", "down"],
            *([["link", "set", "eth1", "address", hardware]] if hardware else []),
            ["addr", "add", f"{host.address}/24", "dev", "eth1"], ["link", "set", "eth1", "up"],
        ):  # fmt: skip
            host.inside("ip", *command)
        host.on_switch("ip", "link", "set", f"tap{host.number}", "master", "br0", "up")

    def repair(self) -> tuple[int, int]:
        """Plug the good cable in again; how many frames there were, and how many of them were dropped."""
        said, _ = self.process.communicate()  # its stdin ends, and with it the link
        host = self.host
        host.inside("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
        host.inside("ip", "link", "set", "eth0", "up")
        host.on_switch("ip", "link", "set", host.port, "up")
        frames, dropped = said.split()
        return int(frames), int(dropped)


def end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """End a process of ours, whatever it does."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()


def end_by_pid(pid: int, holder: subprocess.Popen[bytes]) -> None:
    """End a host by its first process, for which `holder` then waits."""
    if holder.poll() is None:
        os.kill(pid, signal.SIGKILL)
        holder.wait()


def build(folder: Path, count: int, stack: ExitStack) -> list[Host]:
    """`count` hosts that know each other by name and by key."""
    for key in ("host_key", "user_key"):
        checked("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    names = [f"worker-{number}" for number in range(1, count + 1)]
    public = (folder / "host_key.pub").read_text(encoding="utf-8")
    (folder / "known_hosts").write_text(f"{','.join(names)} {public}", encoding="utf-8")
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    for name in names:  # as Debian's installer writes it: a machine's own name is on the loopback interface
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}"]
        lines += [f"{SUBNET}.{number} {other}" for number, other in enumerate(names, 1) if other != name]
        (folder / f"{name}.hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "ssh_config").write_text(
        f"Host *\nIdentityFile {folder}/user_key\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known_hosts\n"
        "GlobalKnownHostsFile /dev/null\nCheckHostIP no\n",
        encoding="utf-8",
    )
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nPidFile none\n"
        "UsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
        "UseDNS no\nSetEnv OMP_NUM_THREADS=1\n",
        encoding="utf-8",
    )
    switch = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    stack.callback(end, switch)
    wait_until(lambda: own_network(switch.pid), "the switch's network")
    checked("nsenter", "-t", str(switch.pid), "-n", "ip", "link", "add", "br0", "type", "bridge")
    checked("nsenter", "-t", str(switch.pid), "-n", "ip", "link", "set", "br0", "up")
    hosts = [Host(number, folder, switch.pid, stack) for number in range(1, count + 1)]
    for host in hosts:
        host.begin()
    return hosts
