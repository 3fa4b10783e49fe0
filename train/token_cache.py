"""Tokenised files are kept by all that they depend on: made once, by one process, and checked before they are read."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from llmops import files
from llmops.console import RunStopped, UserError, log
from llmops.formats.chat_format import ChatFormat
from llmops.machine.locks import lock
from train.dataset import TokenDataset
from train.encoding import describe, encode_rows
from train.source import Source


def load_or_encode(source: Source, chat: ChatFormat, cache: Path, encodes: bool = True) -> TokenDataset:
    """The tokenised file from the cache, or tokenised now. Who does not encode waits for the process that does."""
    stem = source.paths[0].stem.encode("utf-8", "ignore")[:80].decode("utf-8", "ignore")  # a name has 255 bytes at most
    folder = cache / f"{stem}-{source.key()}"
    if not encodes:
        while damage(folder):  # the launcher ends this process if the encoding one fails
            time.sleep(0.2)
        return TokenDataset(folder)
    files.make_folder(cache, "the folder for tokenised data")
    with lock(cache / "lock", "", wait=True):  # nodes that share a file system
        problem = damage(folder) if os.path.lexists(folder) else None
        if problem:
            log(f"warning: the tokenised data in {folder} is damaged ({problem}) and is made anew")
            remove(folder)
        if not folder.exists():
            encode_file(source, chat, folder)
        else:
            log(f"{source.name}: tokenised data read from the cache ({folder})")
    dataset = TokenDataset(folder)
    say_control_texts(source.name, dataset.meta)
    return dataset


def say_control_texts(name: str, meta: dict[str, Any]) -> None:
    """Say how many conversations hold the text of a control token, and what becomes of it."""
    held = meta["control_texts"]
    if not held["conversations"]:
        return
    count = f"{name}: {held['conversations']:,} of {meta['rows']:,} conversations hold the text of control tokens"
    count = f"{count} (first: line {held['line']}, {held['token']!r})"
    if held["allowed"]:
        log(f"{count}; they become these tokens (--allow_special_tokens true)")
    else:
        log(f"warning: {count}; they are learned as text; --allow_special_tokens true makes them these tokens")


def remove(path: Path) -> None:
    """Delete a folder, or a file or link in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def damage(folder: Path) -> str | None:
    """What is wrong with a folder of tokenised data, or None: its checksum covers all that is in it."""
    try:
        meta = files.read_object(folder / "meta.json", "its description")
        written = meta.pop("checksum", None)
        return None if written == checksum(folder, meta) else "its checksum is another one"
    except UserError as error:
        return str(error)


def checksum(folder: Path, meta: dict[str, Any]) -> str:
    """A hash of tokenised data and its description. Raises UserError for a file that cannot be read."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in ("index.npy", "ids.bin", "learned.bin"):
        with files.open_regular(folder / name, "the tokenised data") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def encode_file(source: Source, chat: ChatFormat, folder: Path) -> None:
    """Check, render and write every conversation of the files; the folder appears when it is complete."""
    staging = folder.with_name(folder.name + ".part")
    try:
        if os.path.lexists(staging):
            remove(staging)
        staging.mkdir()
        meta = encode_rows(source, chat, staging)
        files.write_json(staging / "meta.json", meta | {"checksum": checksum(staging, meta)})
        staging.rename(folder)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise files.unwritable(staging, error) from error
    except (UserError, RunStopped):
        shutil.rmtree(staging, ignore_errors=True)
        raise
    log(f"{source.name}: {describe(meta)}")
