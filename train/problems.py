"""What is wrong with the settings of a fine-tuning run: bounds, what depends on each other, the paths they name.

Standard library only, so that most errors are instant; the data itself is read later.
"""

import os
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from llmops import files
from llmops.console import UserError
from llmops.conversations import data_files
from llmops.keyboard import instead
from llmops.models.checkpoints import Checkpoint
from train import deepspeed_file
from train.config import RECOMPUTE_WORDS, Config
from train.run_folder import own_names

TRACKERS = ("swanlab", "mlflow", "trackio", "wandb")  # each the name of its package, too


def find_problems(config: Config) -> list[str]:
    """Everything wrong with the settings and the paths they name, one sentence each."""
    problems = encoding_problems(config)
    if problems:
        return problems
    for item in fields(Config):
        low, high, value = item.metadata["min"], item.metadata["max"], getattr(config, item.name)
        if low is not None and not low <= value < float("inf"):
            problems.append(f"--{item.name} is {value}, expected at least {low}")
        elif high is not None and value > high:
            problems.append(f"--{item.name} is {value}, expected at most {high}")
    for name in ("lora_dropout", "warmup_ratio", "eval_ratio", "replay_ratio"):
        if getattr(config, name) >= 1:
            problems.append(f"--{name} is {getattr(config, name)}, expected less than 1")
    layers = config.gradient_checkpointing.lower()
    if layers not in RECOMPUTE_WORDS and not (layers.isascii() and layers.isdecimal()):
        problems.append(f"--gradient_checkpointing is {layers}, expected auto, true, false or a whole number from 1")
    if config.max_steps == 0:
        problems.append("nothing to train: --max_steps is 0")
    problems += tracker_problems(config.trackers)
    problems += path_problems(config)
    if files.is_file(config.deepspeed_file):
        problems += deepspeed_file.find_problems(config)
    return problems


def encoding_problems(config: Config) -> list[str]:
    """Paths with bytes that are no UTF-8, as an archive from Windows has them: no JSON of a run could name them."""
    given = ((item.name, getattr(config, item.name)) for item in fields(Config))
    return [
        f"--{name} is {files.shown(value, 200)}, which is not UTF-8; rename what is so (convmv -f gb18030 -t utf-8), "
        "or name it by a link"
        for name, value in given
        if isinstance(value, str) and any("\udc80" <= character <= "\udcff" for character in value)
    ]


def tracker_problems(names: Sequence[str]) -> list[str]:
    """Trackers that are not known, or whose package is not there."""
    problems = []
    for name in names:
        if name not in TRACKERS:
            problems.append(
                f"--report_to {files.plain(name)} is no tracker; expected some of {', '.join(TRACKERS)}{instead(name)}"
            )
        elif find_spec(name) is None:
            problems.append(f"--report_to {name} needs the package {name}, which is not here: pip install {name}")
    return problems


def path_problems(config: Config) -> list[str]:
    """Missing files and folders, and an output path that cannot be written or holds the model."""
    problems = []
    model = Path(config.model_name_or_path)
    if not files.is_folder(model):
        problems.append(
            f"the model folder {model} does not exist; put the base model there or pass --model_name_or_path "
            "(nothing is downloaded)"
        )
    elif not files.is_file(model / "config.json"):
        problems.append(f"the model folder {model} has no config.json; expected a Hugging Face checkpoint folder")
    else:
        problems += family_problem(config.checkpoint)
    broken = data_files.problems_of(config.train_file, "the training data", "put it there or pass --train_file")
    problems += broken
    if config.test_file or not broken:
        tested = config.test_file or ",".join(map(str, config.test_files))
        cure = "leave --test_file out to hold out training data"
        problems += data_files.problems_of(tested, "the test data", cure) if tested else []
        if not tested and config.eval_ratio == 0:
            problems.append("there is no test file and --eval_ratio is 0; give one of the two")
    elif config.eval_ratio == 0:
        problems.append("there is no test file and --eval_ratio is 0; give one of the two")
    if not problems:
        problems += overlap_problem(config) + deleted_problem(config)
    problems += replay_problems(config)
    problems += file_problem(str(config.retention_path), "the retention file", "leave --retention_file out for ours")
    problems += file_problem(str(config.deepspeed_file), "the DeepSpeed file", "leave --ds_file out for ours")
    output = Path(config.output_path)
    return problems + place_problem(output, model) + writable_problem(output)


