"""FETCH=true: a model comes from the hub by its id; a small server stands in for the hub."""

import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from conftest import ROOT, environment

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: the list of a model's files, and each of them."""

    folder: Path
    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.asked.append((path, self.headers.get("Authorization")))
        name = path.rpartition("/")[2]
        if path == "/api/models/org/tiny/revision/main":
            names = [{"rfilename": file.name} for file in self.folder.iterdir()]
            self.send(json.dumps({"id": "org/tiny", "sha": SHA, "siblings": names}).encode(), "application/json")
        elif path == f"/api/models/org/tiny/tree/{SHA}":
            listed = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"}
                      for file in self.folder.iterdir()]  # fmt: skip
            self.send(json.dumps(listed).encode(), "application/json")
        elif path == f"/org/tiny/resolve/{SHA}/{name}" and (self.folder / name).is_file():
            self.send((self.folder / name).read_bytes(), "application/octet-stream")
        else:
            self.send(b"", "text/plain", 404)

    do_HEAD = do_GET  # noqa: N815

    def send(self, raw: bytes, kind: str, status: int = 200) -> None:
        """One answer."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("ETag", f'"{hashlib.sha1(raw).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def hub(checkpoints: dict[str, Path]) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """(address, what was asked)."""
    asked: list[tuple[str, str | None]] = []
    handler = type("Bound", (Hub,), {"folder": checkpoints["llama"], "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_a_model_comes_from_the_hub_when_that_is_asked_for(
    hub: tuple[str, list[tuple[str, str | None]]], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Once; then it is in the cache. A token goes along only where it is given. A wrong name is one sentence."""
    address, asked = hub
    data = tmp_path / "a.jsonl"
    data.write_text('{"answer": "a", "gold": "a"}\n')
    given = environment() | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "",
                             "MOUNT_PATH": str(tmp_path), "DATASET_PATH": str(data), "EVALUATION_METRICS": "Acc",
                             "NO_PROXY": "127.0.0.1"}  # fmt: skip

    def run(model: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", str(ROOT / "job" / "run.sh")], env=given | {"MODEL_PATH": model} | more,
                              capture_output=True, text=True, check=False, timeout=120)  # fmt: skip

    refused = run("org/tiny")
    assert refused.returncode == 2
    assert "set FETCH=true to fetch it from the hub" in refused.stderr
    assert asked == []
    done = run("org/tiny", FETCH="true", HF_TOKEN="hf_0123456789")
    assert done.returncode == 0, done.stderr
    assert {token for path, token in asked if path.startswith("/api/")} == {"Bearer hf_0123456789"}
    assert "hf_0123456789" not in done.stdout + done.stderr
    (snapshot,) = (tmp_path / "hf" / "hub" / "models--org--tiny" / "snapshots").iterdir()
    assert {path.name for path in snapshot.iterdir()} == {path.name for path in checkpoints["llama"].iterdir()}
    count = len(asked)
    assert run("org/tiny").returncode == 0
    assert len(asked) == count
    wrong = run("org/gone", FETCH="true")
    assert wrong.returncode == 1
    assert "the hub does not give org/gone" in json.loads(wrong.stdout)["message"]
    assert "Traceback" not in wrong.stderr
    assert {token for path, token in asked if "gone" in path} == {None}
