"""tests/forked_python.py: a script begins and ends as under a Python of its own."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_python import forked_python

ECHO = """import os, sys, time
print(sys.argv[1:], os.environ["WORD"], os.getcwd(), sys.path[0], sys.stdin.read(), flush=True)
sys.stderr.write("said")
time.sleep(60 if sys.argv[1:] == ["wait"] else 0)
sys.exit(len(sys.argv) - 1)
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a process is started with: the environment, and the folder of the scripts."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "echo.py").write_text(ECHO)
    (folder / "fault.py").write_text("raise ValueError('a fault')\n")
    (folder / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    with forked_python(tmp_path_factory.mktemp("python"), bare=True) as programs:
        given = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "WORD": "word"}
        yield {"env": given, "cwd": folder, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def run(shell: dict[str, Any], *words: str) -> tuple[int, str, str]:
    """Exit code, output and error output of a command."""
    done = subprocess.run(words, **shell, input="typed", check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_script_has_what_it_was_given(shell: dict[str, Any]) -> None:
    folder = shell["cwd"]
    assert run(shell, "python", "echo.py", "a", "b") == (2, f"['a', 'b'] word {folder} {folder} typed\n", "said")
    assert run(shell, "python3", "-u", "echo.py") == (0, f"[] word {folder} {folder} typed\n", "said")
    assert run(shell, "python", "-c", "print(3)") == (0, "3\n", "")
    code, _, said = run(shell, "python", "fault.py")
    assert (code, said.splitlines()[-1]) == (1, "ValueError: a fault")
    assert run(shell, "python", "killed.py")[0] == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_who_started_it(shell: dict[str, Any], number: signal.Signals) -> None:
    process = subprocess.Popen(["python", "echo.py", "wait"], **shell, stdin=subprocess.DEVNULL)
    assert process.stdout
    assert process.stdout.readline().startswith("['wait']")
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == ""  # the script's end of the pipe is closed, too
    assert process.returncode == -number


def test_without_the_server_it_is_python(tmp_path: Path, shell: dict[str, Any]) -> None:
    with forked_python(tmp_path, bare=True) as programs:
        pass
    assert run(shell, str(programs / "python"), "echo.py", "a")[0] == 1
