"""What a job is told: by the environment, under the names of schedulers and of the platform, or by flags.

Secrets (AUTH, NOTIFY_TOKEN) come by the environment alone: every user of a machine sees the flags of its processes.
"""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from job.calls import Secrets, check_address, check_header, is_address, secrets_in
from llmops import files
from llmops.console import Parser, UserError, to_bool
from llmops.models.checkpoints import JOB_RUN, RUN_SETTINGS

ROOT = Path(__file__).resolve().parent.parent
TRAIN, EVALUATE, FIVE, SIMILAR = "train", "evaluate", "five", "similar"
TASKS = (TRAIN, EVALUATE, FIVE, SIMILAR)
SECRET_NAMES = ("AUTH", "NOTIFY_TOKEN")
ADDRESSES = ("api_url", "notify_url", "train_file", "eval_file", "dataset_path")  # of the web, or paths
JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,199}")
JOB_IDS = ("JOB_ID", "DATA_TASK_JOB_ID", "SLURM_JOB_ID")  # who names a job how; the first that is set


def setting(help: str, default: str = "") -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """A job, as it was told. Empty means "choose for me". The variable of a field is its name in capitals."""

    task: str = setting("train, evaluate, five or similar; empty: by which variables are set")
    job_id: str = setting("the job's name; empty: DATA_TASK_JOB_ID, SLURM_JOB_ID")
    mount_path: str = setting("folder with the base model, datasets/ and output_path/; empty: mnt beside the project")
    work_dir: str = setting("what the job keeps; empty: OUTPUT_DIR/job, without it MOUNT_PATH/jobs/JOB_ID")
    fetch: str = setting("auto: data whose address is given; true: models by their hub id, too; false: nothing", "auto")
    log_style: str = setting("plain, or platform: progress as the platform reads it; auto: by API_URL", "auto")
    api_url: str = setting("the platform's address for the end of the job: PUT, with AUTH and TENANT_ID")
    tenant_id: str = setting("whose job it is, for the platform")
    notify_url: str = setting("a webhook: POST at the start and at the end; NOTIFY_TOKEN is its bearer token")
    notify_seconds: str = setting("how long to try again when an end is not taken", "900")
    scenario: str = setting("training: general or faq")
    base_model_path: str = setting("training: folder of the base model, or its hub id")
    base_model_name: str = setting("training: taken where BASE_MODEL_PATH is empty")
    train_file: str = setting("training: path or http(s) address of what is learned")
    eval_file: str = setting("training: path or http(s) address of what is held out; empty: a part is")
    output_dir: str = setting("training: gets the whole model; the run itself is in OUTPUT_DIR/run")
    use_lora: str = setting("training: true: LoRA, ZeRO 2; false: every weight, ZeRO 3")
    gpus_per_node: str = setting("processes, one per GPU; 0: the CPU")
    model_max_length: str = setting("training: longest conversation in tokens")
    model_path: str = setting("evaluations: folder of the model, or its hub id")
    dataset_path: str = setting("evaluation, similar questions: path or http(s) address of the data")
    evaluation_metrics: str = setting("evaluation: some of Acc, F1, BLEU, Rouge; five: the five dimensions")
    max_seq_len: str = setting("evaluation: longest answer in tokens; training: as MODEL_MAX_LENGTH")
    per_device_batch_size: str = setting("evaluations: prompts at once")
    dataset_type: str = setting("similar questions: faq, the only kind")
    dataset_analyze_model: str = setting("similar questions: the embedding model's folder or hub id")
    # not flags
    auth: str = field(default="", repr=False)
    notify_token: str = field(default="", repr=False)
    rest: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The job's name, as a part of a path."""
        return self.job_id or self.task

    @property
    def mount(self) -> Path:
        """The folder with the base model, datasets/ and output_path/."""
        return Path(self.mount_path) if self.mount_path else ROOT / "mnt"

    @property
    def folder(self) -> Path:
        """Where the job keeps what it fetched, what its command printed, and what it has told."""
        if self.work_dir:
            return Path(self.work_dir)
        if self.task == TRAIN and self.output_dir:
            return Path(self.output_dir) / "job"
        return self.mount / "jobs" / self.name

    @property
    def run(self) -> Path | None:
        """The training's output_path where OUTPUT_DIR is given; None: as chat_main.sh chooses."""
        return Path(self.output_dir) / JOB_RUN if self.task == TRAIN and self.output_dir else None

    @property
    def trained(self) -> Path:
        """The training's output_path, however it was chosen."""
        return self.run or Path(self.environment.get("OUTPUT_PATH") or self.mount / "output_path")

    @property
    def goes_on(self) -> bool:
        """Whether an earlier start began this training, which is not to begin anew."""
        given = self.environment.get("OVERWRITE_OUTPUT_PATH", "")
        for i, word in enumerate(self.rest):
            flag, equals, value = word.partition("=")
            if flag == "--overwrite_output_path":
                given = value if equals else "".join(self.rest[i + 1 : i + 2])
        anew = given.strip().lower() in ("true", "yes", "1")
        return self.task == TRAIN and not anew and files.is_file(self.trained / RUN_SETTINGS)

    @property
    def platform_style(self) -> bool:
        """Whether the output is for the platform's progress reader."""
        return self.log_style == "platform" or (self.log_style == "auto" and bool(self.api_url))

    @property
    def base_model(self) -> str:
        """The base model of a training."""
        return self.base_model_path or self.base_model_name or self.environment.get("MODEL_NAME_OR_PATH", "")

    @property
    def judged_model(self) -> str:
        """The model of an evaluation."""
        return self.model_path or self.environment.get("MODEL_NAME_OR_PATH", "")

    @property
    def secrets(self) -> Secrets:
        """What no message may hold."""
        hidden = [part for name in ADDRESSES for part in secrets_in(getattr(self, name))]
        return Secrets([self.auth, self.notify_token, self.environment.get("HF_TOKEN", ""), *hidden])


