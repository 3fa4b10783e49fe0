"""A running server for tests: the real program in a process of its own, asked over its port."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import ROOT, environment

TOKEN = "token-of-the-tests"


@dataclass
class Answer:
    """What came back: status, headers in lower case, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message of an error in OpenAI's shape."""
        return self.json["error"]["message"]


@dataclass
class Running:
    """A server that was started."""

    process: subprocess.Popen[str]
    url: str
    models: list[str]
    said: list[str] = field(default_factory=list)
    mount: Path = Path()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def ask(self, method: str, path: str, body: Any = None, token: str | None = TOKEN, **headers: str) -> Answer:
        """One request on a connection of its own; a body that is no bytes goes as JSON."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            sent.setdefault("authorization", f"Bearer {token}")
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if method == "POST":
            sent.setdefault("content-type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    def end(self, number: int = signal.SIGTERM, timeout: float = 30) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout)


@contextmanager
def serving(*arguments: str, **variables: str) -> Iterator[Running]:
    """A server on a free port, until the block ends. `said` gets the lines of its stderr."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "serve" / "serve.py"), "--port", "0", *arguments],
        env=environment() | {"LLMOPS_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"} | variables,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.sep,
    )  # fmt: skip
    assert process.stdout
    assert process.stderr
    said: list[str] = []
    reader = threading.Thread(target=said.extend, args=(process.stderr,), daemon=True)
    reader.start()
    try:
        line = process.stdout.readline()
        assert line, "".join(said)
        ready = json.loads(line)
        yield Running(process, ready["url"], ready["models"], said)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(10)
        process.stdout.close()
        process.stderr.close()
