"""output_path as a whole: an earlier run in it, files of others in it, keeping a second run out.

Standard library only.
"""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llmops import checkpoints, data_files, files
from llmops.console import UserError, log
from llmops.faq_records import INTENTS_NAME
from train import checkpointing, ownership
from train.config import RESTARTABLE, Config

CONFIG_NAME = checkpoints.RUN_SETTINGS
RESULTS_NAME = "train_results.json"
STOP_NAME = "STOP"  # a file of this name ends a running training in good order
LOG_NAME = "log.txt"
PICTURE_NAME = "training_loss.png"
CACHE_NAME = "cache"  # tokenised data by its key: nothing in it is ever replaced
CLAIMED = (CONFIG_NAME, RESULTS_NAME, LOG_NAME, PICTURE_NAME, "tensorboard", checkpointing.STAGING)
RESULTS_KEYS = ("eval_loss_before", "eval_loss", "best_step", "steps")


def data_digest(config: Config) -> str:
    """A hash of the training data."""
    return data_files.digest([*config.train_files, *config.replay_files])


def own_names(output: Path) -> set[str]:
    """What in output_path is a run's own. A run of version 0.1 has no manifest: what it wrote is recognised."""
    own = ownership.read_own(output)
    if own is not None:
        return own
    path = output / CONFIG_NAME
    if not files.is_file(path):
        return set()
    saved = files.read_object(path, "the settings of the run", ownership.choose_another(output))
    if not {"train_sha256", "output_path", "train_type"} <= saved.keys():
        return set()
    checkpoints = [c for c in checkpointing.list_checkpoints(output) if files.is_file(c / checkpointing.MANIFEST)]
    models = [name for checkpoint in checkpoints for name in checkpointing.model_files(checkpoint)]
    others = ("merged", "merged.part", INTENTS_NAME)
    return {*CLAIMED, *others, *models, *(checkpoint.name for checkpoint in checkpoints)}


def refuse_foreign(config: Config) -> None:
    """Raise UserError when output_path holds files of others that a run would replace or that make it a model."""
    output = Path(config.output_path)
    more = [path.name for path in Path(config.model_name_or_path).glob("*.py")]
    candidates = ownership.foreign_names(output, set(), more)  # listed first: another rank claims before it writes
    foreign = [name for name in candidates if name not in own_names(output)] if candidates else []
    if foreign:
        count = f"{', '.join(foreign[:5])}{' and more' if len(foreign) > 5 else ''}"
        raise UserError(
            f"{output} holds {count}, which no run of this toolkit wrote there and which a run would replace; "
            "choose another --output_path, or move these away (--overwrite_output_path deletes only what a run wrote)"
        )


def earlier_run(config: Config) -> dict[str, Any] | None:
    """The results of the finished run in output_path, or None when there is none.

    Raises UserError when output_path holds a run with other settings, or files that are not a run's.
    """
    output = Path(config.output_path)
    refuse_foreign(config)
    if config.overwrite_output_path or not os.path.lexists(output / CONFIG_NAME):
        return None
    saved = files.read_object(output / CONFIG_NAME, "the settings of the run", ownership.choose_another(output))
    now = config.to_json() | {"train_sha256": data_digest(config)}
    changed = [
        f"{key} was {files.shown(saved[key])}, is {files.shown(now[key])}"
        for key in now
        if key in saved and key not in RESTARTABLE and saved[key] != now[key]
    ]
    if changed:
        raise UserError(
            f"{output} holds a run with other settings ({'; '.join(changed)}); choose another --output_path, "
            "or pass --overwrite_output_path true to delete it"
        )
    results = read_results(output)
    if results is None and not config.resume:
        raise UserError(
            f"{output} holds an unfinished run; pass --resume true, or --overwrite_output_path true to delete it"
        )
    return results


def read_results(output: Path) -> dict[str, Any] | None:
    """The results of a finished run; None where they are not there, or damaged: they are then made again."""
    if not files.is_file(output / RESULTS_NAME):
        return None
    try:
        results = files.read_object(output / RESULTS_NAME, "the results")
    except UserError as error:
        log(f"warning: {error}; the run's end is done again")
        return None
    if all(isinstance(results.get(key), int | float) or key == "best_step" for key in RESULTS_KEYS):
        return results
    log(f"warning: {output / RESULTS_NAME} has no losses; the run's end is done again")
    return None


def say_finished(config: Config, results: dict[str, Any]) -> None:
    """What a start of a finished run tells."""
    log(
        f"this run is finished: {config.output_path} (test loss {results['eval_loss_before']:.3f} -> "
        f"{results['eval_loss']:.3f}, best step {results.get('best_step')} of {results['steps']}). "
        "Nothing to do; --overwrite_output_path true trains it anew"
    )


class OutputFolder:
    """Makes output_path, keeps a second run out of it, and clears what an interrupted or unwanted run left."""

    def __init__(self, config: Config, rank: int) -> None:
        self.config, self.main = config, rank == 0
        self.path = Path(config.output_path)
        self.held = ExitStack()

    def __enter__(self) -> None:
        if not self.main:
            return
        files.make_folder(self.path, "the output path")
        busy = f"another run is writing to {self.path}; wait for it or choose another --output_path"
        self.held.enter_context(files.lock(self.path / ".lock", busy))
        refuse_foreign(self.config)  # again: nobody of ours writes here now
        own = own_names(self.path)
        if own and ownership.read_own(self.path) is None:
            ownership.adopt(self.path, own)  # of version 0.1
        if self.config.overwrite_output_path:
            ownership.delete_own(self.path)
        intents = [INTENTS_NAME] if self.config.scenario == "faq" else []
        ownership.claim(self.path, [*CLAIMED, *intents])
        ownership.sweep(self.path)
        (self.path / STOP_NAME).unlink(missing_ok=True)
        staging = self.path / checkpointing.STAGING
        if staging.exists():
            shutil.rmtree(staging)

    def __exit__(self, *_: object) -> None:
        self.held.close()
