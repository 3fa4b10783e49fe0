"""OUTPUT_DIR itself becomes a whole model, as the platform's servers load it; the run stays in OUTPUT_DIR/run."""

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from llmops import files
from llmops.console import RunStopped, UserError

LISTED = "published.json"
CONFIG = "config.json"
# what makes a folder a model, or another one than it is
MODEL_NAMES = (
    CONFIG, "generation_config.json", "adapter_*", "*.safetensors", "*.bin", "*.index.json", "*.pt", "*.gguf",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*",
)  # fmt: skip
# of a run's own files in its output_path, those that are no part of the model
RUN_NAMES = (
    "log.txt", "finetune_config.json", "train_results.json", "training_loss.png", "run_manifest.json",
    "held_out.jsonl",
)  # fmt: skip


def listed(folder: Path) -> list[str]:
    """The names that an earlier start of the job put into OUTPUT_DIR; `folder` is the job's."""
    if not files.is_file(folder / LISTED):
        return []
    names = files.read_object(folder / LISTED, "the list of what was published", "remove it").get("names", [])
    return [name for name in names if isinstance(name, str) and name == Path(name).name]


def refuse_foreign(output: Path, folder: Path) -> None:
    """Raise UserError where OUTPUT_DIR holds a model's files that no job put there."""
    if not files.is_folder(output):
        return
    own = listed(folder)
    found = [
        path.name for path in sorted(output.iterdir())
        if path.name not in own and any(fnmatch(path.name, pattern) for pattern in MODEL_NAMES)
    ]  # fmt: skip
    if found:
        raise UserError(
            f"{output} holds {found[0]}, which no job put there and which the result would replace or change; choose "
            "another OUTPUT_DIR, or move it away"
        )


def model_names(run: Path) -> tuple[Path, list[str]]:
    """(folder, names) of the whole model that a finished run left: merged, or in output_path itself."""
    merged = run / "merged"
    if files.is_file(merged / CONFIG):
        return merged, sorted(path.name for path in merged.iterdir() if path.is_file())
    names = files.read_object(run / "run_manifest.json", "the run's manifest").get("names", [])
    own = sorted(name for name in names if name not in RUN_NAMES and files.is_file(run / name))
    if CONFIG not in own:
        raise RunStopped(f"{run} holds no whole model; --merge_lora true makes one of an adapter")
    return run, own


def publish(run: Path, output: Path, folder: Path) -> list[str]:
    """Give the model's files a second name in OUTPUT_DIR, config.json last: with it the folder is a model. The names.

    They are hard links where the file system has them. What an earlier start put there and the model no longer has
    goes away.
    """
    source, names = model_names(run)
    if files.is_file(run / "intents.json") and "intents.json" not in names:
        names.append("intents.json")  # with it the model server answers with intents
    before = listed(folder)
    files.write_json(folder / LISTED, {"names": sorted({*before, *names})})
    for name in sorted(names, key=lambda name: name == CONFIG):
        link(run / name if name == "intents.json" else source / name, output / name)
    for name in sorted(set(before) - set(names)):
        (output / name).unlink(missing_ok=True)
    files.write_json(folder / LISTED, {"names": sorted(names)})
    return names


def link(source: Path, target: Path) -> None:
    """Give a file a second name in one step; a copy on file systems without hard links."""
    staged = target.with_name(f".{target.name}.part")
    staged.unlink(missing_ok=True)
    try:
        os.link(source, staged)
    except OSError:
        shutil.copy2(source, staged)
    staged.replace(target)
