"""What a run tells: log.txt, TensorBoard events and server, a progress line, the picture of the loss curves.

log.txt is one JSON object per line: step, epoch, loss, learning_rate, grad_norm, tokens_per_second, elapsed,
remaining (seconds); evaluation lines have eval_loss and retention_loss, in the FAQ scenario eval_accuracy, too. The
first line, of step 0, says in `chosen` what the run chose by itself. A value that is no number of JSON is null, and
`not_finite` names it: inf, -inf or nan.
"""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmops import files, json_text, pictures
from llmops.console import duration, log
from llmops.machine.processes import die_with_parent
from train.run_folder import LOG_NAME

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Hook = Callable[[threading.ExceptHookArgs], object]
CHOSEN = "chosen"
SERVE = Path(__file__).resolve().parent.parent / "serve" / "serve.py"
ACCURACY = "eval_accuracy"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.txt; a last line that was cut by a kill, and what is no line of ours, is left out."""
    if not path.is_file():
        return []
    values = (line.value for line in files.json_lines(path, "the log"))
    return [value for value in values if isinstance(value, dict) and isinstance(value.get("step"), int)]


class TrainingLog(TrainerCallback):
    """Writes log.txt and the progress line on the first process; one line at the start and the end on every node."""

    def __init__(
        self, output: Path, main: bool, speaks: bool, tokens: "TokenCounter", chosen: dict[str, Any] | None = None
    ) -> None:
        self.path = output / LOG_NAME
        self.main = main
        self.speaks = speaks
        self.tokens = tokens
        self.chosen = chosen or {}
        self.bar: Any = None
        self.started = self.marked = time.monotonic()
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop lines of steps that will be run again, open the progress line."""
        self.started = self.marked = time.monotonic()
        self.first_step = state.global_step
        if self.main:
            kept = [line for line in read_log(self.path) if state.global_step and line["step"] <= state.global_step]
            first = {"step": 0, "epoch": 0.0, CHOSEN: self.chosen, "elapsed": 0.0, "remaining": None}
            kept = [first, *(line for line in kept if CHOSEN not in line)]
            files.write_text(self.path, "".join(json_text.dumps(line) + "\n" for line in kept))
            from tqdm import tqdm

            terminal = sys.stderr.isatty()
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", file=sys.stderr,
                mininterval=0.5 if terminal else 10, dynamic_ncols=terminal, miniters=1,
            )  # fmt: skip
        elif self.speaks:
            log(f"{socket.gethostname()}: training, {state.max_steps} steps; progress is on the first node")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the progress line."""
        if self.bar:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Append one line to log.txt."""
        rate, logs = None, logs or {}
        if "loss" in logs:  # on every process: the counter is summed over all of them
            now = time.monotonic()
            rate = self.tokens.take() / max(now - self.marked, 1e-9)
            self.marked = now
        if not self.main or not ({"loss", "eval_loss"} & logs.keys()):
            return
        elapsed = time.monotonic() - self.started
        done = state.global_step - self.first_step
        remaining = elapsed / done * (state.max_steps - state.global_step) if done else None
        line: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        for key in ("loss", "learning_rate", "grad_norm", "eval_loss", ACCURACY, "retention_loss"):
            if key in logs:
                value = float(logs[key])
                line[key] = json_text.finite(value)
                if line[key] is None:  # such as the norm of an fp16 step that overflowed
                    line.setdefault("not_finite", {})[key] = str(value)
        if rate is not None:
            line["tokens_per_second"] = round(rate, 1)
        line["elapsed"] = round(elapsed, 2)
        line["remaining"] = round(remaining, 2) if remaining is not None else None
        files.append_text(self.path, json_text.dumps(line) + "\n")
        if self.bar:
            losses = [key for key in ("loss", "eval_loss", ACCURACY, "retention_loss") if line.get(key) is not None]
            shown = {key: f"{line[key]:.4g}" for key in losses}
            if rate is not None:
                shown["tokens/s"] = f"{rate:,.0f}"
            if "eval_loss" in line:
                text = ", ".join(f"{key} {value}" for key, value in shown.items())
                self.bar.write(f"step {state.global_step}/{state.max_steps}: {text}", file=sys.stderr)
            else:
                self.bar.set_postfix(shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the progress line."""
        if self.bar:
            self.bar.close()
        seconds = duration(time.monotonic() - self.started)
        if self.speaks:
            log(
                f"{socket.gethostname()}: {state.global_step} of {state.max_steps} steps done, "
                f"this start took {seconds}"
            )


class TokenCounter:
    """Tokens processed since they were last taken, summed over all processes."""

    def __init__(self) -> None:
        self.local = 0

    def take(self) -> int:
        """The sum over all processes; starts again from 0. Every process must call it."""
        import torch
        import torch.distributed as dist

        count, self.local = self.local, 0
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return count
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        total = torch.tensor(count, dtype=torch.int64, device=device)
        dist.all_reduce(total)
        return int(total)


def event_writer(folder: Path) -> "SummaryWriter":
    """What writes TensorBoard's events. Raises RunStopped on a full disk, UserError where it may not write.

    It writes in a thread. What that raises later is raised again by the next event, and ends the run there.
    """
    from torch.utils.tensorboard import SummaryWriter

    files.make_folder(folder, "the folder for TensorBoard's events")
    try:
        with TemporaryFile(dir=folder, buffering=0) as probe:
            probe.write(bytes(4096))  # first: in its thread the writer would only begin to fail
        threading.excepthook = once(threading.excepthook)
        return SummaryWriter(str(folder))
    except OSError as error:
        raise files.unwritable(folder, error) from error


def once(hook: Hook) -> Hook:
    """A hook for the errors of threads: one that its thread keeps, to raise it elsewhere, is not told of here too."""

    def tell(error: threading.ExceptHookArgs) -> None:
        if error.exc_value is None or getattr(error.thread, "exception", None) is not error.exc_value:
            hook(error)

    return tell


class SideServer(ABC):
    """A server beside the run that lives as long as this process; a context manager.

    `name` is what people know it by, `option` the beginning of its flags (--tensorboard_host, --tensorboard_port).
    `without` says what is still there when it cannot be served. It listens on this machine's loopback address unless
    the user says otherwise.
    """

    name, option, without = "", "", ""

    def __init__(self, folder: Path, host: str, port: int, enabled: bool) -> None:
        self.folder, self.host, self.port, self.enabled = folder, host, port, enabled
        self.process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """What is started."""

    def __enter__(self) -> "SideServer":
        if not self.enabled:
            return self
        problem = self._problem()
        if problem:
            log(f"warning: {problem}, {self.name} is not served; {self.without}")
            return self
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.process = subprocess.Popen(
            self.command(), preexec_fn=die_with_parent, env=environment, stdin=subprocess.DEVNULL,  # noqa: PLW1509
            stdout=subprocess.DEVNULL, stderr=self.stderr(),
        )  # fmt: skip
        everywhere = self.host in ("0.0.0.0", "::")
        shown = "localhost" if everywhere else f"[{self.host}]" if ":" in self.host else self.host
        log(f"{self.name}: http://{shown}:{self.port} while training runs")
        return self

    def stderr(self) -> int | None:
        """Where its messages go: nowhere."""
        return subprocess.DEVNULL

    def _problem(self) -> str | None:
        """Why nothing can listen at this address, if so."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except socket.gaierror:
            return f"--{self.option}_host {self.host} is no address"
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"port {self.port} is taken"
            return f"{self.host}:{self.port} cannot be used ({error.strerror})"
        return None

    def __exit__(self, *_: object) -> None:
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()


class TensorBoardServer(SideServer):
    """TensorBoard over a folder of events. It has no login."""

    name, option, without = "TensorBoard", "tensorboard", "events are in output_path/tensorboard"

    def command(self) -> list[str]:
        """TensorBoard's own program."""
        found = [sys.executable, "-m", "tensorboard.main", "--logdir", str(self.folder), "--host", self.host]
        return [*found, "--port", str(self.port)]


class ConsoleServer(SideServer):
    """The console of serve/ over the mount, without a model and at low priority: the run goes first.

    Its messages, one of which has the token, go to stderr.
    """

    name, option, without = "the console", "console", "bash serve/serve.sh serves it, too"

    def command(self) -> list[str]:
        """A process of its own: train never imports serve."""
        found = ["nice", "-n", "10", sys.executable, str(SERVE), "--mount_path", str(self.folder)]
        return [*found, "--host", self.host, "--port", str(self.port)]

    def stderr(self) -> int | None:
        """Where its messages go: to ours."""
        return None


def plot(lines: list[dict[str, Any]], picture: Path, title: str, best_step: int | None = None) -> None:
    """Draw train, evaluation and retention loss over the steps into a PNG."""
    pictures.prepare_labels([])
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.2), dpi=120)
    styles = {
        "loss": ("train", "#8fb3d9", 1.2),
        "eval_loss": ("test", "#d1495b", 2.2),
        "retention_loss": ("retention", "#2e7d5b", 2.2),
    }
    for key, (label, color, width) in styles.items():
        points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        marker = "" if key == "loss" and len(points) > 60 else "o"
        axes.plot(
            steps,
            values,
            label=f"{label} loss (last {values[-1]:.3g})",
            color=color,
            linewidth=width,
            marker=marker,
            markersize=4,
        )
    if best_step is not None:
        axes.axvline(best_step, color="#d1495b", linewidth=1, linestyle=":")
        axes.annotate("best test loss", (best_step, 1), xycoords=("data", "axes fraction"), xytext=(-4, -4),
                      textcoords="offset points", ha="right", va="top", fontsize=9, color="#d1495b")  # fmt: skip
    axes.set(title=title, xlabel="optimizer step", ylabel="loss per learned token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    figure.tight_layout()
    pictures.save(figure, picture)
