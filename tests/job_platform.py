"""The platform's side of a job as a real HTTP server: its rules for the end of a job, its files, its progress reader.

From what is known of IceBearAI/LLM-And-More: PUT /api/finetuning/JOB/finish with Authorization and X-Tenant-Id; 200
also for a refusal, which says "success": false; only a running job can end; a message is cut after 3,000 bytes; the
job's container is removed once its end is known. A cancelled job's container is removed first.
"""

import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

AUTH, TENANT = "Bearer eyJhbGciOiJIUzI1NiJ9.c2VjcmV0.c2lnbmF0dXJl", "9d65d67f-acd1-47ec-8858-6e57361997b4"
JOB = "0b7d3a86-2b59-4e0e-9f0d-6f2f4a3a7f11"
FLAT = re.compile(r"\{[^}]*\}")


@dataclass
class Call:
    """A request that came, with what it was answered."""

    method: str
    path: str
    headers: dict[str, str]
    raw: bytes
    answer: str = ""

    @property
    def body(self) -> Any:
        """Its JSON."""
        return json.loads(self.raw)


@dataclass
class PlatformServer:
    """A job's record on the platform. `faults` are answers to the next calls instead of the right one.

    A fault: a number (that HTTP status), "refuse" (200 and "success": false), "drop" (the connection closes), "html"
    (a proxy's page, with 502), or a function of the call that returns one of these or None.
    """

    state: str = "running"
    message: str = ""
    result: Any = None
    calls: list[Call] = field(default_factory=list)
    faults: list[Any] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    taken: Callable[[], None] | None = None
    hooks: list[Any] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ends(self) -> list[Call]:
        """The calls about the job's end."""
        return [call for call in self.calls if call.path.endswith("/finish")]

    def environment(self, **more: str) -> dict[str, str]:
        """What the platform sets for every job."""
        common = {"API_URL": f"{self.url}/api/finetuning/{JOB}/finish", "AUTH": AUTH, "TENANT_ID": TENANT,
                  "JOB_ID": JOB, "HTTP_PROXY": "", "HTTPS_PROXY": "", "NO_PROXY": "127.0.0.1",
                  "HF_ENDPOINT": ""}  # fmt: skip
        return common | more

    def cancel(self) -> None:
        """Cancel the job, as a user does there."""
        with self.lock:
            if self.state == "running":
                self.state = "cancel"

    def end(self, call: Call) -> dict[str, Any]:
        """The answer to PUT .../finish."""
        with self.lock:
            if self.state != "running":
                return {"success": False, "code": 500, "message": f"the job is not running but {self.state}"}
            body = call.body
            if body["status"] not in ("success", "failed"):
                return {"success": False, "code": 500, "message": "no such status"}
            self.state, self.result = body["status"], body.get("data")
            self.message = body.get("message", "").encode()[:3000].decode("utf-8", "replace")
        if self.taken:
            self.taken()
        return {"success": True, "code": 200, "message": "", "traceId": "1"}


class Handler(BaseHTTPRequestHandler):
    """Requests to a PlatformServer."""

    platform: PlatformServer
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        """Answer whatever came."""
        length = int(self.headers.get("Content-Length") or 0)
        headers = {name.lower(): value for name, value in self.headers.items()}
        call = Call(self.command, self.path, headers, self.rfile.read(length))
        self.platform.calls.append(call)
        fault = self.platform.faults.pop(0) if self.platform.faults else None
        fault = fault(call) if callable(fault) else fault
        call.answer = str(fault or "")
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "refuse":
            self.send(200, {"success": False, "code": 500, "message": "database is away"})
        elif fault == "html":
            self.send(502, b"<html>Bad Gateway</html>")
        elif isinstance(fault, int):
            self.send(fault, {"message": "fault"})
        else:
            self.serve(call)

    def serve(self, call: Call) -> None:
        """The right answer."""
        platform, path = self.platform, call.path.partition("?")[0]
        if call.method == "GET" and path == "/moved":
            self.send(302, b"", Location=call.path.partition("?to=")[2])
        elif call.method == "GET" and path in platform.stored:
            self.send(200, platform.stored[path])
        elif call.method == "POST" and path == "/hook":
            platform.hooks.append(call.body)
            self.send(204, b"")
        elif call.method == "PUT" and path == f"/api/finetuning/{JOB}/finish":
            known = call.headers.get("authorization") == AUTH and call.headers.get("x-tenant-id") == TENANT
            found = platform.end(call) if known else {"success": False, "code": 401}
            call.answer = json.dumps(found)
            self.send(200 if known else 401, found)
        else:
            self.send(404, {"success": False})

    do_GET = do_POST = do_PUT = answer  # noqa: N815

    def send(self, status: int, body: Any, **headers: str) -> None:
        """One answer."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)
        except OSError:  # the one who asked is gone: it was killed
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@contextmanager
def platform_server() -> Iterator[PlatformServer]:
    """A platform with one running job, until the block ends."""
    platform = PlatformServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"platform": platform}))
    server.daemon_threads = True
    platform.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield platform
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def read_progress(output: str) -> list[dict[str, float]]:
    """What the platform's progress reader makes of a container's output: entries with 0 for what is missing.

    Whatever stands in brackets is tried; without a loss it counts as 0. What is no JSON then, or has another kind of
    value in a field, is passed over, and so is epoch 0.
    """
    fields = ("loss", "learning_rate", "epoch", "grad_norm", "eval_loss", "step", "rank")
    entries = []
    for line in output.split("\n"):
        for found in FLAT.findall(line.strip()):
            text = found.replace("'", '"').replace("False", "false").replace("True", "true")
            try:
                value = json.loads(text, parse_constant=no_number)
            except ValueError:
                continue
            entry = {name: value.get(name, 0) for name in fields}
            if not all(isinstance(number, int | float) for number in entry.values()):
                continue
            if entry["epoch"] != 0:
                entries.append(entry)
    return entries


def no_number(name: str) -> Any:
    """NaN and Infinity are no JSON for the platform."""
    raise ValueError(name)


def settled_port() -> int:
    """A port that nobody listens on, and that the kernel gives to no connection meanwhile (it takes those above)."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """What a condition says once it says something true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found
