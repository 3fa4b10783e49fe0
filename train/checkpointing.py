"""Checkpoints that are whole or not there: write aside, fsync, rename; a manifest tells a damaged one.

Layout: `output_path/checkpoint-N/` with the model's files, DeepSpeed's state, the Trainer's state and MANIFEST.
"""

import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llmops import files
from llmops.console import UserError, log

MANIFEST = "manifest.json"
STAGING = ".saving"
EDGE = 1 << 20  # of a large file only the first and last MiB are read for the checksum


def fingerprint(path: Path) -> list[int]:
    """[size, CRC-32] of a file; of files over 64 MiB the checksum covers the first and the last MiB."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        if size <= 64 * EDGE:
            crc = 0
            while chunk := stream.read(EDGE):
                crc = zlib.crc32(chunk, crc)
        else:
            crc = zlib.crc32(stream.read(EDGE))
            stream.seek(-EDGE, os.SEEK_END)
            crc = zlib.crc32(stream.read(EDGE), crc)
    return [size, crc]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself: who wrote it, its files with [size, CRC-32], whether the run ended with it."""

    world_size: int
    files: dict[str, list[int]]
    ended: bool = False


def read_manifest(checkpoint: Path) -> Manifest:
    """A checkpoint's manifest. Raises UserError for one that is none, whatever it holds."""
    found = files.read_object(checkpoint / MANIFEST, "the checkpoint's manifest")
    world_size, listed, ended = found.get("world_size"), found.get("files"), found.get("ended", False)
    if not (
        type(world_size) is int and world_size > 0 and isinstance(listed, dict) and listed and isinstance(ended, bool)
        and all(is_inside(name) and is_fingerprint(value) for name, value in listed.items())
    ):  # fmt: skip
        raise UserError(f"{checkpoint / MANIFEST} is no manifest of a checkpoint")
    return Manifest(world_size, listed, ended)


def is_inside(name: str) -> bool:
    """Whether a file's name in a manifest stays below its folder."""
    path = Path(name)
    return "\0" not in name and not path.is_absolute() and ".." not in path.parts


def is_fingerprint(value: object) -> bool:
    """Whether a value is what `fingerprint` gives."""
    return isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value)


def publish(staged: Path, final: Path, world_size: int, ended: bool = False) -> None:
    """Write the manifest of a staged checkpoint, make it durable and give it its final name."""
    listed = {str(path.relative_to(staged)): fingerprint(path) for path in sorted(staged.rglob("*")) if path.is_file()}
    for path in staged.glob("*.safetensors"):
        path.chmod(0o666 & ~files.current_umask())  # safetensors writes for the owner alone
    manifest = {"world_size": world_size, "ended": ended, "files": listed}
    files.write_json(staged / MANIFEST, manifest, indent=None)
    files.fsync_tree(staged)
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    staged.parent.rmdir()
    files.fsync_entry(final.parent)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_manifest(checkpoint)
    except UserError as error:
        return f"its manifest cannot be read ({error})"
    for name, expected in manifest.files.items():
        path = checkpoint / name
        if not files.is_file(path):
            return f"{name[:200]} is missing"
        if fingerprint(path) != expected:
            return f"{name} was changed or cut"
    return None


def step_of(checkpoint: Path) -> int:
    """N of `checkpoint-N`."""
    return int(checkpoint.name.rpartition("-")[2])


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [
        path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()
    ]
    return sorted(found, key=step_of)


def newest_whole(output: Path, speaks: bool = True, judge: Callable[[Path], str | None] = damage) -> Path | None:
    """The newest checkpoint that is whole; damaged ones, as `judge` finds them, are named and passed over."""
    for checkpoint in reversed(list_checkpoints(output)):
        problem = judge(checkpoint)
        if problem is None:
            return checkpoint
        if speaks:
            log(f"warning: {checkpoint} is damaged ({problem}); trying the one before it")
    return None


def rotate(output: Path, keep: int, best_step: int | None, judge: Callable[[Path], str | None]) -> None:
    """Delete all but the `keep` newest whole checkpoints; the best one always stays, and what is newer than those.

    `judge` is the one by which a start chooses what to go on from.
    """
    whole = 0
    for checkpoint in reversed(list_checkpoints(output)):
        if whole < keep:
            whole += judge(checkpoint) is None
        elif step_of(checkpoint) != best_step:
            shutil.rmtree(checkpoint)


def link_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Give files of a checkpoint a second name in `target` (hard links where possible), each in one step."""
    for name in names:
        staged = target / f".{name}.part"
        staged.unlink(missing_ok=True)
        try:
            os.link(source / name, staged)
        except OSError:  # file systems without hard links
            shutil.copy2(source / name, staged)
        staged.replace(target / name)


def model_files(checkpoint: Path) -> list[str]:
    """Files of a checkpoint that make up the model: weights, configuration, tokenizer, code shipped with it."""
    state = {MANIFEST, "trainer_state.json", "training_args.bin", "scheduler.pt", "optimizer.pt", "latest"}
    deepspeed = {"zero_to_fp32.py", "zero_to_torch.py"}
    unwanted = state | deepspeed | {"README.md"}  # PEFT's empty model card
    names = (path.name for path in checkpoint.iterdir() if path.is_file())
    return sorted(name for name in names if name not in unwanted and not name.startswith("rng_state"))
