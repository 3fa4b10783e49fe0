"""A job's model and data, its progress lines, the whole model in OUTPUT_DIR, one start at a time."""

import base64
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT
from job_platform import platform_server, read_progress, wait_for

from eval.diagnosis import log_reader
from job import calls, places, publish
from job.places import cached_model, find_data, find_model, hub_cache
from job.progress import Follower, Lines, without_brackets
from job.state import alone
from job.work import Output, Signals, run
from llmops.console import RunStopped, UserError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A Hugging Face home with a model of two revisions, one whole model without a reference, and a broken one."""
    hub = tmp_path / "hf" / "hub"
    for name, revision in (("org--whole", "new"), ("org--whole", "old"), ("alone", "a1")):
        folder = hub / f"models--{name}" / "snapshots" / revision
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"")
    (hub / "models--org--whole" / "refs").mkdir()
    (hub / "models--org--whole" / "refs" / "main").write_text("new")
    (hub / "models--org--half" / "snapshots" / "b").mkdir(parents=True)
    (hub / "models--org--half" / "snapshots" / "b" / "config.json").write_text("{}")
    return tmp_path / "hf"


def test_models_are_folders_or_hub_ids_of_the_cache(cache: Path, tmp_path: Path) -> None:
    home = {"HF_HOME": str(cache)}
    assert find_model("M", str(tmp_path), home, None) == str(tmp_path)
    assert find_model("M", "builtin:ngram", home, None) == "builtin:ngram"
    assert find_model("M", "", home, None) == ""
    assert find_model("M", "org/whole", home, None) == str(cache / "hub" / "models--org--whole" / "snapshots" / "new")
    assert find_model("M", "alone", home, None).endswith("models--alone/snapshots/a1")
    assert cached_model("org/half", home) is None
    assert hub_cache({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}) == Path("/c")
    assert hub_cache({"XDG_CACHE_HOME": "/x"}) == Path("/x/huggingface/hub")


def test_a_user_without_an_account_has_no_cache() -> None:
    """docker run --user 12345, in an image that sets no HOME."""
    code = "import os; from job.places import hub_cache; os.setuid(54321); print(hub_cache({}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={}, capture_output=True, text=True, check=False)
    if "PermissionError" in done.stderr:
        pytest.skip("only root becomes another user")
    assert done.stdout == "~/.cache/huggingface/hub\n", done.stderr


def test_a_hub_is_asked_only_when_a_user_said_so(cache: Path) -> None:
    home = {"HF_HOME": str(cache)}
    with pytest.raises(UserError, match=r"BASE_MODEL_PATH is org/half, .* or set FETCH=true to fetch it from the hub"):
        find_model("BASE_MODEL_PATH", "org/half", home, None)
    asked: list[str] = []

    def fetch(name: str) -> Path:
        asked.append(name)
        return Path("/fetched")

    assert find_model("M", "org/whole", home, fetch) != "/fetched"
    assert find_model("M", "org/half", home, fetch) == "/fetched"
    assert asked == ["org/half"]
    for text in ("/data/base-model/gone", "../x", "a/b/c", "org/..", "org/na me"):
        with pytest.raises(UserError, match="which is no folder and no hub id; check the path"):
            find_model("M", text, home, fetch)


Fetch = Callable[..., str]


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """find_data into a folder of this test, with short pauses."""
    monkeypatch.setattr(calls, "LONGEST_PAUSE", 0.05)
    said: list[str] = []

    def find(text: str, allowed: bool = True, goes_on: bool = False) -> str:
        return find_data("TRAIN_FILE", text, tmp_path / "data", threading.Event(), said.append, allowed, goes_on)

    find.said = said  # type: ignore[attr-defined]
    return find


def test_data_comes_from_an_address(fetch: Fetch, tmp_path: Path) -> None:
    """Also at the second attempt; its name keeps its kind; only a training that goes on takes what is there."""
    with platform_server() as server:
        server.stored["/files/a.json"] = b"[1]" * 100_000
        server.faults = ["drop", 503]
        address = f"{server.url}/files/a.json?token=0123456789"
        path = Path(fetch(address))
        assert path.parent == tmp_path / "data"
        assert path.suffix == ".json"
        assert path.read_bytes() == server.stored["/files/a.json"]
        count = len(server.calls)
        server.stored["/files/a.json"] = b"[2]"
        anew = address.replace("0123456789", "9876543210")  # signed anew, or another file
        assert fetch(anew, goes_on=True) == str(path)
        assert len(server.calls) == count == 3
        said = fetch.said  # type: ignore[attr-defined]
        assert said[-1].endswith("is there from an earlier start")
        assert fetch(anew) == str(path)
        assert path.read_bytes() == b"[2]"
        assert not [text for text in said if "0123456789" in text or "9876543210" in text]
    assert fetch("/data/a.jsonl,/data/b.jsonl") == "/data/a.jsonl,/data/b.jsonl"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [path.name]


def test_a_login_in_an_address_goes_no_further(fetch: Fetch) -> None:
    """Name and password are the first server's alone, and in no message."""
    with platform_server() as store, platform_server() as server:
        store.stored["/a.jsonl"] = b"{}"
        address = f"{server.url}/moved?to={store.url}/a.jsonl".replace("://", "://user:p%40ssw0rd@", 1)
        assert Path(fetch(address)).read_bytes() == b"{}"
        login = base64.b64encode(b"user:p@ssw0rd").decode()
        assert server.calls[0].headers["authorization"] == f"Basic {login}"
        assert "authorization" not in store.calls[0].headers
        assert not [text for text in fetch.said if "ssw0rd" in text]  # type: ignore[attr-defined]


