"""What harms a run at its end: numbers that are none, a full disk, data that is prepared anew, two starts at once."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FAST, ROOT, environment

from llmops.machine.locks import lock
from train import checkpointing

Start = Callable[..., subprocess.CompletedProcess[str]]
PATCHED = """
import errno, math, os, signal, sys
from pathlib import Path
from transformers import TrainerCallback
from llmops.machine import process_group
from train import checkpointing, finetune, outcome, session

train = session.train

def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]
"""
END = "\nprocess_group.leave(finetune.main(sys.argv[1:]))\n"
BROKEN = """
class Break(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if kind == "gradients" and state.global_step == step - 1:
            for p in trainable(model):
                p.register_hook(lambda gradient: gradient * math.inf)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if kind != "gradients" and state.global_step == step - 1:
            for p in trainable(model):
                p.data.fill_(math.nan)
            if kind == "weights":  # no evaluation before they are saved
                os.kill(os.getpid(), signal.SIGTERM)

def broken(config, trainer, schedule, rank):
    trainer.add_callback(Break())
    train(config, trainer, schedule, rank)

session.train = broken
"""


@pytest.fixture
def start(small_data: Path, checkpoints: dict[str, Path]) -> Start:
    """Start train/finetune.py, with some Python before it."""

    def run(before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable, "-c", PATCHED + before + END, "--model_name_or_path", str(checkpoints["llama"]),
            "--train_file", str(small_data / "datasets" / "train.jsonl"),
            "--output_path", str(small_data / "output_path"), *FAST, *arguments,
        ]  # fmt: skip
        return subprocess.run(
            command, env=environment() | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("kind", "step", "phrase", "saved"),
    [
        ("gradients", 12, "the gradients are not finite at step 12", 6),
        ("update", 12, "eval_loss is nan at step 12", 6),
        ("weights", 8, "the weights are not finite after step 8", 6),
    ],
)
def test_what_is_no_number_is_not_saved(
    start: Start, small_data: Path, kind: str, step: int, phrase: str, saved: int
) -> None:
    done = start(f"kind, step = {kind!r}, {step}\n{BROKEN}")
    assert done.returncode == 1, done.stderr[-3000:]
    assert f"stopped: {phrase}; lower --learning_rate" in done.stderr
    newest = checkpointing.newest_whole(small_data / "output_path")
    assert newest is not None
    assert checkpointing.step_of(newest) == saved


def test_the_end_of_a_run(start: Start, small_data: Path) -> None:
    """A full disk where the model is copied is a sentence; the catalog is the one that was learned; merged by one."""
    output, intents = small_data / "output_path", small_data / "datasets" / "intents.json"
    intents.write_text('["learned"]')
    faq = ["--scenario", "faq", "--max_steps", "2"]
    other = f"""
def meanwhile(*arguments):
    train(*arguments)
    Path({str(intents)!r}).write_text('["prepared anew"]')

session.train = meanwhile
"""
    full = """
def link_files(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

checkpointing.link_files = link_files
"""
    done = start(other + full, *faq)
    assert done.returncode == 1, done.stderr[-3000:]
    assert f"stopped: the disk of {output} is full; the checkpoints saved before are whole" in done.stderr
    intents.write_text('["learned"]')
    done = start(other, *faq)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((output / "intents.json").read_text()) == ["learned"]
    with lock(output / ".lock", "busy"):
        busy = start("", *faq, "--merge_lora", "true")
    assert busy.returncode == 2, busy.stderr[-3000:]
    assert f"another run is writing to {output}" in busy.stderr
    merging = "outcome.ChatModel.save_merged = lambda *arguments: os.kill(os.getpid(), signal.SIGTERM)"
    assert start(merging, *faq, "--merge_lora", "true").returncode == -15
    assert start("", *faq, "--merge_lora", "true").returncode == 0
    assert (output / "merged" / "config.json").is_file()


def test_settings_of_generation_that_cannot_be_saved(
    start: Start, small_data: Path, checkpoints: dict[str, Path]
) -> None:
    """As Vicuna's: a temperature without sampling, and a padding token that the Trainer sets to the tokenizer's."""
    base = shutil.copytree(checkpoints["llama"], small_data / "base")
    own = {"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}
    (base / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    done = start("", "--train_type", "all", "--max_steps", "1", "--model_name_or_path", str(base))
    assert done.returncode == 0, done.stderr[-3000:]
    saved = json.loads((small_data / "output_path" / "generation_config.json").read_text(encoding="utf-8"))
    assert saved == own


EVENTS = """
import sys
from pathlib import Path
from llmops.console import run_main
from train.training_log import event_writer
sys.exit(run_main(lambda: event_writer(Path(sys.argv[1]))))
"""


FULL = """
from tensorboard.compat.tensorflow_stub.io.gfile import GFile

class Fill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            def full(*arguments):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            GFile.write = GFile.flush = full

def filled(config, trainer, schedule, rank):
    trainer.add_callback(Fill())
    train(config, trainer, schedule, rank)

session.train = filled
"""


def test_a_disk_that_fills_up_on_the_way_is_one_sentence(start: Start, small_data: Path) -> None:
    """Also where TensorBoard's thread is the first to find it full."""
    done = start(FULL)
    assert done.returncode == 1, done.stderr[-3000:]
    assert f"stopped: the disk of {small_data / 'output_path'} is full; the checkpoints saved before are" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception in thread" not in done.stderr


def test_a_start_on_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    """All that comes before is there already, from the start that filled it."""
    full = f"mount -t tmpfs -o size=64k none {tmp_path}; mkdir {tmp_path}/tensorboard; cat /dev/zero >{tmp_path}/full"
    hide = ["unshare", "--mount", "bash", "-c"]
    if "No space left" not in subprocess.run([*hide, full], capture_output=True, text=True, check=False).stderr:
        pytest.skip("needs a mount namespace of its own, which root may have")
    (tmp_path.parent / "events.py").write_text(EVENTS, encoding="utf-8")
    script = f"{full} 2>/dev/null; exec {sys.executable} {tmp_path.parent}/events.py {tmp_path}/tensorboard"
    done = subprocess.run(
        [*hide, script], cwd=ROOT, env=environment() | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert f"stopped: the disk of {tmp_path}/tensorboard is full; nothing of it was written" in done.stderr


def test_a_folder_on_a_full_disk_ends_a_run(tmp_path: Path) -> None:
    """Exit code 1: the settings are right, and a platform may start it again."""
    hide = ["unshare", "--mount", "bash", "-c"]
    full = f"mount -t tmpfs -o nr_inodes=1 none {tmp_path}"
    if subprocess.run([*hide, full], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace of its own, which root may have")
    program = "from llmops import console, files; from pathlib import Path; import sys; "
    program += "sys.exit(console.run_main(lambda: files.make_folder(Path(sys.argv[1]))))"
    script = f"{full}; exec {sys.executable} -c '{program}' {tmp_path}/new"
    done = subprocess.run([*hide, script], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert f"the disk of {tmp_path}/new is full" in done.stderr


ENDS = """
import os, signal, sys
from llmops.console import log, print_json, run_main, stdout_to_stderr
def body():
    with stdout_to_stderr():
        print("a library's own words")
        sys.stdin.readline()
        log("ours")
        if sys.argv[1] == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
    print_json("done")
    return 0
sys.exit(run_main(body))
"""


INTERRUPTING = """
import os, signal, sys, time
from llmops.console import log, run_main
inside = False
def asked(*arguments):
    global inside
    if not inside:  # a reader that is slow would let them pile up
        inside = True
        log("asked to end")
        inside = False
def body():
    signal.signal(signal.SIGALRM, asked)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0005)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        log("a step")
    signal.setitimer(signal.ITIMER_REAL, 0)
    log("the last")
    return 0
os.set_blocking(2, sys.argv[1] == "waits")
sys.exit(run_main(body))
"""


@pytest.mark.parametrize("pipe", ["waits", "does not wait"])
def test_a_signal_logs_in_the_middle_of_a_message(pipe: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTING, pipe], cwd=ROOT, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stderr.splitlines()) == {"a step", "asked to end", "the last"}
    assert done.stderr.endswith("the last\n")


@pytest.mark.parametrize(("how", "code", "out"), [("finished", 0, '"done"\n'), ("interrupted", 130, "")])
@pytest.mark.parametrize("gone", [True, False])
def test_messages_that_nobody_reads_end_nothing(gone: bool, how: str, code: int, out: str) -> None:
    """`| tee` ends by the same Ctrl-C; a terminal is closed. Nor is Ctrl-C a fault of ours with a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENDS, how], cwd=ROOT, env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    if gone:
        process.stderr.close()
        process.stderr = None
    found, errors = process.communicate("\n", timeout=60)
    assert (process.returncode, found) == (code, out)
    assert "Traceback" not in (errors or "")
