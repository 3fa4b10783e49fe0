"""output_path as a whole: the names in it, an earlier run in it, keeping a second run out. Standard library only."""

import fcntl
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from llmops.console import UserError, log
from llmops.faq_records import INTENTS_NAME
from train import checkpointing
from train.config import RESTARTABLE, Config

CONFIG_NAME = "finetune_config.json"
RESULTS_NAME = "train_results.json"
STOP_NAME = "STOP"  # a file of this name ends a running training in good order
LOG_NAME = "log.txt"
PICTURE_NAME = "training_loss.png"


def data_digest(config: Config) -> str:
    """A hash of the training data."""
    with open(config.train_file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def earlier_run(config: Config) -> dict[str, Any] | None:
    """The results of the finished run in output_path, or None when there is none.

    Raises UserError when output_path holds a run with other settings.
    """
    output = Path(config.output_path)
    if config.overwrite_output_path or not (output / CONFIG_NAME).is_file():
        return None
    saved = json.loads((output / CONFIG_NAME).read_text(encoding="utf-8"))
    now = config.to_json() | {"train_sha256": data_digest(config)}
    changed = [
        f"{key} was {saved[key]!r}, is {now[key]!r}"
        for key in now
        if key in saved and key not in RESTARTABLE and saved[key] != now[key]
    ]
    if changed:
        raise UserError(
            f"{output} holds a run with other settings ({'; '.join(changed)}); choose another --output_path, "
            "or pass --overwrite_output_path true to delete it"
        )
    if (output / RESULTS_NAME).is_file():
        return json.loads((output / RESULTS_NAME).read_text(encoding="utf-8"))
    if not config.resume:
        raise UserError(
            f"{output} holds an unfinished run; pass --resume true, or --overwrite_output_path true to delete it"
        )
    return None


def say_finished(config: Config, results: dict[str, Any]) -> None:
    """What a start of a finished run tells."""
    log(
        f"this run is finished: {config.output_path} (test loss {results['eval_loss_before']:.3f} -> "
        f"{results['eval_loss']:.3f}, best step {results['best_step']} of {results['steps']}). "
        "Nothing to do; --overwrite_output_path true trains it anew"
    )


class OutputFolder:
    """Makes output_path, keeps a second run out of it, and clears what an interrupted or unwanted run left."""

    def __init__(self, config: Config, rank: int) -> None:
        self.config, self.main = config, rank == 0
        self.path = Path(config.output_path)

    def __enter__(self) -> None:
        if not self.main:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "a")
        except OSError as error:
            raise UserError(f"the output path {self.path} cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is writing to {self.path}; wait for it or choose another --output_path"
            ) from None
        if self.config.overwrite_output_path:
            self._delete_run()
        (self.path / STOP_NAME).unlink(missing_ok=True)
        staging = self.path / checkpointing.STAGING
        if staging.exists():
            shutil.rmtree(staging)

    def __exit__(self, *_: object) -> None:
        if self.main:
            self.lock.close()

    def _delete_run(self) -> None:
        """Delete what a run writes, and nothing else that may lie in the folder."""
        for checkpoint in checkpointing.list_checkpoints(self.path):
            for name in checkpointing.model_files(checkpoint):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(checkpoint)
        for name in ("tensorboard", "merged", "merged.part"):
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
        for name in (RESULTS_NAME, CONFIG_NAME, LOG_NAME, PICTURE_NAME, INTENTS_NAME):
            (self.path / name).unlink(missing_ok=True)