def test_data_that_does_not_come(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "FETCH_SECONDS", 0.2)
    with platform_server() as server:
        with pytest.raises(RunStopped, match=r"a\.jsonl does not come \(HTTP 404 .*\); check the address and who may"):
            fetch(f"{server.url}/a.jsonl")
        server.faults = [500] * 99
        with pytest.raises(RunStopped, match=r"does not come \(HTTP 500 .*\); check the network"):
            fetch(f"{server.url}/a.jsonl")
        with pytest.raises(UserError, match="and FETCH is false; set FETCH=auto, or give a path"):
            fetch(f"{server.url}/a.jsonl", allowed=False)


def test_half_a_file_is_none(fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection ends before the length that was promised: another attempt, and no file of it."""
    monkeypatch.setattr(places, "FETCH_SECONDS", 0.2)
    script = (
        "import socket\ns = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
        "while True:\n c, _ = s.accept(); c.recv(9999)\n"
        " c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 100\\r\\n\\r\\nabc'); c.close()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        port = server.stdout.readline().strip()
        try:
            with pytest.raises(RunStopped, match="it broke off after 3 of 100 bytes"):
                fetch(f"http://127.0.0.1:{port}/a.jsonl")
        finally:
            server.kill()
    assert list((tmp_path / "data").iterdir()) == []


def test_a_server_that_falls_silent_amid_a_file(fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is the network's fault and not the file's: another attempt brings it."""
    monkeypatch.setattr(places, "ATTEMPT_SECONDS", 0.3)
    kept = []

    def serve() -> None:
        for body in (b"ab", *[b"abcd"] * 99):  # an attempt may have given up before it was answered
            with suppress(OSError):
                connection, _ = server.accept()
                kept.append(connection)
                connection.recv(9999)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + body)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        path = Path(fetch(f"http://127.0.0.1:{server.getsockname()[1]}/a.jsonl"))
        server.shutdown(socket.SHUT_RDWR)
    assert path.read_bytes() == b"abcd"
    assert "a.jsonl does not come: timed out; again in" in fetch.said[0]  # type: ignore[attr-defined]
    assert list((tmp_path / "data").iterdir()) == [path]
    for connection in kept:
        connection.close()


