"""Where logs come from and where pictures go: packed files, pipes, devices, links, growing files; always an end."""

import bz2
import contextlib
import gzip
import json
import lzma
import os
import pty
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment
from test_diagnosis import LOGS, SCRIPT, call, levels, write_log

from eval.diagnosis import sources
from llmops.console import RunStopped

TEXT = (LOGS / "ours.txt").read_bytes()
OVERFITTED = [3, 1.5, 1.2, 1.3, 1.5, 1.6, 1.8]


def run_script(*arguments: str, limit: float = 30) -> subprocess.CompletedProcess[str]:
    """The command as a process that must end in time."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )


# --- packed logs
@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_logs(pack: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = call(capfd, str(LOGS / "ours.txt"), "--explain")
    half = len(TEXT) // 2
    for data in (pack(TEXT), pack(TEXT[:half]) + pack(TEXT[half:]), pack(TEXT) + bytes(64)):  # several streams; padding
        (tmp_path / "log.packed").write_bytes(data)
        assert call(capfd, str(tmp_path / "log.packed"), "--explain") == plain


def test_a_packed_log_that_is_still_written_or_damaged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.gz"
    log.write_bytes(gzip.compress(TEXT)[:-200])
    assert call(capfd, str(log))[0] == 0
    data = bytearray(gzip.compress(TEXT * 50))
    data[60:80] = bytes(20)
    log.write_bytes(bytes(data))
    code, answer, _ = call(capfd, str(log))
    assert (code, "is packed, and damaged" in answer["msg"]) == (2, True)
    code, answer, _ = call(capfd, str(log), "--watch")
    assert (code, "--watch follows plain text" in answer["msg"]) == (2, True)


def test_what_is_packed_is_unpacked_in_pieces() -> None:
    """A megabyte of gzip may hold a gigabyte."""
    packed = gzip.compress(bytes(64 << 20), 9)
    sizes = [len(piece) for piece in sources.unpacked(iter([packed]), "log.gz")]
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= sources.PIECE


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x28\xb5\x2f\xfd" + bytes(50), "packed with zstd; unpack it"),
        (b"PK\x03\x04" + bytes(50), "a zip archive or a checkpoint's weights"),
    ],
)
def test_what_is_no_log_is_named(data: bytes, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log").write_bytes(data)
    code, answer, _ = call(capfd, str(tmp_path / "log"))
    assert (code, text in answer["msg"]) == (2, True)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x18\x00\x00\x00\x00\x00\x00\x00\xa3\x7f\x4b\x22\x09\x00\x00\x80brain.Event:2", "a TensorBoard event file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "a picture"),
        (bytes(range(256)) * 40, "it is binary"),
        (b'{"epoch": 1.0, "global_step": 9, "log_history": []}', "its log_history holds none"),
        (b'{"epoch": 1.0, "global_step": 9, "log_history": [{"learning_rate": 1e-05, "step": 5}]}', "holds none"),
        (b"epoch,accuracy,f1\n1,0.5,0.4\n2,0.6,0.5\n", "a table with the columns epoch, accuracy, f1, of which none"),
        (b"Wall time,Step,Value\n1.5,1,2.5\n1.6,2,2.25\n", "the columns Wall time, Step, Value"),
        (b"New best val_loss: 0.4\nbest loss: 0.3\n", "2 lines with one that may be an evaluation's or a record"),
        (b"step: 10, lr: 1e-5\nstep: 20, lr: 1e-5\n", "tells 2 steps but no loss; let the training print it"),
        (b"", "it is empty"), (b"\x00" * 5000, "it is empty"),
    ],
)  # fmt: skip
def test_refusals_name_what_was_found(
    data: bytes, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log").write_bytes(data)
    code, answer, _ = call(capfd, str(tmp_path / "log"))
    assert (code, text in answer["msg"]) == (1, True), answer["msg"]


# --- what is no plain file
def test_pipes(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    started = time.monotonic()
    done = run_script(str(pipe))
    assert (done.returncode, "a named pipe that nobody writes to" in done.stdout) == (2, True)
    assert time.monotonic() - started < 20
    writer = threading.Thread(target=lambda: pipe.write_bytes(TEXT), daemon=True)
    writer.start()
    assert json.loads(run_script(str(pipe)).stdout)["code"] == 0
    shell = f"{sys.executable} {SCRIPT} <(sleep 0.3; cat {LOGS / 'ours.txt'})"
    done = subprocess.run(
        ["bash", "-c", shell], env=environment(), capture_output=True, text=True, timeout=30, check=True
    )
    assert json.loads(done.stdout)["code"] == 0
    done = run_script(str(pipe), "--watch")
    assert (done.returncode, "is a named pipe, expected a file" in done.stdout) == (2, True)


def test_a_pipe_whose_writer_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "FIFO_SILENCE", 0.2)
    os.mkfifo(tmp_path / "pipe")
    silent = os.open(tmp_path / "pipe", os.O_RDWR)
    code, answer, _ = call(capfd, str(tmp_path / "pipe"))
    os.close(silent)
    assert (code, "whose writer said nothing for 0.2 seconds" in answer["msg"]) == (2, True)


def test_devices_links_and_odd_paths(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "good").symlink_to(LOGS / "ours.txt")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    for path, text in (
        ("/dev/zero", "is a device, expected a file"), ("/dev/null", "is a device"),
        (f"{tmp_path}/a", "is a loop of links"),
        (f"{tmp_path}/dangling", "is a link to"), (f"{tmp_path}/s", "is a socket"), ("x\0y", "without NUL characters"),
        (f"{tmp_path}/good/x", "a part of the path is a file"), ("n" * 300, "the name is too long"),
    ):  # fmt: skip
        for watching in ((), ("--watch", "--watch_interval", "0.05", "--watch_until_idle", "0.1")):
            code, answer, _ = call(capfd, path, *watching)
            assert (code, text in answer["msg"]) == (2, True), (path, answer["msg"])
    listener.close()
    assert call(capfd, str(tmp_path / "good"))[0] == 0
    reader, writer = pty.openpty()
    assert "is a device" in call(capfd, os.ttyname(writer))[1]["msg"]
    os.close(reader)
    os.close(writer)


def test_a_folder_whose_checkpoints_are_dangling(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint-9").symlink_to(tmp_path / "gone")
    code, answer, _ = call(capfd, str(tmp_path))
    assert (code, "holds none of log.txt" in answer["msg"]) == (2, True)


def test_a_log_that_grows_faster_than_it_is_read(tmp_path: Path) -> None:
    """It is read as far as it went when it was opened."""
    log = write_log(tmp_path / "log.txt", [2.0] * 100)
    size = log.stat().st_size
    pieces = sources.file_pieces(log)
    read = 0
    with open(log, "ab") as stream:
        for piece in pieces:
            read += len(piece)
            stream.write(b"x" * sources.PIECE)
            stream.flush()
    assert read == size


def test_a_log_that_is_rotated_while_it_is_watched(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.txt", [2.0, 1.5, 1.25, 1.0], [3, 1.5, 1.2, 1.1, 1.09], every=1)
    command = [sys.executable, str(SCRIPT), str(log), "--watch", "--watch_interval", "0.02", "--watch_until_idle", "1"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert levels(json.loads(process.stdout.readline()))[0] == "Low"
    log.rename(tmp_path / "log.txt.1")
    time.sleep(0.1)
    write_log(log, [2.0 - i / 50 for i in range(70)], OVERFITTED)
    assert levels(json.loads(process.stdout.readline()))[0] == "High"
    assert "begins anew" in process.communicate(timeout=30)[1]
    assert process.returncode == 0


# --- content that is trouble
@pytest.mark.parametrize(
    "trouble",
    [
        b'{"step": ' + b"9" * 5000 + b', "loss": ' + b"8" * 5000 + b"}\n", b"[" * 200_000 + b"\n",
        b'{"a":' * 100_000 + b"\n", b'{"step": 1, "loss": 2.0, "text": "\\ud800"}\n', b"\xed\xa0\x80 loss: 2\n",
        b"\x00" * 100_000, bytes(range(256)) * 400, b"a" * 3_000_000 + b"\n", b"loss " * 200_000 + b"\n",
        b"loss: " * 100_000 + b"\n", b"1" * 1_000_000 + b"\n", b"loss=1," * 100_000 + b"\n",
        b"rank: " + b"7" * 6000 + b"\n",
        b"epoch\tloss\n" * 2000, b"loss," * 5000 + b"\n" + b"1," * 5000 + b"\n", b" " * 1_000_000 + b"\n",
        b"Epoch [1/" * 50_000 + b"\n", b'"' * 300_000 + b"\n", b"test loss " * 100_000 + b"\n", b"%|" * 300_000 + b"\n",
    ],
)  # fmt: skip
def test_trouble_takes_no_time_and_no_traceback(
    trouble: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.txt").write_bytes(trouble + TEXT + trouble)
    started = time.process_time()
    code, answer, err = call(capfd, str(tmp_path / "log.txt"), "--explain")
    assert (code, answer["code"]) == (0, 0)
    assert "Traceback" not in err
    assert time.process_time() - started < 4


# --- pictures
def test_a_picture_replaces_pictures_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path / "log.txt", [3.0 - i / 30 for i in range(60)], OVERFITTED)
    notes = tmp_path / "notes.md"
    notes.write_text("mine")
    for target, text in ((notes, "is no PNG"), (log, "is no PNG"), (Path("/dev/null"), "is a device")):
        before = target.read_bytes()
        code, answer, _ = call(capfd, str(log), "--plot", str(target))
        assert (code, text in answer["msg"]) == (2, True)
        assert target.read_bytes() == before
    picture = tmp_path / "risks.png"
    for _ in range(2):
        assert call(capfd, str(log), "--plot", str(picture))[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "notes.md", "risks.png"]


def test_a_picture_that_cannot_be_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_log(tmp_path / "log.txt", [3.0 - i / 30 for i in range(60)], OVERFITTED)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, answer, err = call(capfd, str(log), "--plot", str(tmp_path / "risks.png"))
    assert (code, f"the disk of {tmp_path / 'risks.png'} is full" in answer["msg"]) == (1, True)
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    assert RunStopped.__doc__


def test_a_full_stdout() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(LOGS / "ours.txt")], env=environment(), stdout=full,
            stderr=subprocess.PIPE, text=True, timeout=30, check=False, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == 1
    assert "stdout cannot be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr


def test_bytes_in_a_name_that_are_no_text(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/l\xff.txt"
    with contextlib.suppress(OSError):
        Path(os.fsdecode(path)).write_bytes(TEXT)
        done = subprocess.run(
            [sys.executable, str(SCRIPT), path], env=environment(), capture_output=True, timeout=30, check=False
        )
        assert json.loads(done.stdout)["code"] == 0
    done = subprocess.run(
        [sys.executable, str(SCRIPT), path + b"x"], env=environment(), capture_output=True, timeout=30, check=False
    )
    assert (done.returncode, json.loads(done.stdout)["code"]) == (2, 2)
