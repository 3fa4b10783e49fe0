"""How a job ended, told to the platform and to a webhook.

The platform (IceBearAI/LLM-And-More) takes PUT API_URL with `Authorization`, `X-Tenant-Id` and
{"status": "success", "data": ...} or {"status": "failed", "message": ...}. It answers 200 also when it refuses, with
"success": false in the body: because its job is not running (yet, or any more), or because its database is away.
"""

import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from job.calls import ATTEMPT_SECONDS, CallFailed, check_header, persist, request, shown_address
from job.settings import Settings
from job.state import SENDING, TAKEN, Told
from llmops import files, json_text
from llmops.console import RunStopped, UserError

LONGEST_MESSAGE = 3000
REFUSALS = 5  # answers of a platform that is there: it will not change its mind later
QUICK_SECONDS = 5.0  # for what is told on the way, and while a scheduler waits for this process to end
AGENT = {"User-Agent": "llmops-job", "Content-Type": "application/json"}
VERSION = 1  # of the webhook's shape


@dataclass(frozen=True)
class Outcome:
    """How a job's work ended: its exit code; `data` for the platform, `summary` (small) for everybody else.

    `failed`: it did so by itself, also where the job was asked to end meanwhile.
    """

    code: int
    data: Any = None
    summary: Any = None
    message: str = ""
    failed: bool = False

    @property
    def status(self) -> str:
        """The platform's word for it."""
        return "failed" if self.code else "success"


def last_part(text: str) -> str:
    """The last 3,000 characters, and not more than 3,000 bytes: the platform keeps the first 3,000 bytes of a message,
    which of Chinese text would be a thousand characters without the end."""
    return text[-LONGEST_MESSAGE:].encode("utf-8", "replace")[-LONGEST_MESSAGE:].decode("utf-8", "ignore")


def refusal_in(reply: bytes) -> str | None:
    """Why the platform refused in a good answer; None where it did not."""
    try:
        found = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("success") is not False:
        return None
    return files.plain(str(found.get("message") or found.get("code") or "without a reason"), 200)


class Platform:
    """The platform's address for the end of a job."""

    def __init__(self, settings: Settings, told: Told, stopped: threading.Event, tell: Callable[[str], None]) -> None:
        self.address, self.seconds = settings.api_url, float(settings.notify_seconds)
        headers = {"Authorization": settings.auth, "X-Tenant-Id": check_header("TENANT_ID", settings.tenant_id)}
        self.headers = AGENT | {name: value for name, value in headers.items() if value}
        self.told, self.stopped, self.tell = told, stopped, tell

    def report(self, outcome: Outcome) -> bool:
        """Whether the platform took it; tries again where that may help, and not once the job was asked to end."""
        body: dict[str, Any] = {"status": outcome.status}
        body |= {"message": last_part(outcome.message)} if outcome.code else {"data": outcome.data}
        raw = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        before = self.earlier() == (outcome.status, SENDING)
        self._note(outcome.status, SENDING)
        refusals, unsure = 0, False

        def work() -> None:
            nonlocal refusals, unsure
            try:
                refused = refusal_in(request("PUT", self.address, self.headers, raw, ATTEMPT_SECONDS))
            except CallFailed as failed:
                unsure = unsure or failed.unsure
                raise
            if refused:
                refusals += 1
                raise CallFailed(f"it refuses: {refused}", again=refusals < REFUSALS and not before)

        what = f"{shown_address(self.address)} does not take the end of the job"
        try:
            persist(work, self.seconds, self.stopped, self.tell, what)
        except CallFailed as failed:
            if not ((before or unsure) and refusals):
                self.tell(f"{what}: {failed}")
                return False
            if before:
                self.tell(f"{what} ({failed}), which an earlier start had sent already; it counts as taken")
            else:
                self.tell(f"{what} ({failed}), which an earlier attempt had sent already; it counts as taken")
        self._note(outcome.status, TAKEN)
        self.tell(f"{shown_address(self.address)} has taken it: {outcome.status}")
        return True

    def earlier(self) -> tuple[str, str]:
        """What earlier starts have told; nothing where that cannot be read, so that the job is told of in any case."""
        try:
            return self.told.read()
        except UserError as error:
            self.tell(f"warning: {error}")
            return "", ""

    def _note(self, status: str, how: str) -> None:
        """Write down what is told; a disk that is full, which may be the very news, keeps nobody from telling."""
        try:
            self.told.write(status, how)
        except (UserError, RunStopped) as error:
            self.tell(f"warning: {error}")


class Webhook:
    """An address that hears of the start and the end of a job, in our own shape."""

    def __init__(self, settings: Settings, stopped: threading.Event, tell: Callable[[str], None]) -> None:
        self.settings, self.stopped, self.tell = settings, stopped, tell
        login = {"Authorization": f"Bearer {settings.notify_token}"} if settings.notify_token else {}
        self.headers = AGENT | login

    def report(self, state: str, outcome: Outcome | None = None) -> None:
        """Tell it; an end is told for NOTIFY_SECONDS, everything else once. A job does not fail by its webhook."""
        address = self.settings.notify_url
        if not address:
            return
        raw = json_text.dumps(describe(self.settings, state, outcome)).encode()
        ended = state in ("succeeded", "failed") and not self.stopped.is_set()
        what = f"{shown_address(address)} does not hear that the job has {state}"
        seconds, timeout = (float(self.settings.notify_seconds), ATTEMPT_SECONDS) if ended else (0.0, QUICK_SECONDS)
        try:
            persist(
                lambda: request("POST", address, self.headers, raw, timeout), seconds, self.stopped, self.tell, what
            )
        except CallFailed as failed:
            self.tell(f"warning: {what}: {failed}")


def describe(settings: Settings, state: str, outcome: Outcome | None) -> dict[str, Any]:
    """A job's state in our own shape: what a webhook gets, and stdout at the end.

    `state`: started, succeeded, failed, stopped (by a signal; it goes on when it is started again).
    """
    return {
        "version": VERSION,
        "job": settings.job_id,
        "task": settings.task,
        "state": state,
        "exit_code": outcome.code if outcome else None,
        "message": last_part(outcome.message) if outcome else "",
        "data": outcome.summary if outcome else None,
        "output": settings.output_dir or str(settings.folder),
        "host": socket.gethostname(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
