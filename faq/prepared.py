"""The files of faq/prepare in their folder: all of one start or none, never over what somebody else wrote or changed.

.prepare.json says which files are the command's own, by SHA-256. While it says "writing", new files lie beside under
names of their own and get theirs one after the other: a start that was killed in between is completed by the next.
"""

import hashlib
import os
from collections.abc import Container, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from llmops import files
from llmops.console import UserError, log
from llmops.intents.catalog import load_catalog
from llmops.intents.questions import INTENTS_NAME, PREPARED_NAME
from llmops.machine.locks import lock

TRAIN_NAME, TEST_NAME = "train.jsonl", "test.jsonl"
VALIDATION_NAME = "validation.jsonl"  # only where it was asked for
OUTPUTS = (TRAIN_NAME, TEST_NAME, VALIDATION_NAME, INTENTS_NAME)
LOCK_NAME = ".prepare.lock"


def digest(path: Path) -> str:
    """The SHA-256 of a file, "" where it is not there."""
    if not os.path.exists(path):
        return ""
    with files.open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def staged(folder: Path, name: str) -> Path:
    """Where a new file waits for its name."""
    return folder / f".{name}.new"


def read_state(folder: Path) -> tuple[bool, dict[str, str]]:
    """(whether a start was killed between its files, SHA-256 by name of what the command wrote)."""
    path = folder / PREPARED_NAME
    if not os.path.exists(path):
        return False, {}
    found = files.read_object(path, "faq/prepare's list of its files", "delete it to begin anew")
    listed = found.get("files")
    if found.get("state") not in ("writing", "done") or not isinstance(listed, dict):
        raise UserError(f"{path} is no list of faq/prepare's files; delete it to begin anew")
    return found["state"] == "writing", {name: str(value) for name, value in listed.items() if name in OUTPUTS}


def complete(folder: Path) -> None:
    """Give the files of a start that was killed in between their names."""
    if not read_state(folder)[0]:
        return
    with locked(folder):
        interrupted, listed = read_state(folder)
        if not interrupted:
            return
        for name, expected in listed.items():
            if digest(staged(folder, name)) == expected:
                staged(folder, name).replace(folder / name)
        wrong = [name for name, expected in listed.items() if digest(folder / name) != expected]
        if wrong:
            raise UserError(
                f"an earlier start was killed while it wrote to {folder}, and {wrong[0]} is not what it wrote; look at "
                f"it, then delete {folder / PREPARED_NAME} and pass --overwrite true"
            )
        write_state(folder, "done", listed)
        log(f"an earlier start was killed while it wrote to {folder}; its files are whole now")


def foreign_files(folder: Path, names: Iterable[str] = OUTPUTS) -> list[str]:
    """What is wrong with each of `names` that is there: this command did not write it, or it was changed since."""
    _, listed = read_state(folder)
    problems = []
    for name in names:
        found = digest(folder / name)
        if not found or found == listed.get(name):
            continue
        how = "was changed since this command wrote it" if name in listed else "this command did not write"
        problems.append(f"{name} that {how}")
    return [] if problems and not listed and is_older_version(folder) else problems


def is_older_version(folder: Path) -> bool:
    """Whether version 0.1 of this command wrote here: it left no list, but an intents.json that only it writes."""
    try:
        load_catalog(folder / INTENTS_NAME)
    except UserError:
        return False
    return True


def write(folder: Path, texts: Mapping[str, Iterable[str]], overwrite: bool) -> None:
    """Write all files, or none, part by part of their texts.

    Raises UserError when another start writes there, or a file is not ours to replace.
    """
    files.make_folder(folder, "the output folder")
    with locked(folder):
        if not overwrite:
            refuse_foreign(folder, texts)
        try:
            for name, parts in texts.items():
                with files.writing(staged(folder, name)) as stream:
                    stream.writelines(parts)
        except BaseException:
            for name in texts:
                staged(folder, name).unlink(missing_ok=True)
            raise
        remove_earlier(folder, texts)
        listed = {name: digest(staged(folder, name)) for name in texts}
        write_state(folder, "writing", listed)
        for name in texts:
            staged(folder, name).replace(folder / name)
        files.fsync_entry(folder)
        write_state(folder, "done", listed)


def remove_earlier(folder: Path, names: Container[str]) -> None:
    """Remove what an earlier start wrote under a name that this one has no use for."""
    _, listed = read_state(folder)
    for name, expected in listed.items():
        if name not in names and digest(folder / name) == expected:
            (folder / name).unlink()


def refuse_foreign(folder: Path, names: Iterable[str]) -> None:
    """Raise UserError when an output would replace what this command did not write, or what was changed since."""
    problems = foreign_files(folder, names)
    if problems:
        raise UserError(
            f"{folder} holds {' and '.join(problems)}; move what you want to keep, choose another folder "
            "(--output_dir, of run_all.sh --mount_path), or pass --overwrite true"
        )


def write_state(folder: Path, state: str, listed: Mapping[str, str]) -> None:
    """Say which files are ours, and whether all of them are in place."""
    files.write_json(folder / PREPARED_NAME, {"state": state, "files": dict(listed)})


def locked(folder: Path) -> AbstractContextManager[None]:
    """Keep another start out of the folder."""
    return lock(folder / LOCK_NAME, f"another faq/prepare is writing to {folder}; wait for it and start again")
