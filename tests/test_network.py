"""What the toolkit says to the network: nothing that it was not told to; and what a container image takes along."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, environment

from llmops import LIBRARY_DEFAULTS
from llmops.console import UserError
from llmops.machine import process_group
from train.training_log import ConsoleServer, TensorBoardServer

ENTRIES = sorted(
    path
    for folder in ("train", "faq", "eval")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.name != "launch.py"  # it opens no model
)


def bare_environment() -> dict[str, str]:
    """A user's environment that says nothing about the libraries."""
    return {name: value for name, value in environment().items() if name not in LIBRARY_DEFAULTS}


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.name)
def test_every_command_is_offline_by_itself(path: Path) -> None:
    """Before a library is imported that reads these variables, started as a .py by a user."""
    script = (
        "import os, runpy, sys\n"
        f"sys.argv = [{str(path)!r}, '--help']\n"
        f"runpy.run_path({str(path)!r}, run_name='imported')\n"
        "import huggingface_hub.constants as hub\n"
        "print(hub.HF_HUB_OFFLINE, hub.HF_HUB_DISABLE_TELEMETRY, os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=bare_environment() | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "True True 1", done.stderr[-2000:]


def test_the_environment_wins() -> None:
    script = "import llmops, os; print(os.environ['HF_HUB_OFFLINE'])"
    given = bare_environment() | {"HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=given, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"


class Hub(BaseHTTPRequestHandler):
    """Notes what it is asked for."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.requestline)
        self.send_error(404)

    do_HEAD = do_GET  # noqa: N815
    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def test_a_command_asks_the_hub_for_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """A model by a relative path looks like a name on the hub to the libraries."""
    questions = ROOT / "faq" / "demo_data" / "faq.jsonl"
    (tmp_path / "models").symlink_to(checkpoints["llama"].parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
        done = subprocess.run(
            [sys.executable, str(ROOT / "faq" / "prepare.py"), "--data_file", str(questions), "--output_dir",
             str(tmp_path / "out"), "--model_name_or_path", "models/llama"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
            env=bare_environment() | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)},
        )  # fmt: skip
        hub.shutdown()
    assert done.returncode == 0, done.stderr
    assert Hub.asked == []


def test_processes_of_one_machine_meet_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in process_group.INTERFACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "no.such.name.invalid")
    assert process_group.init_method() is None
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    for address in ("127.0.0.1", "localhost", "::1"):
        monkeypatch.setenv("MASTER_ADDR", address)
        assert process_group.init_method() == "loopback://"
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert process_group.init_method() is None
    for name in process_group.INTERFACES:
        monkeypatch.delenv(name)


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(
            UserError, match=r"port \d+, where the processes meet, is taken; choose another --master_port"
        ):
            process_group.listen(taken.getsockname()[1])


MEETING = """
import torch.distributed as dist
from llmops.console import run_main
from llmops.machine import process_group
from llmops.machine.peers import Peers
def body():
    with process_group.meeting():
        dist.init_process_group("gloo", init_method=process_group.init_method())
    with Peers("all is kept") as peers:
        peers.begin()
        dist.barrier()
    print("met")
    return 0
process_group.leave(run_main(body))
"""


def test_an_interface_that_is_not_here_is_one_sentence() -> None:
    """A cluster's profile sets it for every machine."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", MEETING], cwd=ROOT, capture_output=True, text=True, check=False,
        env=bare_environment() | variables | {"GLOO_SOCKET_IFNAME": "eth77"},
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: GLOO_SOCKET_IFNAME is eth77 and this machine has .*\blo\b.*; name one.*\n", done.stderr
    )


def test_machines_meet_over_ipv6(tmp_path: Path) -> None:
    """Two processes that take each other for other machines, in a network that has the one address."""
    network = "ip link set lo up && ip addr add fd00::1/128 dev lo nodad"
    if subprocess.run(["unshare", "--net", "bash", "-c", network], capture_output=True, check=False).returncode:
        pytest.skip("needs a network namespace of its own, which root may have, and IPv6")
    (tmp_path / "meeting.py").write_text(MEETING, encoding="utf-8")
    variables = {
        "WORLD_SIZE": "2", "CROSS_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "fd00::1", "MASTER_PORT": "29500",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    start = f"{sys.executable} {tmp_path}/meeting.py"
    done = subprocess.run(
        ["unshare", "--net", "bash", "-c", f"{network}; RANK=1 {start} & RANK=0 {start}; wait $!"],
        env=bare_environment() | variables, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "met\nmet\n"), done.stderr


@pytest.mark.parametrize("grouped", [True, False])
def test_a_process_leaves_with_its_code_and_nothing_unsaid(grouped: bool) -> None:
    group = "dist.init_process_group('gloo', init_method='loopback://', rank=0, world_size=1)" if grouped else ""
    code = f"""
import atexit, os
import torch.distributed as dist
from llmops.machine import process_group
os.environ |= {{"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}}
process_group.register()
{group}
atexit.register(print, "the last word")
print("said", dist.is_initialized())
process_group.leave(7)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=bare_environment()
    )
    assert (done.returncode, done.stdout) == (7, f"said {grouped}\nthe last word\n"), done.stderr


def test_an_address_that_tensorboard_cannot_use_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = process_group.free_port()
    for host, phrase in (
        ("no such host", "--tensorboard_host no such host is no address"),
        ("192.0.2.1", f"192.0.2.1:{port} cannot be used"),
    ):
        with TensorBoardServer(tmp_path, host, port, True) as server:
            assert server.process is None
        assert phrase in capsys.readouterr().err


def test_the_console_lives_as_long_as_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    port = process_group.free_port()
    with ConsoleServer(tmp_path, "127.0.0.1", port, True) as server:
        assert server.process is not None
        end = time.monotonic() + 20
        while "?token=" not in (said := capfd.readouterr().err):
            assert time.monotonic() < end
            time.sleep(0.05)
        address = re.search(r"http://\S+\?token=\S+", said)
        assert address is not None
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        assert b"LLMOps" in opener.open(address[0]).read()
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "torch" not in maps
    assert server.process.returncode is not None
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with ConsoleServer(tmp_path, "127.0.0.1", port, True) as server:
            assert server.process is None
        assert f"port {port} is taken, the console is not served" in capfd.readouterr().err


def pattern(text: str) -> re.Pattern[str]:
    """A line of .dockerignore as Docker reads it: from the root, ** for any folders, what lies below is meant too."""
    parts = (
        {"**/": r"(?:.*/)?", "**": ".*", "*": "[^/]*"}.get(part, re.escape(part))
        for part in re.split(r"(\*\*/?|\*)", text)
    )
    return re.compile(f"{''.join(parts)}(?:/.*)?")


LINES = [
    line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and line[0] not in "# "
]


def fits(name: str) -> bool:
    """Whether a file or folder gets into the image by its own name; the last line that fits decides."""
    taken = True
    for line in LINES:
        if pattern(line.lstrip("!")).fullmatch(name):
            taken = line.startswith("!")
    return taken


def is_taken(name: str) -> bool:
    """Whether a file gets into the image, also with builders that look only into folders that a line names."""
    folders = [str(folder) for folder in Path(name).parents][:-1]
    seen = all(fits(folder) or any(line.startswith(f"!{folder}/") for line in LINES) for folder in folders)
    return seen and fits(name)


def test_the_image_takes_the_program_and_nothing_else() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    for name in tracked:
        wanted = name.split("/")[0] in folders or name in ("chat_main.sh", "requirements.txt", "LICENSE")
        assert is_taken(name) or not wanted, f"{name} is needed and not named in .dockerignore"
    marks = [Path(name).parent for name in tracked if name.endswith("__init__.py") and not name.startswith("tests/")]
    code = [".".join(folder.parts) for folder in marks]
    assert sorted(code) == sorted(project["tool"]["setuptools"]["packages"])
    others = (
        "mnt/base/model.safetensors", "key.pem", "train/.env", "train/model.safetensors", ".git/config",
        "mnt_demo/a.json", "llmops/__pycache__/a.pyc", "eval/private.csv", "requirements-dev.txt",
    )  # fmt: skip
    assert [name for name in others if is_taken(name)] == []
