"""A Python whose scripts begin with the libraries imported: a test that starts many commands pays for torch once.

`with forked_python(folder) as path:` makes folder/bin with a python and a python3, to stand first in PATH. A script
that they are given runs in a process forked from one that has imported the libraries, with their arguments,
environment, working folder, input and output; the project's own modules are imported by the script, as ever. What is
no script (`-c`, `-m`, `-`) goes to the Python of the tests, as does everything once the block has ended.
"""

import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

READY = b"r"  # from the server: it has the libraries
# what a script's process was asked with, in one message of at most this many bytes, beside its three files
LONGEST = 4 << 20
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

words = sys.argv[1:]
words = words[1:] if words[:1] == ["-u"] else words
given = {{name: value for name, value in os.environ.items()}}
try:
    if not words or not words[0].endswith(".py"):
        raise OSError
    server = socket.socket(socket.AF_UNIX)
    server.connect({address!r})
except OSError:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
request = json.dumps({{"words": words, "environment": given, "folder": os.getcwd(), "program": {program!r}}}).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
answers = server.makefile()
child = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(child, number))
code = int(answers.readline() or 1)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextmanager
def forked_python(folder: Path, bare: bool = False) -> Iterator[Path]:
    """A folder for PATH, as long as the block. `bare`: without the libraries, to try how processes begin and end."""
    address, programs = folder / "python.socket", folder / "bin"
    programs.mkdir()
    for name in ("python", "python3"):
        program = programs / name
        program.write_text(CLIENT.format(python=sys.executable, address=str(address), program=str(program)))
        program.chmod(0o755)
    command = [sys.executable, __file__, str(address), *(["bare"] if bare else [])]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert server.stdout
    with server.stdout:
        try:
            assert server.stdout.read(1) == READY, "the libraries cannot be imported"
            yield programs
        finally:
            server.terminate()
            server.wait()


def import_libraries() -> None:
    """What the commands import late."""
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import nltk.translate.bleu_score  # noqa: F401
    import peft  # noqa: F401
    import rouge_score.rouge_scorer  # noqa: F401
    import sentence_transformers  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import uvicorn  # noqa: F401
    from transformers import BertModel, LlamaForCausalLM, Qwen2ForCausalLM, Trainer  # noqa: F401


def received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What a client asks for, and its input, output and error output."""
    head, files, _, _ = socket.recv_fds(connection, 8, 3)
    size, body = int.from_bytes(head, "big"), bytearray()
    assert size <= LONGEST
    while len(body) < size:
        piece = connection.recv(size - len(body))
        assert piece
        body += piece
    return json.loads(bytes(body)), files


def become(request: dict[str, Any], files: list[int]) -> str:
    """Make this process the one that was asked for; its script."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    for target, source in enumerate(files):
        os.dup2(source, target)
        os.close(source)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.executable = request["program"]
    sys.argv = request["words"]
    script = sys.argv[0]
    extra = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[0:1] = [str(Path(script).resolve().parent), *extra]
    return script


def serve(address: str) -> str:
    """Fork for whoever asks, as long as the test is there. Returns in the forked processes alone: the script to run.

    The connection of a process is open until one of its two ends: the process, which is told, or who asked, and then
    the process is killed.
    """
    running: dict[int, socket.socket] = {}
    test = os.getppid()
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(address)
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ, None)
        os.write(1, READY)
        while os.getppid() == test:
            for key, _ in selector.select(0.02):
                if key.data is not None:  # it sends nothing, so this is its end
                    selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)
                    continue
                connection = listener.accept()[0]
                request, files = received(connection)
                child = os.fork()
                if child == 0:
                    for other in (*running.values(), connection):
                        other.close()
                    return become(request, files)
                for file in files:
                    os.close(file)
                running[child] = connection
                selector.register(connection, selectors.EVENT_READ, child)
                connection.sendall(b"%d\n" % child)
            for child in list(running):
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    told(running.pop(child), os.waitstatus_to_exitcode(status), selector)
    sys.exit()


def told(connection: socket.socket, code: int, selector: selectors.BaseSelector) -> None:
    """Tell who asked how the process ended, if they are still there."""
    with connection, suppress(BrokenPipeError):
        if connection.fileno() in selector.get_map():
            selector.unregister(connection)
        connection.sendall(b"%d\n" % code)


if __name__ == "__main__":
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    gc.disable()
    if not sys.argv[2:]:
        import_libraries()
    gc.enable()
    gc.freeze()  # what is imported is nobody's garbage: no process looks through it again
    script = serve(sys.argv[1])
    runpy.run_path(script, run_name="__main__")
