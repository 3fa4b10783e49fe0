"""Who may come in and what a request may be: a real server without a model, attacked over its port."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment
from serve_process import TOKEN, Running, serving
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server without a model."""
    mount = tmp_path_factory.mktemp("mnt")
    with serving("--mount_path", str(mount), "--max_body_mb", "1", "--allowed_hosts", "models.example.org") as running:
        yield running


def test_it_starts_without_torch_in_less_than_a_second(tmp_path: Path) -> None:
    started = time.monotonic()
    with serving("--mount_path", str(tmp_path)) as running:
        seconds = time.monotonic() - started
        maps = Path(f"/proc/{running.process.pid}/maps").read_text(encoding="utf-8")
        assert running.models == []
        assert running.end() == 0
    assert "torch" not in maps
    assert seconds < 1 or os.getloadavg()[0] > 2  # on a machine that is busy with other tests it may take longer


def test_a_token_is_asked_for(server: Running) -> None:
    assert server.ask("GET", "/v1/models").json == {"object": "list", "data": []}
    for token in (None, "", "wrong", TOKEN[:-1], TOKEN + "x", "é"):
        assert server.ask("GET", "/v1/models", token=token).status == 401, token
    denied = server.ask("GET", "/v1/models", token=None)
    assert denied.json["error"] | {"message": ""} == {
        "message": "", "type": "authentication_error", "param": None, "code": "token",
    }  # fmt: skip
    assert denied.headers["www-authenticate"] == "Bearer"
    assert server.ask("GET", "/health", token=None).json == {"status": "ok"}
    assert server.ask("GET", "/", token=None, accept="text/html").body.startswith(b"the token is missing")


def test_a_server_that_ends_says_when_to_ask_again(tmp_path: Path) -> None:
    from serve.app import build_app
    from serve.settings import Access, Settings

    app = build_app(Settings(tmp_path, Access()))
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/health").status_code == 200
        app.state.draining = True
        answer = client.get("/health")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_the_page_gets_its_cookie_from_an_address_with_the_token(server: Running) -> None:
    visit = server.ask("GET", f"/?token={TOKEN}", token=None)
    assert (visit.status, visit.headers["location"]) == (303, "/")
    cookie = visit.headers["set-cookie"]
    assert {part.strip().lower() for part in cookie.split(";")[1:]} == {"httponly", "path=/", "samesite=strict"}
    assert server.ask("GET", "/v1/models", token=None, cookie=cookie.partition(";")[0]).status == 200
    wrong = server.ask("GET", "/?token=wrong", token=None)
    assert wrong.status == 401
    assert "set-cookie" not in wrong.headers


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:5000", "[::1]:5000", "10.1.2.3", "MODELS.example.org:80"])
def test_known_names_and_addresses_are_answered(server: Running, host: str) -> None:
    assert server.ask("GET", "/v1/models", host=host).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil@localhost", "", "a b", "[::1"]
)
def test_a_name_that_somebody_else_may_own_is_refused(server: Running, host: str) -> None:
    assert server.ask("GET", "/v1/models", host=host).status in (400, 421)


def test_another_sites_page_writes_nothing(server: Running) -> None:
    own = f"http://127.0.0.1:{server.port}"
    assert server.ask("POST", "/v1/models", {}, origin=own).status == 405  # let through to the route
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", own + ".evil.example", "http://[", "x"):
        assert server.ask("POST", "/v1/models", {}, origin=origin).json["error"]["code"] == "origin", origin
    assert server.ask("POST", "/v1/models", {}, sec_fetch_site="cross-site").status == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert server.ask("POST", "/v1/models", {}, content_type=kind).status == 415, kind


def test_every_answer_has_the_headers(server: Running) -> None:
    for answer in (
        server.ask("GET", "/v1/models"), server.ask("GET", "/no"), server.ask("GET", "/v1/models", token=None)
    ):  # fmt: skip
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in answer.headers


def test_a_fault_of_ours_has_the_headers_and_is_counted(tmp_path: Path) -> None:
    from serve.app import build_app
    from serve.settings import Access, Settings

    def faulty(request: Any) -> Any:
        raise KeyError("secret")

    app = build_app(Settings(tmp_path, Access()))
    app.router.routes.insert(0, Route("/faulty", faulty))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        answer = client.get("/faulty")
        counted = client.get("/metrics").text
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in answer.text
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert 'llmops_requests_total{path="/faulty",status="500"} 1' in counted


def test_a_path_that_is_not_there_is_an_error_in_openais_shape(server: Running) -> None:
    for path in ("/v1/nothing", "/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/<script>alert(1)</script>"):
        answer = server.ask("GET", path)
        assert (answer.status, answer.json["error"]["type"]) == (404, "not_found_error")
        assert answer.headers["content-type"] == "application/json"


