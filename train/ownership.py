"""What in output_path is a run's own: written down before it is made, so that nothing else is ever touched.

run_manifest.json lists names directly in output_path, files and folders. A folder that is listed is the run's with all
that is in it. What is not listed is somebody else's: when it has a name that a run would write, no run starts there.
"""

import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from llmops import files
from llmops.console import RunStopped, UserError

OWN_NAME = "run_manifest.json"
HELD_OUT = "held_out.jsonl"  # the part of the training data that is a run's test
# What a run writes, and what makes a folder a model, an adapter or a run of another program.
RUN_NAMES = (
    "log.txt", "finetune_config.json", "train_results.json", "training_loss.png", "intents.json", "tensorboard",
    "merged", "merged.part", ".saving", "checkpoint-*", "trainer_state.json", "training_args.bin", HELD_OUT,
)  # fmt: skip
MODEL_NAMES = (
    "config.json", "generation_config.json", "adapter_*", "*.safetensors", "*.safetensors.index.json", "*.bin",
    "*.bin.index.json", "*.pt", "*.pth", "*.gguf", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab*", "merges.txt", "chat_template*", "preprocessor_config.json",
)  # fmt: skip


def read_own(output: Path) -> set[str] | None:
    """The names that a run wrote down as its own; None where no run of ours was.

    Raises UserError for a manifest that cannot be one: what is ours can then not be told from what is not.
    """
    path = output / OWN_NAME
    if not os.path.lexists(path):
        return None
    names = files.read_object(path, "the run's manifest", choose_another(output)).get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) and is_plain(name) for name in names):
        raise UserError(f"{path} is no manifest of a run ({files.shown(names)}); {choose_another(output)}")
    return {*names, OWN_NAME}


def choose_another(output: Path) -> str:
    """The way out of a folder that is not ours."""
    return f"choose another --output_path, or look at {output} and move away what you want to keep"


def is_plain(name: str) -> bool:
    """Whether a name stays in its folder."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def claim(output: Path, names: Iterable[str]) -> None:
    """Write names down as the run's own, before they are made. Raises RunStopped when one is somebody else's."""
    own = read_own(output) or set()
    new = set(names) - own
    taken = sorted(name for name in new if os.path.lexists(output / name))
    if taken:
        raise RunStopped(
            f"{output / taken[0]} appeared while the run was on its way and is not the run's own; move it away and "
            "start again to continue"
        )
    if new or OWN_NAME not in own:
        files.write_json(output / OWN_NAME, {"about": "names here that belong to the run", "names": sorted(own | new)})


def adopt(output: Path, names: Iterable[str]) -> None:
    """Write down names that are there already as the run's own: a run of version 0.1 had no manifest."""
    files.write_json(output / OWN_NAME, {"about": "names here that belong to the run", "names": sorted(names)})


def foreign_names(output: Path, own: set[str], more: Iterable[str] = ()) -> list[str]:
    """Names in output_path that a run would write, or that make it a model, and that are not `own`.

    `more` are names that this run would write beside the usual ones.
    """
    try:
        present = os.listdir(output)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"the output path {output} cannot be read ({error.strerror}); choose another one") from error
    patterns = (*RUN_NAMES, *MODEL_NAMES)
    wanted = set(more)
    return sorted(
        name
        for name in present
        if name not in own and (name in wanted or any(fnmatch(name, pattern) for pattern in patterns))
    )


def delete_own(output: Path) -> None:
    """Delete what the manifest lists, the manifest last. A link is deleted, not what it names."""
    for name in sorted((read_own(output) or set()) - {OWN_NAME}):
        remove(output / name)
    (output / OWN_NAME).unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(output: Path) -> None:
    """Delete what a kill left of files that were being written: `.NAME.xxxxxxxx.part` of own names."""
    for path in output.glob(".*.part"):
        name = path.name[1:].rpartition(".part")[0].rpartition(".")[0]
        if name in (read_own(output) or ()):
            path.unlink(missing_ok=True)
