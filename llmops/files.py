"""The one door for files: read text and JSON that anybody may have made, write so that a file is whole or not there.

Everything that can be wrong with a file is one UserError: the file, the line, what was found, what was expected, how
to mend it. A disk that is full is a RunStopped. Standard library only, and nothing here imports torch.
"""

import errno
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, NamedTuple

from llmops import json_text
from llmops.console import RunStopped, UserError

MIB = 1 << 20
JSON_LIMIT = 256 * MIB  # of a JSON file that is read as one: settings, catalogs, reports
DATA_LIMIT = 4096 * MIB  # of a data file that is read as one: a JSON array, a csv
LINE_LIMIT = 64 * MIB  # of one line of JSON lines
BOM = b"\xef\xbb\xbf"
NOT_UTF8 = "not UTF-8"  # how a sentence on another encoding begins
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # how files of other kinds begin
OFFICE = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
GZIP = b"\x1f\x8b"
SPECIAL_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
FULL = (errno.ENOSPC, errno.EDQUOT)


class JsonLine(NamedTuple):
    """A line that is not blank: its number from 1, and what it holds, or in words what is wrong with it."""

    number: int
    value: Any
    problem: str | None


# --- reading


def open_regular(path: Path, what: str = "the file", cure: str = "") -> BufferedReader:
    """Open a regular file for reading; nothing that could block or never end (pipe, device) is opened.

    `what` names the file in the error ("the intents file"), `cure` says how to get it when it is not there.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UserError(unreadable(path, what, cure, error)) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((words for test, words in SPECIAL_KINDS if test(mode)), "no regular file")
        raise UserError(f"{what} {path} is {kind}, expected a file")
    return os.fdopen(descriptor, "rb")


def unreadable(path: Path, what: str, cure: str, error: OSError | ValueError) -> str:
    """The sentence for a file that cannot be opened."""
    if isinstance(error, ValueError):  # a NUL in the name
        return f"{what} {str(path)!r} cannot exist ({error}); pass a path without NUL characters"
    if error.errno == errno.ENOENT:
        if path.is_symlink():
            return f"{what} {path} is a link to {os.readlink(path)}, which does not exist; mend or replace the link"
        return f"{what} {path} does not exist" + (f"; {cure}" if cure else "")
    named = f"{what} {path}"
    sentences = {
        errno.EACCES: f"{named} cannot be read by user id {os.getuid()}; allow it (chmod, or start with another user)",
        errno.ELOOP: f"{named} is a loop of links; replace it by the file itself",
        errno.ENOTDIR: f"{named} does not exist: a part of the path is a file; check the path",
        errno.ENAMETOOLONG: f"{named} cannot exist: the name is too long; check the path",
        errno.ENXIO: f"{named} is a socket, expected a file",
    }
    return sentences.get(error.errno or 0, f"{named} cannot be read ({error.strerror})")


def read_bytes(path: Path, what: str = "the file", cure: str = "", limit: int = JSON_LIMIT) -> bytes:
    """The whole content of a file of at most `limit` bytes."""
    with open_regular(path, what, cure) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise UserError(
                f"{what} {path} has {size / MIB:,.0f} MiB, expected at most {limit / MIB:,.0f}; check the path"
            )
        try:
            return stream.read()
        except OSError as error:
            raise UserError(f"{what} {path} cannot be read ({error.strerror}); check the disk") from error


def read_text(path: Path, what: str = "the file", cure: str = "", limit: int = JSON_LIMIT) -> str:
    """The text of a UTF-8 file, without its byte order mark; line ends as they are."""
    raw = read_bytes(path, what, cure, limit)
    try:
        return raw.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: {not_utf8(raw)}") from error


def is_no_text(start: bytes) -> bool:
    """Whether a file begins as an Office document, an archive or UTF-16 does."""
    return start.startswith((*UTF16, *OFFICE, GZIP))


def not_utf8(raw: bytes) -> str:
    """What a text is that is no UTF-8, and how to make it so."""
    if raw.startswith(UTF16):
        return f"{NOT_UTF8} but UTF-16; save the file as UTF-8 (iconv -f utf-16 -t utf-8)"
    if raw.startswith(OFFICE):
        return f"{NOT_UTF8} but an Office document or archive; save the table as csv (UTF-8)"
    if raw.startswith(GZIP):
        return f"{NOT_UTF8} but compressed; unpack the file (gunzip)"
    if b"\0" in raw[:4096]:
        return f"{NOT_UTF8} but binary; check that this is the right file"
    return f"{NOT_UTF8}; save the file as UTF-8 (from GBK: iconv -f gb18030 -t utf-8)"


def read_json(path: Path, what: str = "the file", cure: str = "copy it again", limit: int = JSON_LIMIT) -> Any:
    """The value of a JSON file."""
    try:
        return json_text.parse_json(read_text(path, what, cure, limit))
    except json_text.BadJson as error:
        line = f"line {error.line}: " if error.line else ""
        raise UserError(f"{what} {path} is not JSON ({line}{error.problem}); {cure}") from error


def read_object(path: Path, what: str = "the file", cure: str = "copy it again") -> dict[str, Any]:
    """The object of a JSON file; another JSON value is an error."""
    value = read_json(path, what, cure)
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} holds {kind_of(value)}, expected an object; {cure}")
    return value


def kind_of(value: Any) -> str:
    """A JSON value's kind in words, by its Python type."""
    return f"a JSON {type(value).__name__}"


