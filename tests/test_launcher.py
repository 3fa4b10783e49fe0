"""Hostfiles and choices of machines; the processes of one machine: their places, their ends."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from llmops.console import UserError
from llmops.launcher import ssh
from llmops.launcher.hosts import choose, read_hostfile
from llmops.launcher.launch import PORT
from llmops.launcher.machine import READY, Plan

LAUNCH = ROOT / "llmops" / "launcher" / "launch.py"
HOSTS = {"a": 2, "b": 3}


def written(folder: Path, text: str) -> Path:
    """A hostfile."""
    path = folder / "hostfile"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_hostfile(tmp_path: Path) -> None:
    text = "# ours\n\n  worker-1 slots=8\nworker-2.lan\tslots=4 max_slots=8 # half\r\n"
    assert read_hostfile(written(tmp_path, text)) == {"worker-1": 8, "worker-2.lan": 4}


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("", "names no machine; expected lines like 'worker-1 slots=8'"),
        ("# worker-1 slots=8\n", "names no machine"),
        ("worker-1\n", "line 1: found 'worker-1'; expected lines like"),
        ("a slots=1\nb slots=two\n", "line 2: found 'b slots=two'"),
        ("a slots=-1\n", "line 1: found 'a slots=-1'"),
        ("a slots=0\n", "line 1: a has slots=0, expected 1 to 1024"),
        ("a slots=2000\n", "line 1: a has slots=2000, expected 1 to 1024"),
        ("a slots=1\na slots=1\n", "line 2: a has a line already"),
        ("-oProxyCommand=touch slots=1\n", "line 1: '-oProxyCommand=touch' is no name of a machine"),
        ("root@a slots=1\n", "line 1: 'root@a' is no name of a machine"),
    ],
)
def test_a_wrong_hostfile_is_one_sentence(tmp_path: Path, text: str, phrase: str) -> None:
    with pytest.raises(UserError) as error:
        read_hostfile(written(tmp_path, text))
    assert phrase in str(error.value)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("", "", {"a": ["0", "1"], "b": ["0", "1", "2"]}),
        ("b", "", {"b": ["0", "1", "2"]}),
        ("b:2,0@a", "", {"a": ["0", "1"], "b": ["0", "2"]}),
        ("b:0@b:1", "", {"b": ["0", "1"]}),
        ("", "a", {"b": ["0", "1", "2"]}),
        ("", "a:0@b:1,2", {"a": ["1"], "b": ["0"]}),
    ],
)
def test_a_choice_of_machines(include: str, exclude: str, expected: dict[str, list[str]]) -> None:
    """As DeepSpeed's launcher chooses."""
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    assert choose(HOSTS, include, exclude) == expected
    theirs = parse_inclusion_exclusion(HOSTS, include, exclude)
    assert {name: [str(slot) for slot in slots] for name, slots in theirs.items()} == expected


@pytest.mark.parametrize(
    ("include", "exclude", "phrase"),
    [
        ("a", "b", "either --include_hosts or --exclude_hosts"),
        ("c", "", "--include_hosts names 'c'; the hostfile has a, b"),
        ("", "a:2", "'2' is no slot of a, which has 2, from 0"),
        ("a:", "", "'' is no slot of a"),
        ("", "a@b", "leaves no machine of the hostfile (a, b)"),
        ("@", "", "leaves no machine"),
    ],
)
def test_a_wrong_choice_is_one_sentence(include: str, exclude: str, phrase: str) -> None:
    with pytest.raises(UserError) as error:
        choose(HOSTS, include, exclude)
    assert phrase in str(error.value)


SCRIPT = """
import os, pathlib, signal, sys, time
how, rank = sys.argv[1], os.environ["RANK"]
if how in ("forgiving", "failing"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143 if how == "forgiving" else 1))
place = [os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR")]
sys.stdout.write(" ".join(place) + "\\n")
pathlib.Path(__file__).with_name("said" + rank).touch()
if how in ("3", "killed") and rank == "1":
    while not pathlib.Path(__file__).with_name("said0").exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else sys.exit(3)
if how != "0":
    time.sleep(60)
"""


