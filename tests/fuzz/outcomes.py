"""What came of a harmed file: a clean error, accepted, or a fault, by exit code, output and what lies in the folder."""

import fnmatch
import hashlib
import json
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz import mutations
from fuzz.subjects import Subject

LIMIT = 20  # seconds; what takes longer hangs
FINISHED = 10  # finetune --check: nothing left to do
SOUND: dict[Subject, str] = {}  # what is printed for whole files, where harm to a cache must not change it
GOOD = ("error", "accepted")
FAULTS = ("traceback", "hang", "partial", "unclear")
REPR = re.compile(r"\b[A-Z]\w*(Error|Exception|Warning)\(|object at 0x|^error: \w+Error\b", re.MULTILINE)


@dataclass
class Case:
    """A harmed file and its command, before and after."""

    number: int
    subject: Subject
    mutation: mutations.Mutation
    argv: list[str]
    folder: Path
    before: dict[str, str]
    pid: int = 0
    started: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What came of a case: one of GOOD or FAULTS, and what was seen."""

    number: int
    subject: str
    command: str
    mutation: mutations.Mutation
    kind: str
    seen: str
    seconds: float
    said: str


def inventory(folder: Path) -> dict[str, str]:
    """Every path below a folder with what it is: links by their target, files by their content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        elif path.is_file() and path.stat().st_size < 50 << 20:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            status = path.lstat()
            found[name] = f"{status.st_mode} {status.st_size} {status.st_mtime_ns}"
    return found


def judge(case: Case, status: int) -> Outcome:
    """What a case came to."""
    seconds = time.monotonic() - case.started
    said, told = (
        (case.folder.parents[2] / f"{case.number}.{name}").read_bytes().decode("utf-8", "replace")
        for name in ("stdout", "stderr")
    )
    code = os.waitstatus_to_exitcode(status)
    code = 0 if code == FINISHED and case.subject.command == "finetune" else code
    kind, seen = judge_end(case, code, said, told, seconds)
    if kind in GOOD:
        after = inventory(case.folder.parent.parent)
        left = leftovers(case, after, code)
        if left:
            kind, seen = "partial", f"exit {code}; {left}; {seen}"
    if kind == "accepted" and case.subject.same and SOUND.setdefault(case.subject, said) != said:
        kind, seen = "partial", f"another answer than with whole files: {said[:300]!r}; {seen}"
    return Outcome(case.number, case.subject.name, case.subject.command, case.mutation, kind, seen, seconds, said)


def judge_end(case: Case, code: int, said: str, told: str, seconds: float) -> tuple[str, str]:
    """(kind, what was seen) by exit code and output."""
    last = "\n".join(told.strip().splitlines()[-12:])
    if code == -signal.SIGKILL and seconds >= LIMIT:
        return "hang", told[-3000:]
    if "Traceback (most recent call last)" in told or code not in (0, 1, 2) or "Fatal Python error" in told:
        return "traceback", f"exit {code}; {last}"
    problem = problem_of_stdout(case, code, said)
    if problem:
        return "partial", f"exit {code}; {problem}; {last}"
    if code == 0:
        return "accepted", last
    message = "\n".join(re.findall(r"^(?:error|stopped): .*", told, re.MULTILINE | re.DOTALL))
    if not message or REPR.search(message) or len(message) > 20_000:
        return "unclear", last
    return "error", message


def problem_of_stdout(case: Case, code: int, said: str) -> str:
    """Why stdout is not what the command documents, or ""."""
    wanted = case.subject.speaks
    try:
        rows = [json.loads(line, parse_constant=strict) for line in said.rstrip("\n").split("\n")] if said else []
    except ValueError as error:
        return f"stdout is no strict JSON lines ({error}): {said[-200:]!r}"
    if said and not said.endswith("\n"):
        return f"stdout ends within a line: {said[-100:]!r}"
    if wanted == "always":
        good = len(rows) == 1 and set(rows[0]) == {"code", "msg", "data"} and rows[0]["code"] == code
        return "" if good else f"stdout is {said[:200]!r} with exit code {code}"
    count = len(rows)
    good = count == 0 if code or wanted == "nothing" else count == 1 if wanted == "one" else count > 0
    flagged = case.subject.flags and not code  # an output file was asked for
    return "" if good or (flagged and count == 0) else f"stdout has {count} lines with exit code {code}"


def strict(name: str) -> Any:
    """NaN and Infinity are no JSON."""
    raise ValueError(f"{name} is no JSON")


def leftovers(case: Case, after: dict[str, str], code: int) -> str:
    """What was changed, lost or left behind that the command had no business with, or ""."""
    subject = case.subject
    allowed = subject.writes if code == 0 else subject.keeps
    changed = []
    for name in sorted(after.keys() | case.before.keys()):
        if after.get(name) == case.before.get(name):
            continue
        short = name.removeprefix("a/b/")
        permitted = any(fnmatch.fnmatch(short, pattern) for pattern in allowed)
        if permitted and not name.endswith((".part", ".tmp")):
            continue
        if after.get(name) == "folder" and (permitted or subject.flags):
            continue
        word = "left" if name not in case.before else "lost" if name not in after else "changed"
        changed.append(f"{word} {short}")
    return ", ".join(changed[:5])