def shown(value: Any, limit: int = 60) -> str:
    """A value for an error message: its repr, cut where it is long, never a line break or half a character."""
    if isinstance(value, str):
        return repr(value[:limit]) + ("…" if len(value) > limit else "")
    text = json.dumps(value, default=repr)
    return text[:limit] + ("…" if len(text) > limit else "")


def plain(text: str, limit: int = 60) -> str:
    """A text for an error message as it is, when it is short and printable; else as `shown` writes it."""
    return text if len(text) <= limit and text.isprintable() else shown(text, limit)


def json_lines(path: Path, what: str = "the file", cure: str = "") -> Iterator[JsonLine]:
    """Every line that is not blank, parsed; the file opens at once, the lines are read as they are asked for.

    A line ends at \\n alone: U+2028 and its like are characters of a text.
    """
    lines = raw_lines(path, what, cure)
    return (JsonLine(number, *parse_line(raw)) for number, raw in lines if raw.strip())


def raw_lines(path: Path, what: str = "the file", cure: str = "") -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end) of every line; the file opens at once. A byte order mark is left out."""
    return _raw_lines(open_regular(path, what, cure), path)


def _raw_lines(stream: BufferedReader, path: Path) -> Iterator[tuple[int, bytes]]:
    with stream:
        number = 0
        while line := stream.readline(LINE_LIMIT + 1):
            number += 1
            if len(line) > LINE_LIMIT:
                raise UserError(f"{path}:{number}: a line of more than {LINE_LIMIT // MIB} MiB; expected shorter ones")
            yield number, (line.removeprefix(BOM) if number == 1 else line)


def parse_line(raw: bytes) -> tuple[Any, str | None]:
    """(value, None), or (None, what is wrong with the line)."""
    try:
        return json_text.parse_json(raw.decode("utf-8")), None
    except UnicodeDecodeError as error:
        return None, f"{not_utf8(raw)} (byte {error.start + 1} of the line)"
    except json_text.BadJson as error:
        return None, error.problem


# --- writing


@contextmanager
def writing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A stream into a file that has its name only when it is complete and on the disk; else the old one stays.

    It is written aside under a name of its own (several processes do not meet), fsynced and renamed. A link is
    followed. What is no regular file (/dev/null, a pipe) is written to directly. Text is UTF-8 with \\n.
    """
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    target = real(path)
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            with open(target, mode, **text) as stream:
                yield stream
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise UserError(f"{path} cannot be written: it is a folder; choose a file's name")
        descriptor, staged = tempfile.mkstemp(prefix=f".{target.name[:80]}.", suffix=".part", dir=target.parent)
        try:
            with open(descriptor, mode, **text) as stream:
                yield stream
                stream.flush()
                os.fchmod(descriptor, mode_for(target))
                os.fsync(descriptor)
            os.replace(staged, target)
        except BaseException:
            Path(staged).unlink(missing_ok=True)
            raise
        fsync_entry(target.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def mode_for(target: Path) -> int:
    """The permissions of a file that is replaced, or those of a new one."""
    return stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~current_umask()


def current_umask() -> int:
    """The process's file mode mask; reading it means setting it twice."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def unwritable(path: Path, error: OSError) -> UserError | RunStopped:
    """The error for a file that cannot be written; a full disk ends a run, everything else is for the user to mend."""
    if error.errno in FULL:
        return RunStopped(f"the disk of {path} is full; nothing of it was written: free some space and start again")
    reasons = {
        errno.EACCES: f"user id {os.getuid()} may not write there; allow it or choose another place",
        errno.EROFS: "the file system is read-only; choose another place",
        errno.ENOTDIR: "a part of the path is a file; choose another place",
        errno.EEXIST: "a part of the path is a file; choose another place",
        errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
        errno.ELOOP: "a part of the path is a loop of links; choose another place",
    }
    return UserError(f"{path} cannot be written: {reasons.get(error.errno or 0, error.strerror or str(error))}")


def write_text(path: Path, text: str) -> None:
    """Write a text file: it is either the old one or the new one, never half of it."""
    with writing(path) as stream:
        stream.write(text)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file, strict and whole."""
    write_text(path, json_text.dumps(value, indent) + "\n")


def target_problem(path: Path) -> str | None:
    """Why a file cannot be written under a name that a user gave, before hours go into what it shall hold; or None."""
    try:
        with suppress(FileNotFoundError):
            os.lstat(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        return f"{plain(str(path))} cannot be written ({why}); choose another name"
    if not is_folder(path.parent) or is_folder(path):
        return f"{path} cannot be written, expected a file's name in a folder that exists"
    if not os.access(path.parent, os.W_OK):
        return f"{path} cannot be written, expected a folder that you may write to"
    return None


def append_text(path: Path, text: str) -> None:
    """Add to the end of a file, such as a line of a log."""
    try:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise unwritable(path, error) from error


def append_line(path: Path, value: Any) -> None:
    """Add one JSON value as a line of its own, on the disk before this returns, also after a kill in mid-line.

    One writer at a time, among all processes; a link is not followed. What the disk did not take is taken back.
    """
    line = (json_text.dumps(value) + "\n").encode()
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        new = not path.exists()
        with open(os.open(path, flags, 0o666), "rb+", buffering=0) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            size = stream.seek(0, os.SEEK_END)
            if size and os.pread(stream.fileno(), 1, size - 1) != b"\n":
                line = b"\n" + line
            try:
                if stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(size)
                raise
        if new:
            fsync_entry(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def make_folder(path: Path, what: str = "the folder") -> None:
    """Make a folder and its parents. Raises RunStopped on a full disk, UserError where it is not possible otherwise."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = unwritable(path, error)
        if isinstance(found, RunStopped):
            raise found from error
        raise UserError(f"{what} {path} cannot be made: {found}") from error


def fsync_entry(path: Path) -> None:
    """Make one file, or the names in one folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make every file and folder below `folder` durable."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            fsync_entry(path)


# --- places


def is_file(path: Path) -> bool:
    """Whether a path is a regular file, links followed; False for one that cannot exist or cannot be reached."""
    return os.path.isfile(path)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder, links followed; False for one that cannot exist or cannot be reached."""
    return os.path.isdir(path)


def real(path: Path) -> Path:
    """A path without links and `..`; unlike Path.resolve also for a loop of links."""
    return Path(os.path.realpath(path))


def same_or_inside(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, links and `..` followed; neither has to exist."""
    here, there = real(path), real(folder)
    return here == there or there in here.parents or is_same(here, there)


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths are one existing file or folder (a mount may give it two names)."""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)
