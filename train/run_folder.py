"""output_path as a whole: an earlier run in it, files of others in it, keeping a second run out.

Standard library only.
"""

import math
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llmops import files
from llmops.console import UserError, log
from llmops.conversations import data_files
from llmops.intents.questions import INTENTS_NAME
from llmops.machine.locks import lock
from llmops.models import checkpoints
from train import checkpointing, ownership
from train.config import RESTARTABLE, Config
from train.course import EPOCHS, NUMBER

CONFIG_NAME = checkpoints.RUN_SETTINGS
RESULTS_NAME = "train_results.json"
STOP_NAME = "STOP"  # a file of this name ends a running training in good order
LOG_NAME = "log.txt"
PICTURE_NAME = "training_loss.png"
RECORD = "resolved"  # the key in CONFIG_NAME of what a run chose by itself
STEP = "conversations_per_step"  # a key in RECORD: of all processes together
PROCESSES = "processes"  # another: how many processes chose
STEP_SETTINGS = ("per_device_train_batch_size", "gradient_accumulation_steps")  # what makes it, times the processes
CACHE_NAME = "cache"  # tokenised data by its key: nothing in it is ever replaced
CLAIMED = (
    CONFIG_NAME, RESULTS_NAME, LOG_NAME, PICTURE_NAME, ownership.HELD_OUT, "tensorboard", checkpointing.STAGING
)  # fmt: skip
MEASURES = ("test_sha256", "retention_sha256")  # what is measured with: nothing to a run that is finished
RESULTS_KEYS = ("eval_loss_before", "eval_loss", "best_step", "steps")


def data_digest(config: Config) -> str:
    """A hash of the training data."""
    return data_files.digest([*config.train_files, *config.replay_files])


def data_digests(config: Config) -> dict[str, str | None]:
    """Hashes of all data, as they are written down; the test data's is None where training data is held out for it."""
    tested = config.test_files
    return {
        "train_sha256": data_digest(config),
        "test_sha256": data_files.digest(tested) if tested else None,
        # ours may change from version to version
        "retention_sha256": data_files.digest([config.retention_path]) if config.retention_file else None,
    }


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


def read_settings(config: Config) -> dict[str, Any] | None:
    """What the run in output_path wrote of its settings; None where no run goes on there."""
    path = Path(config.output_path) / CONFIG_NAME
    if config.overwrite_output_path or not os.path.lexists(path):
        return None
    return files.read_object(path, "the settings of the run", ownership.choose_another(path.parent))


def earlier_run(config: Config, processes: int | None = None) -> dict[str, Any] | None:
    """The results of the finished run in output_path, or None when there is none.

    `processes`: those of this start, where that is known. Raises UserError when output_path holds a run with other
    settings, or files that are not a run's.
    """
    output = Path(config.output_path)
    refuse_foreign(config)
    saved = read_settings(config)
    if saved is None:
        return None
    now = config.to_json() | data_digests(config)  # an earlier version wrote the first one only
    if not config.num_train_epochs and saved.get(NUMBER) and NUMBER not in (saved.get(RECORD) or {}):
        now["num_train_epochs"] = EPOCHS  # a run of version 0.2, whose default that was
    results = read_results(output)
    passed = RESTARTABLE if results is None else (*RESTARTABLE, *MEASURES)
    differing = [key for key in now if key in saved and key not in passed and saved[key] != now[key]]
    step = step_of(output, saved)
    if step and set(differing) & set(STEP_SETTINGS):
        refuse_other_step(config, saved, step, processes)
        differing = [key for key in differing if key not in STEP_SETTINGS]
    changed = [f"{key} was {files.shown(saved[key])}, is {files.shown(now[key])}" for key in differing]
    if changed:
        raise UserError(
            f"{output} holds a run with other settings ({'; '.join(changed)}); choose another --output_path, "
            "or pass --overwrite_output_path true to delete it"
        )
    if results is None and not config.resume:
        raise UserError(
            f"{output} holds an unfinished run; pass --resume true, or --overwrite_output_path true to delete it"
        )
    return results


def step_of(output: Path, saved: dict[str, Any]) -> int | None:
    """How many conversations an optimizer step of the run in output_path has, over all processes.

    `saved` are its settings. A run of an earlier version wrote it nowhere: it is what they make with the processes that
    wrote its newest checkpoint. None for a run without a checkpoint, too: it has no step yet that another must equal.
    """
    record = saved.get(RECORD)
    step = record.get(STEP) if isinstance(record, dict) else None
    if type(step) is int and step > 0:
        return step
    sizes = [size for size in map(saved.get, STEP_SETTINGS) if type(size) is int and size > 0]
    if len(sizes) < len(STEP_SETTINGS):
        return None
    for checkpoint in reversed(checkpointing.list_checkpoints(output)):
        if checkpointing.damage(checkpoint) is None:
            return math.prod(sizes) * checkpointing.read_manifest(checkpoint).world_size
    return None


def refuse_other_step(config: Config, saved: dict[str, Any], step: int, processes: int | None) -> None:
    """Raise UserError when the batch settings are neither the run's nor make a step of its size.

    Before the launcher, when the number of processes is not known, any number may be the right one.
    """
    size, accumulation = (getattr(config, name) for name in STEP_SETTINGS)
    if size * accumulation * (processes or 1) == step or (processes is None and step % (size * accumulation) == 0):
        return
    many = "any number of" if processes is None else processes
    raise UserError(
        f"a step of the run in {config.output_path} has {step} conversations, which --per_device_train_batch_size "
        f"{size} x --gradient_accumulation_steps {accumulation} x {many} process{'' if processes == 1 else 'es'} "
        "do not make; "
        f"pass {saved[STEP_SETTINGS[0]]} and {saved[STEP_SETTINGS[1]]} as before, and its steps stay as they are with "
        "any number of processes"
    )


def step_size(config: Config, processes: int) -> int:
    """Conversations of an optimizer step over all processes: the run's, or for a new run what the settings make."""
    saved = read_settings(config)
    step = step_of(Path(config.output_path), saved) if saved else None
    return step or config.per_device_train_batch_size * config.gradient_accumulation_steps * processes


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
        self.held.enter_context(lock(self.path / ".lock", busy))
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
