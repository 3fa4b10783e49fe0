"""The end of a job over HTTP: what is sent, when it is sent again, when not."""

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from job_platform import AUTH, JOB, TENANT, Call, PlatformServer, platform_server, wait_for

from job import calls, report
from job.calls import CallFailed, persist
from job.report import Outcome, Platform, Webhook, last_part
from job.settings import Settings, read_settings
from job.state import SENDING, TAKEN, Told

DONE = Outcome(0, {"Rouge": 0.88}, {"Rouge": 0.88})
FAILED = Outcome(2, message="error: 训练数据有误")


class Reporting:
    """A platform, and a job's part that speaks to it; pauses take a twentieth of their time."""

    def __init__(self, server: PlatformServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.stopped = threading.Event()
        self.said: list[str] = []

    def settings(self, **more: str) -> Settings:
        """The settings of the job."""
        return read_settings([], self.server.environment(NOTIFY_SECONDS="5") | more)

    def platform(self, **more: str) -> Platform:
        """What tells the platform."""
        settings = self.settings(**more)
        told = Told(self.folder, settings.job_id, settings.api_url)
        return Platform(settings, told, self.stopped, self.said.append)

    @property
    def answers(self) -> list[str]:
        """What the platform answered: its faults, or its JSON."""
        return [call.answer for call in self.server.ends]


@pytest.fixture
def reporting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reporting]:
    """A running platform."""
    monkeypatch.setattr(calls, "LONGEST_PAUSE", 0.05)
    with platform_server() as server:
        yield Reporting(server, tmp_path)


def test_success_and_failure_as_the_platform_wants_them(reporting: Reporting, tmp_path: Path) -> None:
    assert reporting.platform().report(DONE)
    (call,) = reporting.server.ends
    assert (call.method, call.path) == ("PUT", f"/api/finetuning/{JOB}/finish")
    assert call.headers["authorization"] == AUTH
    assert call.headers["x-tenant-id"] == TENANT
    assert call.headers["content-type"] == "application/json"
    assert call.body == {"status": "success", "data": {"Rouge": 0.88}}
    assert reporting.server.state == "success"
    with platform_server() as server:
        failing = Reporting(server, tmp_path / "other")
        assert failing.platform().report(FAILED)
        assert server.ends[0].body == {"status": "failed", "message": "error: 训练数据有误"}
        assert (server.state, server.message) == ("failed", "error: 训练数据有误")


def test_empty_headers_are_left_out(reporting: Reporting) -> None:
    assert not reporting.platform(AUTH="", TENANT_ID="").report(DONE)
    assert not {"authorization", "x-tenant-id"} & reporting.server.ends[0].headers.keys()


@pytest.mark.parametrize("fault", [500, 503, 429, "drop", "html", "refuse"])
def test_it_tries_again(reporting: Reporting, fault: Any) -> None:
    reporting.server.faults = [fault, fault]
    assert reporting.platform().report(DONE)
    assert len(reporting.answers) == 3
    assert reporting.server.state == "success"
    assert len(reporting.said) == 3
    assert "does not take the end of the job: " in reporting.said[0]


def test_a_refusal_is_no_success(reporting: Reporting) -> None:
    """Five answers of a platform that is there are enough."""
    reporting.server.cancel()
    assert not reporting.platform().report(DONE)
    assert len(reporting.answers) == report.REFUSALS
    assert "it refuses: the job is not running but cancel" in reporting.said[-1]
    assert reporting.server.state == "cancel"


@pytest.mark.parametrize("status", [400, 401, 404, 307])
def test_what_another_attempt_cannot_mend(reporting: Reporting, status: int) -> None:
    """Neither is the answer followed to another address, with our authorization."""
    reporting.server.faults = [status] * 3
    assert not reporting.platform().report(DONE)
    assert reporting.answers == [str(status)]
    assert f"HTTP {status}" in reporting.said[-1]


def test_a_platform_that_is_not_there(reporting: Reporting) -> None:
    settings = {"API_URL": "http://127.0.0.1:9/finish", "NOTIFY_SECONDS": "0"}
    assert not reporting.platform(**settings).report(DONE)
    assert "Connection refused" in reporting.said[-1]


def test_it_gives_up_after_its_time(reporting: Reporting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "LONGEST_PAUSE", 0.3)
    reporting.server.faults = [500] * 50
    started = time.monotonic()
    assert not reporting.platform(NOTIFY_SECONDS="1").report(DONE)
    assert time.monotonic() - started < 60
    assert 4 <= len(reporting.answers) <= 6


def test_no_attempt_follows_a_cancel(reporting: Reporting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "LONGEST_PAUSE", 30.0)
    reporting.server.faults = [500] * 50
    thread = threading.Thread(target=reporting.platform(NOTIFY_SECONDS="600").report, args=(DONE,))
    thread.start()
    wait_for(lambda: reporting.answers)
    reporting.stopped.set()
    thread.join(60)
    assert not thread.is_alive()
    assert reporting.answers == ["500"]