def test_a_huge_body_is_refused_before_it_is_read(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        head = f"POST /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n"
        connection.sendall((head + "content-type: application/json\r\ncontent-length: 104857600\r\n\r\n").encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_metrics_count_answers_by_path_and_not_by_what_clients_make_up(server: Running) -> None:
    before = server.ask("GET", "/metrics")
    assert before.headers["content-type"].startswith("text/plain; version=0.0.4")
    server.ask("GET", '/made"up%0A')
    text = server.ask("GET", "/metrics").body.decode()
    assert 'llmops_requests_total{path="/metrics",status="200"}' in text
    assert "made" not in text


def test_connections_beyond_the_limit_and_slow_ones_are_closed(tmp_path: Path) -> None:
    with serving("--mount_path", str(tmp_path), "--max_connections", "20") as running:
        idle = [socket.create_connection(("127.0.0.1", running.port), 10) for _ in range(60)]
        time.sleep(0.3)
        closed = 0
        for connection in idle:
            connection.settimeout(0.01)
            try:
                closed += connection.recv(1) == b""
            except ConnectionResetError:
                closed += 1
            except TimeoutError:
                pass
        assert closed == 40
        assert running.ask("GET", "/v1/models").status == 200  # who holds connections keeps nobody out
        for connection in idle:
            connection.close()


@pytest.mark.parametrize(("limit", "most"), [("-Sn", 1224), ("-n", 120)])
def test_connections_have_files_or_are_fewer(tmp_path: Path, limit: str, most: int) -> None:
    command = [sys.executable, str(ROOT / "serve" / "serve.py"), "--port", "0", "--mount_path", str(tmp_path)]
    process = subprocess.Popen(
        ["bash", "-c", f'ulimit {limit} 120 && exec "$@"', "bash", *command], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment() | {"LLMOPS_TOKEN": TOKEN},
    )  # fmt: skip
    assert process.stdout
    assert process.stderr
    try:
        running = Running(process, json.loads(process.stdout.readline())["url"], [])
        limits = Path(f"/proc/{process.pid}/limits").read_text(encoding="ascii")
        assert re.search(r"Max open files +(\d+)", limits)[1] == str(most)  # type: ignore[index]
        idle = [socket.create_connection(("127.0.0.1", running.port), 10) for _ in range(200)]
        assert running.ask("GET", "/v1/models").status == 200
        for connection in idle:
            connection.close()
    finally:
        process.terminate()
        said = process.communicate(timeout=20)[1]
    fewer = "60 connections at once instead of 1024: this process may open 120 files (ulimit -n)"
    assert (fewer in said) == (most == 120)
    assert said.count("\n") <= 3  # no file was lacking


def test_who_sends_too_slowly_is_sent_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from serve import server as module
    from serve.app import build_app
    from serve.settings import Access, Settings

    monkeypatch.setattr(module, "HEADER_SECONDS", 0.2)
    access = Access(port=0, token=TOKEN, seconds_to_send=0.2)
    head = f"POST /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n".encode()
    more = b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"

    async def answer(port: int, *parts: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.05)
        try:
            return await asyncio.wait_for(reader.read(), 5)
        finally:
            writer.close()

    async def run() -> list[bytes]:
        listener = module.bound(access)
        listener.listen(10)
        ready = asyncio.Event()
        app = build_app(Settings(tmp_path, access))

        async def body(request: Any) -> Any:
            return PlainTextResponse(str(len(await request.body())))

        app.router.routes.insert(0, Route("/v1/models", body, methods=["POST"]))
        server = module.Server(app, access, 1, ready.set)
        running = asyncio.create_task(server.serve(sockets=[listener]))
        await ready.wait()
        port = listener.getsockname()[1]
        found = await asyncio.gather(answer(port), answer(port, head[:20], head[20:]), answer(port, head + more))
        server.drain()
        await running
        return found

    nothing, half, body = asyncio.run(run())
    assert (nothing, half) == (b"", b"")
    assert body.startswith(b"HTTP/1.1 408 ")


def test_sigterm_with_idle_connections_ends_at_once_with_0(tmp_path: Path) -> None:
    with serving("--mount_path", str(tmp_path)) as running:
        with socket.create_connection(("127.0.0.1", running.port), 10):
            assert running.end(signal.SIGTERM, 5) == 0
        assert any(line.startswith("ending: no new requests") for line in running.said)


def test_sigterm_ends_it_although_nobody_reads_its_stderr(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "serve" / "serve.py"), "--port", "0", "--mount_path", str(tmp_path)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stderr
    assert json.loads(process.stdout.readline())["models"] == []
    process.stderr.close()
    process.terminate()
    try:
        assert process.wait(10) in (0, 120)  # 120: Python itself, which cannot flush stderr
    finally:
        process.kill()
        process.stdout.close()


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["--port", "70000"], "--port is 70000, expected 0 to 65535"),
        (["--port", "x"], "invalid int value: 'x'"),
        (["--host", "example.org"], "expected an address such as 127.0.0.1"),
        (["--token", "short"], "the token of --token cannot be used; expected 8 to 200"),
        (["--token", "semicolon;semicolon"], "the token of --token cannot be used"),
        (["--auth", "false", "--host", "0.0.0.0"], "would let everybody in"),
        (["--model_name_or_path", "/nowhere"], "/nowhere holds no model"),
        (["--intents_file", "x.json"], "--intents_file needs a model"),
        (["--allowed_hosts", "a,http://b"], "--allowed_hosts has 'http://b'"),
        (["--request_seconds", "nan"], "--request_seconds is nan, expected"),
        (["--no_such", "1"], "unrecognized arguments"),
    ],
)
def test_a_bad_setting_is_one_sentence(arguments: list[str], phrase: str) -> None:
    from llmops.console import UserError
    from serve.settings import read_settings

    with pytest.raises(UserError, match=re.escape(phrase)):
        read_settings(arguments)


