"""Run one job to its end and tell how it ended: trainings, evaluations and similar questions.

bash job/run.sh --help        every setting; docs/jobs.md: how the platform and schedulers start it
stdout: with LOG_STYLE=plain one JSON object at the end (job.report.describe), with platform the progress.
Exit codes: those of the work (0, 1, 2), 143, 130 and 129 when a signal ended it; with API_URL 0 for every end that the
platform has taken, and 1 for one that it has not.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from job import publish
from job.places import find_data, find_model
from job.progress import Follower
from job.report import Outcome, Platform, Webhook, describe
from job.settings import ROOT, TRAIN, Settings, read_settings
from job.state import TAKEN, Busy, Told, alone
from job.tasks import Work, environment_of, plan
from job.work import Output, Signals, run
from llmops import files
from llmops.console import FailureJson, RunStopped, UserError, print_json, run_main, write_stdout


class Job:
    """A job with everything that it needs to speak: settings, output, signals, the platform and the webhook."""

    def __init__(self, settings: Settings, signals: Signals) -> None:
        self.settings, self.signals = settings, signals
        self.output = Output(settings.secrets.hidden, settings.platform_style)
        told = Told(settings.folder, settings.job_id, settings.api_url)
        tell = self.output.tell
        self.platform = Platform(settings, told, signals.stopped, tell) if settings.api_url else None
        self.webhook = Webhook(settings, signals.stopped, tell)
        self.held: tuple[int, ...] = ()

    def start(self) -> int:
        """Do the work and tell how it ended; the exit code. Raises Busy where another start is at work."""
        try:
            with alone(self.settings.folder, self.signals.stopped, self.output.tell) as lock:
                self.held = (lock,)
                if self.platform and self.platform.earlier() == ("success", TAKEN):
                    self.output.tell("this job has succeeded and the platform knows: nothing to do")
                    return 0
                self.webhook.report("started")
                with FailureJson(self._fault):
                    outcome = self.work()
                return self.end(outcome)
        except Busy:
            if self.signals.code:
                return self.signals.code
            raise
        except UserError as error:  # the job's folder cannot be made, or holds what is not ours
            return self.end(self._refused(error.code, error))

    def _fault(self, code: int, message: str) -> None:
        """A fault of ours goes its way with its traceback; the platform hears of it all the same."""
        self.end(Outcome(code, message=message))

    def work(self) -> Outcome:
        """The work's end; what a user can mend, and what stopped it, are ends as well."""
        try:
            work = self.prepare()
            return self.run(work)
        except UserError as error:
            return self._refused(error.code, error)
        except RunStopped as error:
            return self._refused(1, error)

    def _refused(self, code: int, error: UserError | RunStopped) -> Outcome:
        self.output.tell(f"error: {error}")
        return Outcome(code, message=self.settings.secrets.hidden(str(error)))

    def prepare(self) -> Work:
        """Find the model and the data. Raises UserError, and RunStopped where something does not come."""
        settings = self.settings
        if settings.run:
            publish.refuse_foreign(Path(settings.output_dir), settings.folder)
        fetch = self.fetch_model if settings.fetch == "true" else None
        data, goes_on = settings.folder / "data", settings.goes_on

        def model(variable: str, text: str) -> str:
            return find_model(variable, text, settings.environment, fetch)

        def file(variable: str, text: str) -> str:
            allowed = settings.fetch != "false"
            return find_data(variable, text, data, self.signals.stopped, self.output.tell, allowed, goes_on)

        return plan(settings, model, file)

    def fetch_model(self, name: str) -> Path:
        """Get a model from the hub: its folder. Raises RunStopped where the hub does not give it."""
        self.output.tell(f"{name} is not in the cache; fetching it from the hub, because FETCH is true")
        printed = self.settings.folder / "fetched.txt"
        command = ["bash", str(ROOT / "job" / "fetch_model.sh"), name]
        code = run(command, environment_of(self.settings), printed, self.output, self.signals, self.held)
        if code:
            said = self.output.end.splitlines() or [f"{name} cannot be fetched (exit code {code})"]
            raise RunStopped(said[-1].removeprefix("stopped: ").removeprefix("error: "))
        return Path(files.read_text(printed, "the model's folder").strip())

    def run(self, work: Work) -> Outcome:
        """Run the command; what it says at its end is the message of its failure."""
        if self.signals.code:
            return Outcome(self.signals.code, message="stopped before it began")
        printed = self.settings.folder / "printed.json"
        with ExitStack() as stack:
            if work.log and self.settings.platform_style:
                stack.enter_context(Follower(work.log, lambda line: write_stdout(line + "\n")))
            code = run(work.command, work.environment, printed, self.output, self.signals, self.held)
        if code:
            return failure(code, self.output.end)
        data, summary = work.collect(printed)
        return Outcome(0, data, summary)

    def end(self, outcome: Outcome) -> int:
        """Tell how it ended; the exit code. Nothing goes to the platform when the job was asked to end."""
        asked = bool(self.signals.code)
        if asked and not outcome.failed:
            stopped = Outcome(self.signals.code, message="stopped; start the job again to go on")
            self.output.tell("the job was asked to end: nothing is told to the platform")
            self._print("stopped", stopped)
            self.webhook.report("stopped", stopped)
            return stopped.code
        state = "failed" if outcome.code else "succeeded"
        self.webhook.report(state, outcome)
        if asked:
            self.output.tell("the job was asked to end and its work failed: nothing is told to the platform")
            self._print(state, outcome)
            return outcome.code
        taken = self.platform.report(outcome) if self.platform else False
        self._print(state, outcome)
        if taken:
            return 0
        if self.signals.code:
            return self.signals.code
        return outcome.code or (1 if self.platform else 0)

    def _print(self, state: str, outcome: Outcome) -> None:
        if not self.settings.platform_style:
            print_json(describe(self.settings, state, outcome))


def failure(code: int, message: str) -> Outcome:
    """The end of a command that failed, or that a signal ended which nobody sent to this job."""
    if code > 0:
        return Outcome(code, message=message, failed=code < 128)
    name = signal.Signals(-code).name
    hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
    return Outcome(128 - code, message=f"{message}\nthe command was ended by {name}{hint}".strip())


def speaker(environment: Mapping[str, str]) -> Settings | None:
    """Enough of the settings to tell that the others are wrong; None where nobody can be told."""
    given = {name: environment.get(name, "") for name in ("MOUNT_PATH", "WORK_DIR", "OUTPUT_DIR")}
    for names in (("JOB_ID",), ("API_URL", "TENANT_ID", "AUTH"), ("NOTIFY_URL", "NOTIFY_TOKEN")):
        more = {name: environment.get(name, "") for name in names}
        with suppress(UserError):  # it is one of those that are wrong
            read_settings(["--task", TRAIN], more)
            given |= more
    found = read_settings(["--task", TRAIN], given)
    return found if found.api_url or found.notify_url else None


def main(argv: Sequence[str]) -> int:
    """Read the settings, do the work, tell how it ended."""
    signals = Signals()
    signals.install()

    def body() -> int:
        try:
            settings = read_settings(argv, os.environ)
        except UserError as error:
            speaking = speaker(os.environ)
            if not speaking:
                raise
            job = Job(speaking, signals)
            job.output.tell(f"error: {error}")
            return job.end(Outcome(error.code, message=job.settings.secrets.hidden(str(error))))
        return Job(settings, signals).start()

    try:
        return run_main(body)
    finally:
        signals.ignore()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