def test_retry_after_is_kept(reporting: Reporting, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls.pause_of({"Retry-After": "7"}) == 0.05  # the longest pause here
    assert calls.pause_of({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}) == 0
    tries = []

    def busy() -> None:
        tries.append(time.monotonic())
        raise CallFailed("busy", True, pause=0.4)

    with pytest.raises(CallFailed):
        persist(busy, 1.0, threading.Event(), reporting.said.append, "x")
    assert len(tries) == 3
    assert tries[1] - tries[0] >= 0.4


def test_a_start_after_a_kill_in_the_middle_of_telling(reporting: Reporting) -> None:
    """The platform has it, and nobody here knows: its refusal then says that it has."""
    first = reporting.platform()
    first.told.write("success", SENDING)
    reporting.server.state = "success"
    assert reporting.platform().report(DONE)
    assert len(reporting.answers) == 1
    assert "which an earlier start had sent already" in reporting.said[0]
    assert first.told.read() == ("success", TAKEN)
    other = Told(reporting.folder, "another-job", reporting.settings().api_url)
    assert other.read() == ("", "")


@pytest.mark.parametrize("fault", ["drop", 504])
def test_a_refusal_after_an_answer_that_was_lost(reporting: Reporting, fault: Any) -> None:
    """The platform has taken what it did not confirm; what it says of another attempt is that."""

    def taken(call: Call) -> Any:
        reporting.server.end(call)
        return fault

    reporting.server.faults = [taken]
    assert reporting.platform().report(DONE)
    assert reporting.server.state == "success"
    assert "which an earlier attempt had sent already" in reporting.said[-2]


@pytest.mark.parametrize(
    ("raw", "sent", "taken"),
    [
        (b'{"success": false, "message": "no"}', 18, False),  # the half of it says nothing
        (b"[" * 200_000, 200_000, True),  # no JSON of theirs, so no refusal
    ],
)
def test_answers_that_are_none(reporting: Reporting, raw: bytes, sent: int, taken: bool) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw[:sent]

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as asked:  # the whole request: a close before resets
                    asked.readline()
                    headers = http.client.parse_headers(asked)
                    asked.read(int(headers["Content-Length"]))
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/end"
        assert reporting.platform(API_URL=url, NOTIFY_SECONDS="0").report(DONE) == taken
        listener.shutdown(socket.SHUT_RDWR)
    assert taken or "the answer broke off" in reporting.said[-1]


def test_what_was_told_and_cannot_be_read_keeps_nobody_from_telling(reporting: Reporting) -> None:
    (reporting.folder / "told.json").write_text("{half")
    platform = reporting.platform()
    assert platform.earlier() == ("", "")
    assert platform.report(DONE)
    assert "it counts as not told" in reporting.said[0]
    assert platform.earlier() == ("success", TAKEN)


def test_the_last_3000_characters() -> None:
    text = "".join(f"line {i}\n" for i in range(2000))
    assert last_part(text) == text[-3000:]
    chinese = "训练失败" * 2000 + "显存不足"
    cut = last_part(chinese)
    assert cut.endswith("训练失败显存不足")
    assert len(cut.encode()) <= 3000  # the platform keeps the first 3,000 bytes
    assert last_part("half \ud800 a character") == "half ? a character"


def test_the_webhook_has_a_shape_of_our_own(reporting: Reporting) -> None:
    url = f"{reporting.server.url}/hook?key=0123456789"
    settings = reporting.settings(NOTIFY_URL=url, NOTIFY_TOKEN="hook-token-1", OUTPUT_DIR="/out")
    webhook = Webhook(settings, reporting.stopped, reporting.said.append)
    webhook.report("started")
    reporting.server.faults = ["drop", 500]
    webhook.report("failed", FAILED)
    webhook.report("succeeded", DONE)
    posts = [call for call in reporting.server.calls if call.method == "POST"]
    assert {call.headers["authorization"] for call in posts} == {"Bearer hook-token-1"}
    started, failed, succeeded = reporting.server.hooks
    assert set(started) == {"version", "job", "task", "state", "exit_code", "message", "data", "output", "host", "time"}
    assert (started["version"], started["job"], started["task"], started["state"]) == (1, JOB, "train", "started")
    assert (failed["state"], failed["exit_code"], failed["message"]) == ("failed", 2, "error: 训练数据有误")
    assert (succeeded["state"], succeeded["exit_code"], succeeded["data"]) == ("succeeded", 0, {"Rouge": 0.88})
    assert succeeded["output"] == "/out"
    assert not [text for text in reporting.said if "0123456789" in text or "hook-token-1" in text]


def test_a_webhook_that_is_not_there_is_a_warning(reporting: Reporting) -> None:
    """What is told on the way is told once."""
    reporting.server.faults = [500] * 9
    settings = reporting.settings(NOTIFY_URL=f"{reporting.server.url}/hook", NOTIFY_SECONDS="0")
    webhook = Webhook(settings, reporting.stopped, reporting.said.append)
    webhook.report("started")
    webhook.report("failed", FAILED)
    assert len(reporting.server.calls) == 2
    assert all(text.startswith("warning: ") for text in reporting.said)


def test_an_end_that_is_in_the_air_is_not_lost(reporting: Reporting) -> None:
    """The platform removes the job's container before its answer is there: that is no cancel."""

    def removed(call: Call) -> None:
        reporting.stopped.set()
        time.sleep(0.2)

    reporting.server.faults = [removed]
    assert reporting.platform().report(DONE)
    assert reporting.server.state == "success"
