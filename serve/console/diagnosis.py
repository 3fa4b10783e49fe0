"""The diagnosis of a run's log, by the command of eval/ in a process of its own.

serve never imports eval, and the command's answer on stdout is a contract; `--details` adds what its findings rest on.
One process at a time, at low priority, with a limit of time; an answer is kept while the log stays as it is, and a log
that grows is judged again after PAUSE seconds at the earliest, so that a training run beside it is left alone.
"""

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from llmops import files
from llmops.console import UserError
from serve.console.languages import told
from serve.console.mount import LOG_NAME, Mounted, stamp_of

COMMAND = Path(__file__).resolve().parents[2] / "eval" / "diagnosis_monitoring.py"
LIMIT = 20.0  # seconds
PAUSE = 10.0
KEPT = 512
Answer = dict[str, Any]


class Diagnoses:
    """Asks the command, one run at a time."""

    def __init__(self, mounted: Mounted) -> None:
        self.mounted = mounted
        self.lock = threading.Lock()
        self.kept: dict[Path, tuple[object, float, Answer]] = {}

    def of(self, name: str, language: str) -> Answer:
        """{"axis", "findings", "recommendations"} of a run, or {"problem": sentence}, the sentences in a language.

        Raises mount.NotFound.
        """
        found = self._of(name)
        if "problem" in found:
            return {"problem": told(found["problem"], language)}
        sentences = ("reason", "missing")
        findings = {
            risk: finding | {key: told(finding[key], language) for key in sentences if finding.get(key)}
            for risk, finding in found["findings"].items()
        }
        return found | {"findings": findings}

    def _of(self, name: str) -> Answer:
        """The answer as the command gives it."""
        log = self.mounted.folder(name) / LOG_NAME
        if log.is_symlink() or not files.is_file(log):
            return {"problem": f"{name} has no {LOG_NAME} yet"}
        known = self.kept.get(log)
        if not self.lock.acquire(blocking=known is None):
            assert known
            return known[2]  # of a moment ago: better than to wait for another run's
        try:
            stamp, known = stamp_of(log), self.kept.get(log)
            if known and (known[0] == stamp or time.monotonic() - known[1] < PAUSE):
                return known[2]
            answer = ask(log)
            while len(self.kept) >= KEPT:
                self.kept.pop(next(iter(self.kept)))
            self.kept[log] = (stamp, time.monotonic(), answer)
            return answer
        finally:
            self.lock.release()


def ask(log: Path) -> Answer:
    """Run the command on a log."""
    with tempfile.TemporaryDirectory(prefix="llmops-console.") as folder:
        details = Path(folder, "details.json")
        command = ["nice", "-n", "10", sys.executable, str(COMMAND), f"--log_path={log}", f"--details={details}"]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT, check=False)
        except subprocess.TimeoutExpired:
            return {"problem": f"the diagnosis took longer than {LIMIT:.0f} s"}
        value, problem = files.parse_line(done.stdout)
        if problem or not isinstance(value, dict):
            return {"problem": f"the diagnosis ended with code {done.returncode} and no answer"}
        if value.get("code") != 0:
            return {"problem": str(value.get("msg"))}
        try:
            found = files.read_object(details, "the details")
        except UserError as error:
            return {"problem": str(error)}
        return found | {"recommendations": value["data"]["recommendations"]}