LOG = [
    {"step": 0, "epoch": 0.0, "chosen": {"split": {"rows": 4}}, "elapsed": 0.0, "remaining": None},
    {"step": 0, "epoch": 0.0, "eval_loss": 3.5, "retention_loss": 3.0, "elapsed": 0.1, "remaining": None},
    {"step": 1, "epoch": 0.5, "loss": 3.88, "learning_rate": 2e-05, "grad_norm": 1.5, "tokens_per_second": 9.0},
    {"step": 2, "epoch": 1.0, "loss": 2.5, "learning_rate": 1e-05, "grad_norm": None, "not_finite": {"grad_norm": "1"}},
    {"step": 2, "epoch": 1.0, "eval_loss": 3.2, "retention_loss": 3.0},
    {"step": 3, "epoch": 1.5, "loss": None, "not_finite": {"loss": "nan"}},
    {"step": 4, "epoch": 2.0, "loss": 2.25, "learning_rate": 0.0, "grad_norm": 1.0},
]  # fmt: skip


def test_each_line_is_what_the_platform_reads() -> None:
    """A loss and the last eval_loss in every line, and nothing that it would take for a loss of 0."""
    lines = Lines()
    told = [text for text in map(lines.take, LOG) if text]
    assert told[0] == (
        "{'rank': 0, 'epoch': 0.5, 'step': 1, 'loss': 3.88, 'learning_rate': 2e-05, 'grad_norm': 1.5, 'eval_loss': 3.5}"
    )
    seen = read_progress("\n".join(told))
    assert [(e["step"], e["epoch"], e["loss"], e["eval_loss"]) for e in seen] == [
        (1, 0.5, 3.88, 3.5), (2, 1.0, 2.5, 3.5), (2, 1.0, 2.5, 3.2), (4, 2.0, 2.25, 3.2),
    ]  # fmt: skip
    assert all(text is None for text in map(lines.take, LOG))  # told already
    assert len(seen) == len(told) > 1


def test_the_diagnosis_reads_these_lines_too(tmp_path: Path) -> None:
    lines = Lines()
    path = tmp_path / "container.txt"
    path.write_text("".join(f"{text}\n" for text in map(lines.take, LOG) if text))
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval" / "diagnosis_monitoring.py"), str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["code"] == 0
    assert log_reader


def test_the_log_is_followed_while_it_grows_and_when_it_is_replaced(tmp_path: Path) -> None:
    path, told = tmp_path / "log.txt", []
    rows = [json.dumps(line) + "\n" for line in LOG]
    with Follower(path, told.append):
        path.write_text("".join(rows[:3]) + rows[3][:20])
        wait_for(lambda: len(told) == 1)
        (tmp_path / "new").write_text("".join(rows[:4]))  # what a second start makes of it
        (tmp_path / "new").replace(path)
        wait_for(lambda: len(told) == 2)
        with path.open("a") as stream:
            stream.write("".join(rows[4:]))
    assert len(told) == 4


def test_nothing_else_looks_like_progress() -> None:
    text = "config {'loss': 1, 'epoch': 2} {broken"
    assert read_progress(text)
    assert read_progress(without_brackets(text)) == []


def write_run(run: Path, names: dict[str, str], merged: bool) -> None:
    """A finished run's folder."""
    folder = run / "merged" if merged else run
    folder.mkdir(parents=True)
    for name, text in names.items():
        (folder / name).write_text(text)
    (run / "log.txt").write_text("")
    own = ["merged", "log.txt"] if merged else [*names, "log.txt"]
    (run / "run_manifest.json").write_text(json.dumps({"names": own}))


MODEL = {"config.json": "{}", "model.safetensors": "w", "tokenizer.json": "{}"}


