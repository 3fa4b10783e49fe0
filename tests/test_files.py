"""llmops/files.py: every kind of file that cannot be read or written is one sentence; what is written is whole."""

import errno
import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from job.state import alone
from llmops import files, json_text
from llmops.console import RunStopped, UserError
from llmops.machine.locks import lock

DEEP = "[" * 90 + "]" * 90


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Path.mkdir, "is a folder"),
        (make_fifo, "is a named pipe"),
        (make_loop, "is a loop of links"),
        (make_dangling, "is a link to"),
        (make_socket, "is a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: None, "does not exist; write it"),
    ],
)
def test_what_is_no_file_is_a_sentence(tmp_path: Path, make, words: str) -> None:
    path = tmp_path / "data"
    make(path)
    with pytest.raises(UserError, match=words):
        files.read_json(path, "the settings", "write it")


def test_names_that_cannot_exist(tmp_path: Path) -> None:
    for path, words in (
        (Path("a\0b"), "NUL"),
        (tmp_path / ("n" * 300), "name is too long"),
        (tmp_path / "file" / "below", "a part of the path is a file"),
    ):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=words):
            files.read_text(path)


@pytest.mark.skipif(os.getuid() == 0 and not os.path.exists("/usr/bin/setpriv"), reason="root reads everything")
def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "secret").chmod(0)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    code = f"from pathlib import Path; from llmops import files; files.read_json(Path({str(tmp_path / 'secret')!r}))"
    drop = ["setpriv", "--reuid=65534", "--clear-groups"] if os.getuid() == 0 else []
    done = subprocess.run(
        [*drop, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )  # fmt: skip
    if "ModuleNotFoundError" in done.stderr or "No module named" in done.stderr or not done.stderr:
        pytest.skip("another user cannot run this Python here")
    assert "cannot be read by user id" in done.stderr


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"a": 1', "broken JSON"),
        ('{"a"：1}'.encode(), "column 5.; write : and not the full-width ："),
        ("{“a”: 1}".encode(), 'column 2.; write " and not the full-width “'),
        ('{"a": 1，"b": 2}'.encode(), "column 8.; write , and not the full-width ，"),
        (b"", "broken JSON"),
        (DEEP.encode(), "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "thousands of digits"),
        (b'"\\ud800"', "surrogate"),
        (b'["\\uDC00x"]', "surrogate"),
        ('{"名": 1}'.encode("gb18030"), "from GBK"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04\xff\xff", "Office document"),
        (b"\x1f\x8b\xff", "gunzip"),
        (b"\xff\0\0\0", "binary"),
    ],
)
def test_broken_json_is_a_sentence(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=words) as caught:
        files.read_json(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_pairs_and_deep_enough_values_are_read() -> None:
    assert json_text.parse_json('"\\ud83d\\ude00"') == "😀"
    assert json_text.parse_json('"\\\\ud800"') == "\\ud800"  # a backslash and letters
    assert json_text.parse_json("[" * 64 + "]" * 64)
    assert json_text.parse_json("[" + "[1]," * 500 + "[2]]")[-1] == [2]


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with open(path, "wb") as stream:
        stream.truncate(300 << 20)
    with pytest.raises(UserError, match="has 300 MiB, expected at most 256"):
        files.read_json(path)


def test_json_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y"}\r\n\n  \n{"a"\n\xff\n'.encode().replace(b"\xc3\xbf", b"\xff"))
    rows = list(files.json_lines(path))
    assert [row.number for row in rows] == [1, 4, 5]
    assert rows[0].value == {"a": "x\u2028y"}
    assert "broken JSON" in rows[1].problem
    assert "not UTF-8" in rows[2].problem


def write_half(path: Path) -> None:
    with files.writing(path) as stream:
        stream.write("half")
        raise ZeroDivisionError


def test_written_files_are_whole_or_the_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    files.write_json(path, {"a": "中"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "中"}
    assert path.stat().st_mode & 0o777 == 0o666 & ~files.current_umask()
    path.chmod(0o600)
    with pytest.raises(ZeroDivisionError):
        write_half(path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "中"}
    files.write_text(path, "2")
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]


def test_links_are_followed_and_devices_stay(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "x"
    (tmp_path / "null").symlink_to("/dev/null")
    files.write_text(tmp_path / "null", "x")
    assert Path("/dev/null").is_char_device()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, words in ((tmp_path / "file" / "x", "a part of the path is a file"), (tmp_path, "it is a folder")):
        with pytest.raises(UserError, match=words):
            files.write_text(path, "x")
    if Path("/dev/full").exists():
        with pytest.raises(RunStopped, match="full"):
            files.write_text(Path("/dev/full"), "x" * 100_000)


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    code = (
        "import resource, signal, errno\n"
        "from pathlib import Path\n"
        "from llmops import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"files.write_text(Path({str(path)!r}), 'x' * 100_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "cannot be written" in done.stderr
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_strict_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text.dumps({"a": float("nan")})
    assert json_text.finite(float("inf")) is None
    assert json_text.finite(1.5) == 1.5
    assert json.loads(json_text.dumps(os.fsdecode(b"\xff"))) == "\udcff"  # a file's name that is no UTF-8
    json_text.dumps(os.fsdecode(b"\xff")).encode("utf-8")


def test_a_lock_keeps_others_out(tmp_path: Path) -> None:
    order = []
    with lock(tmp_path / "lock", "busy"):
        with pytest.raises(UserError, match="busy"), lock(tmp_path / "lock", "busy"):
            pass

        def second() -> None:
            with lock(tmp_path / "lock", "busy", wait=True):
                order.append("second")

        thread = threading.Thread(target=second)
        thread.start()
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
@pytest.mark.parametrize("wait", [False, True])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, wait: bool) -> None:
    """Lustre without -o flock, NFS without a lock service."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    sentence = rf"lock cannot be locked \({os.strerror(number)}\): its file system has no locks; have it mounted with"
    with pytest.raises(UserError, match=sentence), lock(tmp_path / "lock", "busy", wait):
        pass
    with pytest.raises(UserError, match=sentence), alone(tmp_path, threading.Event(), print):
        pass


def test_places(tmp_path: Path) -> None:
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "name").symlink_to(tmp_path / "model")
    model = tmp_path / "model"
    assert files.same_or_inside(tmp_path / "name", model)
    assert files.same_or_inside(tmp_path / "x" / ".." / "model" / "new", model)
    assert not files.same_or_inside(tmp_path, model)
    assert not files.same_or_inside(tmp_path / "model2", model)


def test_a_name_that_cannot_be_written_is_known_beforehand(tmp_path: Path) -> None:
    assert files.target_problem(tmp_path / "new.json") is None
    assert files.target_problem(Path("new.json")) is None
    for path, words in (
        (tmp_path / ("a" * 3000), "File name too long"), (Path("a\0b"), "null"), (tmp_path, "expected a file's name"),
        (tmp_path / "none" / "x", "in a folder that exists"),
    ):  # fmt: skip
        assert words in (files.target_problem(path) or ""), path
