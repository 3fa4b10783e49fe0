"""Every setting of a fine-tuning run, with its help and bounds, in one frozen dataclass; what is derived from it.

Standard library only, so that `--help` and most errors are instant. The names are Hugging Face's and the field's.
`train/flags.py` makes flags of the fields, `train/problems.py` says what is wrong with them.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llmops.console import to_bool
from llmops.conversations import data_files
from llmops.conversations.records import LEARN
from llmops.formats.families import families
from llmops.machine import cpu_kernels
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint

HERE = Path(__file__).resolve().parent
DS_FILES = {"2": "ds_zero2.json", "3": "ds_zero3.json", "3_offload": "ds_zero3_offload.json"}
# The FAQ scenario's own defaults: long prompts that all rows share, short answers, so larger batches and higher rates.
FAQ_DEFAULTS = {
    "max_seq_len": 2048,
    "warmup_ratio": 0.1,
    "lora_dim": 8,
    "lora_alpha": 16.0,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 32,
}
RECOMPUTE_WORDS = {"auto": None, "true": 1, "yes": 1, "false": 0, "no": 0}
PEAK_LEARNING_RATES = {
    "general": {"lora": 1e-4, "all": 1e-5},
    "faq": {"lora": 2e-4, "all": 2e-5},
}


def setting(
    default: Any,
    help: str,
    choices: Iterable[str] | Callable[[], Iterable[str]] | None = None,
    min: float | None = None,
    max: float | None = None,
) -> Any:
    """A dataclass field with its help text, allowed values (or what tells them) and bounds."""
    return field(default=default, metadata={"help": help, "choices": choices, "min": min, "max": max})


@dataclass(frozen=True)
class Config:
    """A fine-tuning run. Paths are strings as given; empty means "choose for me", as each help text says."""

    # what and where
    scenario: str = setting(
        "general", "what the data is: general: conversations; faq: questions with intents", ["general", "faq"]
    )
    model_name_or_path: str = setting("mnt/Llama-2-13b-chat-hf", "folder of the base model")
    mode: str = setting("auto", "chat format; auto: the checkpoint's own template, else its family's", families)
    train_file: str = setting(
        "mnt/datasets/train.jsonl", "conversations to learn: a file, several with commas, a pattern or a saved dataset"
    )
    test_file: str = setting(
        "", "held-out conversations; empty: test.jsonl beside the first training file, else a part of the training data"
    )
    learn: str = setting("all", "which answers are learned: all, or last: those after the last question", LEARN)
    enable_thinking: str = setting(
        "",
        "what a thinking model's chat template is told: true or false; empty or auto: nothing",
        ["", "auto", "true", "false"],
    )
    output_path: str = setting("mnt/output_path", "where the model, checkpoints, log.txt and pictures go")
    # how to train
    train_type: str = setting("lora", "lora: a small adapter; all: every weight", ["lora", "all"])
    lora_module_name: str = setting(
        "", "layers that get LoRA, such as gate_proj,down_proj,up_proj; empty: attention and MLP of the family"
    )
    lora_dim: int = setting(16, "LoRA rank", min=1)
    lora_alpha: float = setting(32, "LoRA scaling numerator (scale = alpha / rank)", min=0)
    lora_dropout: float = setting(0.05, "dropout before the LoRA layers", min=0)
    per_device_train_batch_size: int = setting(4, "conversations per device and accumulation step", min=1)
    gradient_accumulation_steps: int = setting(4, "accumulation steps per optimizer step", min=1)
    micro_batch_tokens: int = setting(
        0, "tokens that go through a device at once; 0: on a GPU what fits, on a CPU 2048", min=0
    )
    per_device_eval_batch_size: int = setting(8, "conversations per device while evaluating", min=1)
    max_seq_len: int = setting(
        1024, "longest conversation in tokens; longer ones are cut, in faq they are errors", min=8
    )
    learning_rate: float = setting(0.0, "peak learning rate; 0: 1e-4 for lora, 1e-5 for all, twice that for faq", min=0)
    num_train_epochs: float = setting(
        0.0, "passes over the training data; 0: 3, and for small data as many as make 40 steps", min=0
    )
    max_steps: int = setting(-1, "stop after this many optimizer steps; -1: by epochs")
    zero_stage: str = setting("2", "DeepSpeed ZeRO: 2, 3 or 3_offload", list(DS_FILES))
    ds_file: str = setting("", "your own DeepSpeed JSON instead of train/ds_zero*.json")
    dtype: str = setting(
        "auto",
        "number format: auto (bf16 where the GPU computes it, else fp32), bf16, fp16 (with loss scaling), fp32",
        ["auto", "bf16", "fp16", "fp32"],
    )
    cpu_kernels: str = setting("auto", cpu_kernels.HELP, list(cpu_kernels.SETTINGS))
    gradient_checkpointing: str = setting(
        "auto",
        "layers recomputed in the backward pass: auto (as few as memory asks for), true (all), false, or N: one in N",
    )
    packing: bool = setting(True, "no padding, shared prompt beginnings stored once; false: plain padded batches")
    max_grad_norm: float = setting(1.0, "gradient clipping; 0: none", min=0)
    lr_scheduler_type: str = setting(
        "cosine",
        "cosine, linear or constant (also constant_with_warmup), each after the warmup",
        ["cosine", "linear", "constant", "constant_with_warmup"],
    )
    warmup_ratio: float = setting(0.03, "share of the steps that warms up", min=0)
    weight_decay: float = setting(0.0, "AdamW weight decay", min=0)
    neftune_noise_alpha: float = setting(0.0, "NEFTune noise (Jain et al. 2023); 0: none; uses padded batches", min=0)
    early_stopping_patience: int = setting(0, "stop after this many evaluations without a better one; 0: never", min=0)
    # evaluation, checkpoints, logging
    eval_ratio: float = setting(0.1, "share of the training data that is held out when there is no test file", min=0)
    eval_steps: int = setting(0, "evaluate and save every N steps too; 0: at every epoch only", min=0)
    save_total_limit: int = setting(2, "newest checkpoints that are kept; the best one is always kept as well", min=1)
    metric_for_best: str = setting(
        "loss",
        "what makes an evaluation the best: its loss, or accuracy: answers that are right to their end",
        ["loss", "accuracy"],
    )
    load_best_model_at_end: bool = setting(
        True, "output_path gets the weights of the best evaluation; false: the last ones"
    )
    replay_ratio: float = setting(
        0.0, "share of every step's conversations that are general ones, against forgetting", min=0
    )
    replay_file: str = setting("", "general conversations to learn again; empty: train/replay.jsonl")
    retention_file: str = setting("", "general conversations that measure forgetting; empty: train/retention.jsonl")
    logging_steps: int = setting(1, "optimizer steps between two lines of log.txt", min=1)
    tensorboard: bool = setting(True, "serve TensorBoard while training runs")
    tensorboard_host: str = setting("127.0.0.1", "address that TensorBoard listens on; 0.0.0.0: all, without a login")
    tensorboard_port: int = setting(6006, "port of TensorBoard", min=1, max=65535)
    console: bool = setting(False, "serve the console over MOUNT_PATH while training runs")
    console_host: str = setting("127.0.0.1", "address that the console listens on; 0.0.0.0: all, with its token")
    console_port: int = setting(5000, "port of the console", min=1, max=65535)
    mount_path: str = setting("", "folder that the console shows; empty: the one that output_path is in")
    report_to: str = setting(
        "", "trackers that get every logged line as well, with commas: swanlab, mlflow, trackio, wandb"
    )
    merge_lora: bool = setting(False, "also write output_path/merged: base model and adapter in one")
    # behaviour
    dry_run: bool = setting(False, "check the data, show what is learned, estimate memory and time, train nothing")
    skip_bad_lines: bool = setting(False, "drop and count bad lines instead of stopping")
    allow_special_tokens: bool = setting(
        False, "texts of control tokens in the data become these tokens; false: they are text"
    )
    resume: bool = setting(True, "continue an interrupted run; false: refuse to touch it")
    overwrite_output_path: bool = setting(False, "delete an earlier run in output_path and start again")
    trust_remote_code: bool = setting(False, "run Python code that the checkpoint's folder ships")
    seed: int = setting(42, "random seed", min=0)

    def to_json(self) -> dict[str, Any]:
        """The resolved settings as plain JSON."""
        return asdict(self)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base model."""
        return Checkpoint(Path(self.model_name_or_path), self.mode, self.trust_remote_code)

    @cached_property
    def model(self) -> ChatModel:
        """The base model, opened part by part as they are asked for."""
        return ChatModel(self.checkpoint, self.allow_special_tokens, self.thinking)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate with the default of scenario and training type filled in."""
        return self.learning_rate or PEAK_LEARNING_RATES[self.scenario][self.train_type]

    @property
    def mount(self) -> Path:
        """The folder that the console shows."""
        return Path(self.mount_path) if self.mount_path else Path(self.output_path).absolute().parent

    @property
    def trackers(self) -> list[str]:
        """The trackers of --report_to; TensorBoard's files are written in any case."""
        named = [name.strip().lower() for name in self.report_to.split(",")]
        return [name for name in dict.fromkeys(named) if name not in ("", "none", "tensorboard")]

    @property
    def thinking(self) -> bool | None:
        """--enable_thinking as the chat template gets it; None: not at all."""
        return to_bool(self.enable_thinking) if self.enable_thinking else None

    @property
    def recompute(self) -> int | None:
        """--gradient_checkpointing as a number: every so-manieth layer is recomputed, 0: none; None for auto."""
        text = self.gradient_checkpointing.lower()
        return RECOMPUTE_WORDS[text] if text in RECOMPUTE_WORDS else int(text)

    @property
    def deepspeed_file(self) -> Path:
        """The DeepSpeed configuration in force."""
        return Path(self.ds_file) if self.ds_file else HERE / DS_FILES[self.zero_stage]

    @property
    def retention_path(self) -> Path:
        """The general conversations that measure forgetting."""
        return Path(self.retention_file) if self.retention_file else HERE / "retention.jsonl"

    @property
    def train_files(self) -> list[Path]:
        """The files of conversations that are learned. Raises UserError for a pattern that matches nothing."""
        return data_files.list_files(self.train_file)

    @property
    def replay_files(self) -> list[Path]:
        """The general conversations that are learned again; none without --replay_ratio."""
        if not self.replay_ratio:
            return []
        return data_files.list_files(self.replay_file) if self.replay_file else [HERE / "replay.jsonl"]

    @property
    def test_files(self) -> list[Path]:
        """The held-out files; none when a part of the training data is held out."""
        if self.test_file:
            return data_files.list_files(self.test_file)
        return data_files.tests_beside(self.train_files)


# Settings that may differ between two starts of the same run: they change neither what is learned nor in which order.
# run_folder.py knows two more, which may change together so that a step stays as large as it is.
RESTARTABLE = frozenset(
    [
        "dry_run",
        "resume",
        "overwrite_output_path",
        "tensorboard",
        "tensorboard_host",
        "tensorboard_port",
        "console",
        "console_host",
        "console_port",
        "mount_path",
        "report_to",
        "merge_lora",
        "save_total_limit",
        "skip_bad_lines",
        "logging_steps",
        "per_device_eval_batch_size",
        "load_best_model_at_end",
        "trust_remote_code",
        "gradient_checkpointing",
        "micro_batch_tokens",
        "zero_stage",
    ]
)