def launched(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    """The launcher with two processes of SCRIPT."""
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(LAUNCH), "--on_cpu", *arguments[:-1], str(tmp_path / "script.py"), arguments[-1]],
        env=environment() | {"DS_ACCELERATOR": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(("how", "code"), [("0", 0), ("3", 3), ("killed", 1)])
def test_the_end_of_processes_is_that_of_the_launcher(tmp_path: Path, how: str, code: int) -> None:
    process = launched(tmp_path, "--num_processes", "2", how)
    out, errors = process.communicate(timeout=40)
    assert process.returncode == code, errors
    assert sorted(out.splitlines()) == ["0 0 2 2 127.0.0.1", "1 1 2 2 127.0.0.1"]
    assert ("process 1 of this machine was ended by SIGKILL" in errors) == (how == "killed")
    assert "Traceback" not in errors


@pytest.mark.parametrize("how", ["forgiving", "unprepared"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_reaches_the_processes(tmp_path: Path, how: str, number: int, code: int) -> None:
    process = launched(tmp_path, "--num_processes", "2", how)
    assert process.stdout is not None
    for _ in range(2):
        process.stdout.readline()
    process.send_signal(number)
    assert process.wait(40) == code
    process.communicate()


def test_an_end_that_fails_after_a_signal_says_so(tmp_path: Path) -> None:
    """143 promises a checkpoint; there is none where the disk was full."""
    process = launched(tmp_path, "--num_processes", "1", "failing")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(40) == 1
    process.communicate()


def test_a_hangup_that_nohup_ignores_ends_nothing(tmp_path: Path) -> None:
    command = ["nohup", sys.executable, str(LAUNCH), "--on_cpu", str(tmp_path / "script.py"), "1"]
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.terminate()
    assert process.wait(40) == 143
    process.communicate()


def test_places_on_several_machines(tmp_path: Path) -> None:
    hostfile = written(tmp_path, "a slots=1\nb slots=2\nc slots=2\n")
    given = ["--hostfile", str(hostfile), "--exclude_hosts", "b:0", "--no_ssh", "--master_addr", "192.0.2.1"]
    process = launched(tmp_path, *given, "--node_rank", "2", "0")
    out, errors = process.communicate(timeout=40)
    assert process.returncode == 0, errors
    assert sorted(out.splitlines()) == ["2 0 4 2 192.0.2.1", "3 1 4 2 192.0.2.1"]
    assert "machine 2 of 3; they meet at 192.0.2.1:29500" in errors


ON_GPUS = """
import os, sys
from llmops.launcher import launch, machine
launch.has_gpu = machine.has_gpu = lambda: True
launch.devices.check_gpu = lambda: None
code = launch.main() if "--hostfile" in sys.argv else machine.run_main(machine.main)
sys.stdout.flush()
os._exit(code)
"""


@pytest.mark.parametrize("led", [False, True])
@pytest.mark.parametrize(
    ("visible", "gpus"), [(None, "1,2"), ("4,6,7,9", "6,7"), ("4", "has slot 1 of this machine, from 0,")]
)
def test_slots_are_among_the_gpus_that_a_machine_shows(
    tmp_path: Path, led: bool, visible: str | None, gpus: str
) -> None:
    """Those that its scheduler gave, started by hand and over ssh; an exit of 2 where they are fewer."""
    hostfile, script = written(tmp_path, "a slots=1\nb slots=3\n"), tmp_path / "script.py"
    script.write_text("import os; os.write(1, os.environb[b'CUDA_VISIBLE_DEVICES'] + b'\\n')", encoding="utf-8")
    by_hand = ["--hostfile", str(hostfile), "--exclude_hosts", "b:0", "--no_ssh", "--node_rank", "1"]
    by_hand += ["--master_addr", "192.0.2.1", str(script)]
    plan = Plan({"a": ["0"], "b": ["1", "2"]}, "192.0.2.1", PORT, [str(script)], str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", ON_GPUS, *([] if led else by_hand)], cwd=ROOT, text=True,
        env=environment() | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {}),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin
        if led:
            process.stdin.write(plan.to_line(1).decode())
            process.stdin.flush()
        assert process.stdout
        out = [line for line in process.stdout.read().splitlines() if not line.startswith(READY)]
        errors = process.stderr.read() if process.stderr else ""
        code = process.wait(40)
    assert ((code, out) == (0, [gpus, gpus])) if "slot" not in gpus else (code == 2 and gpus in errors), errors


def test_gpus_that_choose_nothing_are_named(tmp_path: Path) -> None:
    """Over ssh each machine's own are chosen from."""
    ssh_command = tmp_path / "bin" / "ssh"
    ssh_command.parent.mkdir()
    ssh_command.write_text("#!/bin/sh\nexit 255\n", encoding="utf-8")
    ssh_command.chmod(0o755)
    surroundings = environment() | {"CUDA_VISIBLE_DEVICES": "2,3", "PATH": f"{ssh_command.parent}:{os.environ['PATH']}"}
    command = [sys.executable, str(LAUNCH), "--hostfile", str(written(tmp_path, "a slots=2\n")), "script.py"]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "warning: CUDA_VISIBLE_DEVICES (2,3) chooses nothing on the machines of a hostfile" in done.stderr


@pytest.mark.parametrize("through", ["launch.py", "chat_main.sh"])
@pytest.mark.parametrize("hosts", [True, False])
def test_a_dry_run_is_told_of_the_processes_that_there_would_be(tmp_path: Path, through: str, hosts: bool) -> None:
    """Of all machines, none of which is asked, and on the one with most of them."""
    hostfile = written(tmp_path, "a slots=4\nb slots=3\nc slots=8\n")
    given = ["--hostfile", str(hostfile), "--exclude_hosts", "c"] if hosts else []
    script = "import os, sys\nif '--check' not in sys.argv: print(os.environ['WORLD_SIZE'], os.environ['LOCAL_SIZE'])\n"
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "finetune.py").write_text(script, encoding="utf-8")
    command = [sys.executable, str(LAUNCH), "--on_cpu", "--alone"]
    arguments = [str(tmp_path / "train" / "finetune.py")]
    if through == "chat_main.sh":
        shutil.copytree(ROOT / "llmops", tmp_path / "llmops")
        shutil.copy(ROOT / "chat_main.sh", tmp_path)
        (tmp_path / "requirements.txt").write_text("", encoding="utf-8")
        command, arguments = ["bash", str(tmp_path / "chat_main.sh"), "--dry_run", "true"], []
    done = subprocess.run(
        [*command, "--num_processes", "3", *given, *arguments], env=environment() | {"DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == (["6", "3"] if hosts else ["3", "3"]), done.stderr


def test_variables_of_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(ssh.EXPORTED)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    (tmp_path / ".deepspeed_env").write_text('# ours\nNCCL_SOCKET_IFNAME=ib0\nA="b c"\n\n', encoding="utf-8")
    found = ssh.exported(str(tmp_path))
    more = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}
    assert found == more | {"NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "ib0", "A": "b c"}
    (tmp_path / ".deepspeed_env").write_text("export\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"\.deepspeed_env:1: found 'export'; expected NAME=value"):
        ssh.exported(str(tmp_path))
