"""Checkpoints that are whole or not there: write aside, fsync, rename; a manifest tells a damaged one.

Layout: `output_path/checkpoint-N/` with the model's files, DeepSpeed's state, the Trainer's state and MANIFEST.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

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


def current_umask() -> int:
    """The process's file mode mask; reading it means setting it twice."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def fsync_tree(folder: Path) -> None:
    """Make every file and folder below `folder` durable."""
    for path in [*folder.rglob("*"), folder]:
        fsync_entry(path)


def publish(staged: Path, final: Path, world_size: int) -> None:
    """Write the manifest of a staged checkpoint, make it durable and give it its final name."""
    files = {str(path.relative_to(staged)): fingerprint(path) for path in sorted(staged.rglob("*")) if path.is_file()}
    for path in staged.glob("*.safetensors"):
        path.chmod(0o666 & ~current_umask())  # safetensors writes for the owner alone
    (staged / MANIFEST).write_text(json.dumps({"world_size": world_size, "files": files}), encoding="utf-8")
    fsync_tree(staged)
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    staged.parent.rmdir()
    fsync_entry(final.parent)


def fsync_entry(path: Path) -> None:
    """Make one file, or the names in one folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_aside(path: Path, text: str) -> None:
    """Write a text file so that it is either the old one or the new one, never half of it."""
    staged = path.with_name(path.name + ".part")
    with open(staged, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    staged.replace(path)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
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


def newest_whole(output: Path, speaks: bool = True) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are named and passed over."""
    for checkpoint in reversed(list_checkpoints(output)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        if speaks:
            log(f"warning: {checkpoint} is damaged ({problem}); trying the one before it")
    return None


def check_world_size(checkpoint: Path, world_size: int) -> None:
    """DeepSpeed's optimizer state is cut by process, so a run goes on with as many as it began with."""
    written = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["world_size"]
    if written != world_size:
        raise UserError(
            f"{checkpoint} was written by {written} processes and this start has {world_size}; start with {written} "
            "again, or begin anew with --overwrite_output_path true"
        )


def rotate(output: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the `keep` newest checkpoints; the best one always stays."""
    for checkpoint in list_checkpoints(output)[:-keep]:
        if step_of(checkpoint) != best_step:
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