FLAGS = tuple(item.name for item in fields(Settings) if "help" in item.metadata)


def build_parser() -> argparse.ArgumentParser:
    """Every setting; the environment has the defaults."""
    parser = Parser(prog="job/run.sh", description="Run one job and tell how it ended.", allow_abbrev=False)
    for item in fields(Settings):
        if item.name in FLAGS:
            parser.add_argument(f"--{item.name}", default=None, help=item.metadata["help"].replace("%", "%%"))
    return parser


def read_settings(argv: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """The settings of a command line and an environment. Raises UserError for what cannot be.

    What follows -- are flags of the command that does the work.
    """
    own = list(argv)
    rest: tuple[str, ...] = ()
    if "--" in own:
        place = own.index("--")
        own, rest = own[:place], tuple(own[place + 1 :])
    flags = vars(build_parser().parse_args(own))
    values = {name: (flags[name] if flags[name] is not None else environment.get(name.upper(), "")) for name in FLAGS}
    values = {name: value.strip() for name, value in values.items()}
    defaults = {item.name: item.default for item in fields(Settings) if item.name in FLAGS}
    values = {name: value or defaults[name] for name, value in values.items()}
    values["max_seq_len"] = values["max_seq_len"].removeprefix("auto")  # how eval/*.sh says that it is not set
    values["job_id"] = values["job_id"] or next((environment[n] for n in JOB_IDS if environment.get(n)), "")
    if not values["task"] or (values["task"] == EVALUATE and values["evaluation_metrics"].lower() == FIVE):
        values["task"] = guess_task(values)
    secret = {name.lower(): check_header(name, environment.get(name, "")) for name in SECRET_NAMES}
    settings = Settings(**values, **secret, rest=rest, environment=environment)
    check(settings)
    return settings


def guess_task(values: Mapping[str, str]) -> str:
    """The task that the variables belong to: each kind of job of the platform sets some that the others do not."""
    if values["dataset_analyze_model"]:
        return SIMILAR
    if values["evaluation_metrics"].lower() == FIVE:
        return FIVE
    return EVALUATE if values["model_path"] or values["evaluation_metrics"] else TRAIN


WORDS = {
    "task": TASKS, "fetch": ("auto", "true", "false"), "log_style": ("auto", "plain", "platform"),
    "scenario": ("", "general", "faq"), "dataset_type": ("", "faq"),
}  # fmt: skip
BOUNDS = {
    "gpus_per_node": (0, 1024), "model_max_length": (8, 10**7), "max_seq_len": (0, 10**7),
    "per_device_batch_size": (0, 10**6), "notify_seconds": (0, 86400),
}  # fmt: skip


def wrong_values(settings: Settings) -> Iterator[str]:
    """A sentence for each value that is none of its kind."""
    for name, words in WORDS.items():
        value = getattr(settings, name)
        if value not in words:
            yield f"{name.upper()} is {files.shown(value)}, expected {' or '.join(word for word in words if word)}"
    for name, (lowest, highest) in BOUNDS.items():
        value = getattr(settings, name)
        if value and not (re.fullmatch(r"[0-9]{1,9}", value) and lowest <= int(value) <= highest):
            yield f"{name.upper()} is {files.shown(value)}, expected a whole number from {lowest} to {highest}"
    if settings.use_lora:
        try:
            to_bool(settings.use_lora)
        except argparse.ArgumentTypeError:
            yield f"USE_LORA is {files.shown(settings.use_lora)}, expected true or false"


def check(settings: Settings) -> None:
    """Raise UserError that lists everything that is wrong with the settings."""
    problems = list(wrong_values(settings))
    if not JOB_NAME.fullmatch(settings.name):
        problems.append(f"JOB_ID is {files.shown(settings.name)}, expected letters, digits, dots, dashes, underscores")
    if settings.task == SIMILAR and not settings.dataset_path:
        problems.append("DATASET_PATH is empty, expected the path or address of questions with intents")
    if problems:
        raise UserError("; ".join(problems))
    check_header("TENANT_ID", settings.tenant_id)
    for name in ADDRESSES:
        value = getattr(settings, name)
        if value and (name in ("api_url", "notify_url") or is_address(value)):
            check_address(name.upper(), value)
