"""The machines of a hostfile in DeepSpeed's format, and which of them take part. Standard library only."""

import re
from pathlib import Path

from llmops import files
from llmops.console import UserError
from llmops.keyboard import instead

LINE = re.compile(r"(\S+)\s+slots\s*=\s*(\d{1,9})(?:\s+max[_-]slots\s*=\s*\d+)?")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # what ssh takes for an option, a user or a port is none
MOST = 1024
EXPECTED = "expected lines like 'worker-1 slots=8'"


def read_hostfile(path: Path) -> dict[str, int]:
    """Number of slots by machine, in the file's order. Raises UserError that names the line."""
    if not files.is_file(path):
        raise UserError(f"the hostfile {path} does not exist; {EXPECTED}")
    found: dict[str, int] = {}
    for number, line in enumerate(files.read_text(path, "the hostfile").splitlines(), 1):
        text, place = line.partition("#")[0].strip(), f"the hostfile {path}, line {number}"
        if not text:
            continue
        match = LINE.fullmatch(text)
        if not match:
            raise UserError(f"{place}: found {files.shown(text)}; {EXPECTED}")
        name, slots = match[1], int(match[2])
        if not NAME.fullmatch(name):
            raise UserError(
                f"{place}: {files.shown(name)} is no name of a machine; expected letters, digits, dots and dashes, and "
                "a user, a port or an IPv6 address in ~/.ssh/config"
            )
        if not 1 <= slots <= MOST:
            raise UserError(f"{place}: {name} has slots={slots}, expected 1 to {MOST}: how many processes run there")
        if name in found:
            raise UserError(f"{place}: {name} has a line already; give it one with all of its slots")
        found[name] = slots
    if not found:
        raise UserError(f"the hostfile {path} names no machine; {EXPECTED}")
    return found


def choose(hosts: dict[str, int], include: str, exclude: str) -> dict[str, list[str]]:
    """The slots that take part by machine, in the hostfile's order.

    `include` and `exclude` are in DeepSpeed's form: NAME[:SLOT,SLOT][@NAME...]. Raises UserError for what is not in the
    hostfile, and where nothing is left.
    """
    if include and exclude:
        raise UserError("give either --include_hosts or --exclude_hosts")
    option, given = ("include_hosts", include) if include else ("exclude_hosts", exclude)
    named: dict[str, set[int]] = {}
    for part in filter(None, map(str.strip, given.split("@"))):
        name, colon, listed = part.partition(":")
        if name not in hosts:
            raise UserError(f"--{option} names {files.shown(name)}; the hostfile has {', '.join(hosts)}{instead(part)}")
        numbers = set(range(hosts[name]))
        if colon:
            texts = [text.strip() for text in listed.split(",")]
            wrong = [text for text in texts if not re.fullmatch(r"\d{1,9}", text) or int(text) not in numbers]
            if wrong:
                raise UserError(
                    f"--{option} {files.shown(part)}: {files.shown(wrong[0])} is no slot of {name}, which has "
                    f"{hosts[name]}, from 0; expected such as {name}:0{instead(part)}"
                )
            numbers = {int(text) for text in texts}
        named.setdefault(name, set()).update(numbers)
    chosen = {
        name: [str(slot) for slot in range(slots) if not given or (slot in named.get(name, ())) == bool(include)]
        for name, slots in hosts.items()
    }
    left = {name: slots for name, slots in chosen.items() if slots}
    if not left:
        raise UserError(f"--{option} {files.shown(given)} leaves no machine of the hostfile ({', '.join(hosts)})")
    return left