@pytest.mark.parametrize("merged", [True, False])
def test_output_dir_becomes_a_whole_model(tmp_path: Path, merged: bool) -> None:
    output = tmp_path / "out"
    run, job = output / "run", output / "job"
    write_run(run, MODEL | {"old.txt": ""}, merged)
    publish.refuse_foreign(output, job)
    job.mkdir()
    assert set(publish.publish(run, output, job)) == {*MODEL, "old.txt"}
    assert {path.name for path in output.iterdir()} == {*MODEL, "old.txt", "run", "job"}
    assert (output / "model.safetensors").samefile((run / "merged" if merged else run) / "model.safetensors")
    ((run / "merged" if merged else run) / "old.txt").unlink()
    publish.refuse_foreign(output, job)  # its own
    publish.publish(run, output, job)
    assert not (output / "old.txt").exists()


def test_a_model_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds adapter_config\.json, which no job put there .* choose another OUT"):
        publish.refuse_foreign(tmp_path, tmp_path / "job")
    write_run(tmp_path / "run", {"adapter_model.safetensors": ""}, False)
    with pytest.raises(RunStopped, match="holds no whole model; --merge_lora true makes one"):
        publish.publish(tmp_path / "run", tmp_path, tmp_path / "job")


def test_one_start_at_a_time(tmp_path: Path) -> None:
    """The next one waits for the commands of the one before, too; asked to end, it does."""
    said: list[str] = []
    stopped = threading.Event()
    with alone(tmp_path, threading.Event(), said.append) as lock:
        left = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[lock])

    def tell(message: str) -> None:
        said.append(message)
        assert left.stdin
        left.stdin.close()  # it ends

    with alone(tmp_path, stopped, tell):
        assert left.wait(60) == 0
        assert "an earlier start of this job is still at work" in said[0]
        stopped.set()
        with pytest.raises(UserError, match="another start of this job"), alone(tmp_path, stopped, said.append):
            pass


def test_a_commands_messages_are_passed_on_without_secrets(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Line by line, with brackets turned for the platform; the end is kept; what it prints goes into a file."""
    script = (
        "import sys, time\nfor t in ('pass', 'word-123 {x}\\n', '\\r10%', '\\r20%', '\\n', 'tail'):\n"
        " sys.stderr.write(t); sys.stderr.flush(); time.sleep(0.05)\nprint('{}')\nsys.exit(3)\n"
    )
    output = Output(lambda text: text.replace("password-123", "***"), True)
    code = run([sys.executable, "-c", script], {}, tmp_path / "out", output, Signals())
    assert code == 3
    assert (tmp_path / "out").read_text() == "{}\n"
    assert output.end == "*** {x}\n\n10%\n20%\ntail"
    assert capfd.readouterr().err == "*** (x)\n\r10%\r20%\ntail\n"


def test_an_end_that_is_decided_stays(tmp_path: Path) -> None:
    """A signal while Python takes itself down does not become the exit code: found by the kills."""
    script = (
        f"import os, signal, sys; sys.path[:0] = [{str(ROOT)!r}]\nfrom job.work import Signals\n"
        "class Late:\n def __del__(self): os.kill(os.getpid(), signal.SIGTERM)\n"
        "late = Late(); late.me = late\nsignals = Signals(); signals.install(); signals.ignore()\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or has ended and nobody has asked how."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_what_a_command_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    script = f"sleep 60 & echo $! >{tmp_path}/pid; exit 0"
    assert run(["bash", "-c", script], {}, tmp_path / "out", Output(str, False), Signals()) == 0
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: has_ended(pid))


def test_the_keys_of_an_evaluation_are_those_of_ours(tmp_path: Path) -> None:
    from eval.samples import Answer, Sample, rows_of
    from job.tasks import detail

    answer: dict[str, Any] = {"key": "k", "prompt": "1 + 1 = ?", "prompt_tokens": 4, "cut": False, "lost": False,
                              "text": "2", "new_tokens": 1, "ended": True, "loglikelihoods": ()}  # fmt: skip
    known = {name: value for name, value in answer.items() if name in Answer.__dataclass_fields__}
    (row,) = rows_of([Sample("", ("2", "two"))], [Answer(**known)], [{"Rouge": 1.0}])
    assert detail(row) == {"question": "1 + 1 = ?", "reference": "2", "model_output": "2", "Rouge": 1.0}