def test_a_taken_port_is_one_sentence_with_exit_code_2(server: Running) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "serve" / "serve.py"), "--port", str(server.port)], env=environment(),
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: port {server.port} of 127.0.0.1 cannot be used")
    assert done.stderr.count("\n") == 1


def test_a_token_file_is_made_for_its_owner_alone_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.settings import read_settings

    monkeypatch.delenv("LLMOPS_TOKEN", raising=False)
    path = tmp_path / "token"
    made = read_settings(["--token_file", str(path)]).access.token
    assert len(made) >= 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_settings(["--token_file", str(path)]).access.token == made
    assert read_settings([]).access.token != read_settings([]).access.token
    monkeypatch.setenv("LLMOPS_TOKEN", "from-the-environment")
    assert read_settings([]).access.token == "from-the-environment"


def test_a_token_is_printed_only_where_it_is_kept_nowhere_else(tmp_path: Path) -> None:
    def first_line(*arguments: str, **variables: str) -> str:
        with serving("--mount_path", str(tmp_path), *arguments, **variables) as running:
            assert running.end() == 0
        return next(line for line in running.said if line.startswith("serving on"))

    assert re.search(r"open http://127\.0\.0\.1:\d+/\?token=[\w-]{32}\n", first_line(LLMOPS_TOKEN=""))
    assert first_line().endswith("/?token=TOKEN with the token of LLMOPS_TOKEN instead of TOKEN\n")
    path = tmp_path / "token"
    for _ in range(2):  # made, and read
        assert f"with the token of {path} instead" in first_line("--token_file", str(path))
    assert "?token" not in first_line("--auth", "false")


def test_the_shell_starts_it_and_keeps_the_token_out_of_the_command_line(tmp_path: Path) -> None:
    process = subprocess.Popen(
        ["bash", str(ROOT / "serve" / "serve.sh"), "--mount_path", str(tmp_path), "--port", "0", "--token", TOKEN],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout
    try:
        ready = json.loads(process.stdout.readline())
        assert TOKEN not in Path(f"/proc/{process.pid}/cmdline").read_text(encoding="utf-8")
        assert Running(process, ready["url"], []).ask("GET", "/v1/models").status == 200
    finally:
        process.terminate()
        assert process.wait(20) == 0
        process.stdout.close()


def test_a_container_is_well_when_its_server_is(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from serve import health

    def made(name: str, *processes: tuple[int, int, bytes]) -> Path:
        for number, parent, words in processes:
            folder = tmp_path / name / str(number)
            folder.mkdir(parents=True)
            (folder / "status").write_text(f"Name:\tx\nPid:\t{number}\nPPid:\t{parent}\nUid:\t0\n")
            (folder / "cmdline").write_bytes(words)
        (tmp_path / name / "77").mkdir()  # ended just now
        return tmp_path / name

    server_words, runner = b"python3\0/app/serve/serve.py\0", b"python3\0-m\0deepspeed.launcher.runner\0"
    serving_one = made("serve", (1, 0, server_words))
    init = made("init", (1, 0, b"/sbin/docker-init\0--\0bash\0serve/serve.sh\0"), (7, 1, server_words))
    training = made("train", (1, 0, b"/sbin/docker-init\0"), (7, 1, runner), (15, 7, server_words))  # its console
    monkeypatch.setenv("SERVE_PORT", str(server.port))
    assert health.main(serving_one) == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("SERVE_PORT", str(free.getsockname()[1]))
    assert health.main(training) == 0
    assert health.main(serving_one) == 1
    assert health.main(init) == 1
    assert f"\nPPid:\t{os.getppid()}\n" in Path("/proc/self/status").read_text(encoding="ascii")
    assert "does not answer" in capsys.readouterr().err


def test_the_compose_file_starts_what_the_image_has() -> None:
    import yaml

    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert sorted(services) == ["serve", "tensorboard", "train"]
    command = services["serve"]["command"]
    assert (ROOT / command[1]).is_file()
    assert command[2] == "--model_name_or_path"
    assert all(port.startswith("127.0.0.1:") for name in ("serve", "tensorboard") for port in services[name]["ports"])