def overlap_problem(config: Config) -> list[str]:
    """A file that is learned and asked for, by whichever names."""
    for path in config.test_files:
        if any(files.is_same(path, learned) for learned in config.train_files):
            return [
                f"{path} is learned (--train_file) and tests what was learned (--test_file), so it would measure "
                "nothing; name the training files without it"
            ]
    return []


def deleted_problem(config: Config) -> list[str]:
    """A file that would be deleted before it is read, such as an earlier run's held_out.jsonl."""
    if not config.overwrite_output_path:
        return []
    output = Path(config.output_path)
    deleted = [output / name for name in own_names(output)]
    read = {
        "train_file": config.train_files, "test_file": config.test_files, "replay_file": config.replay_files,
        "retention_file": [config.retention_path], "ds_file": [config.deepspeed_file],
    }  # fmt: skip
    for name, paths in read.items():
        for path in paths:
            if any(files.same_or_inside(path, own) for own in deleted):
                return [
                    f"{path} (--{name}) is a part of the earlier run in {output}, which --overwrite_output_path true "
                    "deletes; copy it elsewhere, or choose another --output_path"
                ]
    return []


def replay_problems(config: Config) -> list[str]:
    """What is wrong with the conversations that are to be replayed, and with their share."""
    if not config.replay_ratio:
        given = "--replay_file is given and --replay_ratio is 0; pass the share of each step that it gets, such as 0.25"
        return [given] if config.replay_file else []
    problems = data_files.problems_of(config.replay_file, "the replay file", "leave --replay_file out for ours") if (
        config.replay_file) else []  # fmt: skip
    if not problems and any(files.is_same(path, config.retention_path) for path in config.replay_files):
        problems.append(
            f"{config.retention_path} is learned again (--replay_file) and measures forgetting (--retention_file), so "
            "it would measure nothing; choose another one for either"
        )
    if config.per_device_train_batch_size * config.gradient_accumulation_steps == 1:
        problems.append("--replay_ratio needs steps of two conversations at least; raise --gradient_accumulation_steps")
    return problems


def file_problem(path: str, what: str, cure: str) -> list[str]:
    """Why a file cannot be read, if it cannot."""
    try:
        files.open_regular(Path(path), what, cure).close()
    except UserError as error:
        return [str(error)]
    return []


def place_problem(output: Path, model: Path) -> list[str]:
    """An output path that is the model's folder, lies in it or holds it: the run would write over its own base."""
    if files.same_or_inside(output, model):
        where = "is" if files.same_or_inside(model, output) else "lies in"
    elif files.same_or_inside(model, output):
        where = "holds"
    else:
        return []
    return [
        f"the output path {output} {where} the model folder {model}, whose files the run would replace; "
        "choose another --output_path"
    ]


def family_problem(checkpoint: Checkpoint) -> list[str]:
    """A `--mode` that does not fit, or code of the checkpoint's own that is not trusted: its files show both."""
    try:
        checkpoint.check_trust()
        checkpoint.family()
    except UserError as error:
        return [str(error)]
    return []


def writable_problem(path: Path) -> list[str]:
    """Whether `path` (or, before it exists, its nearest existing parent) can be written by this user."""
    nearest = path
    while not os.path.exists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not files.is_folder(nearest):
        return [f"the output path {path} lies under {nearest}, which is a file"]
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [
            f"{nearest} is not writable for user id {os.getuid()}; on the host, run "
            f"`sudo chown -R {os.getuid()} {nearest.name}` on the mounted folder "
            "or start the container with `--user $(id -u)`"
        ]
    return []
