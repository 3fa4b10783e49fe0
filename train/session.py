"""The stages of a run, in order: output folder, data, model and trainer, training, what is left behind."""

import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
import transformers
from transformers import DefaultFlowCallback, GenerationConfig, PrinterCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llmops import files
from llmops.console import UserError, log
from llmops.conversations import data_files
from llmops.generation.capacity import base_of
from llmops.machine import cpu_kernels, devices, process_group
from llmops.machine.peers import Peers
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from train import attention, checkpointing, elastic, muon, states
from train.batches import PackedCollator, PaddedCollator, cross_entropy_name, why_no_loss_kernel
from train.choices import Choices, free_memory, resolve
from train.config import Config
from train.course import course_words, judges
from train.dataset import TokenDataset
from train.estimates import add_lora
from train.faults import explain_faults
from train.replay import Joined, replayed
from train.run_folder import (
    CACHE_NAME,
    CONFIG_NAME,
    PROCESSES,
    RECORD,
    STEP,
    STOP_NAME,
    data_digests,
    step_size,
)
from train.schedule import EarlyStopping, Schedule
from train.source import Source
from train.token_cache import load_or_encode
from train.trainer import ChatTrainer, all_least, barrier
from train.training_log import ConsoleServer, TensorBoardServer, TokenCounter, TrainingLog, event_writer

NEVER = 10**9
LONGEST_WAIT = timedelta(hours=2)  # of processes for each other: loading a large model from a slow disk takes a while
T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """Tokenised conversations and the model whose tokens they are; no weight of it is loaded."""

    train: TokenDataset
    test: TokenDataset
    retention: TokenDataset
    model: ChatModel
    replay: TokenDataset | None = None

    @property
    def learned(self) -> TokenDataset | Joined:
        """All that is learned."""
        return self.train if self.replay is None else Joined(self.train, self.replay)


def prepare_data(config: Config, encodes: bool) -> Data:
    """Tokenise (or read from the cache) training, test and retention conversations."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' talk among themselves
    checkpoint = config.checkpoint
    model = config.model
    chat = model.chat
    length = checkpoint.length or config.max_seq_len
    if length < config.max_seq_len and encodes:
        log(f"the model was made for {length} tokens, so that is the limit and not --max_seq_len {config.max_seq_len}")

    def load(paths: list[Path], skip: bool, general: bool = False) -> TokenDataset:
        whole = config.scenario == "faq" and not general
        limit = min(length, config.max_seq_len)
        learn = "all" if general else config.learn
        source = Source(
            tuple(paths), checkpoint.folder, config.mode, limit, skip, whole, config.allow_special_tokens,
            config.thinking, learn,
        )  # fmt: skip
        return load_or_encode(source, chat, Path(config.output_path) / CACHE_NAME, encodes)

    train = load(config.train_files, config.skip_bad_lines)
    check_tokens(checkpoint, train)
    if config.test_files:
        test = load(config.test_files, config.skip_bad_lines)
    else:
        train, test = train.split(config.eval_ratio, config.seed)
        if encodes:
            log(f"no test file: {len(test):,} of {len(train) + len(test):,} conversations are held out")
            if not judges(config, len(test)):
                log("that is too few to choose by, so the last weights are kept")
    replay = load(config.replay_files, False, general=True) if config.replay_files else None
    return Data(train, test, load([config.retention_path], False, general=True), model, replay)


def check_tokens(checkpoint: Checkpoint, data: TokenDataset) -> None:
    """Raise UserError for a token that the model has no embedding for: on a GPU it would end in a device fault."""
    known, highest = checkpoint.vocabulary, data.highest_token()
    if known is not None and highest >= known:
        raise UserError(
            f"the tokenizer of {checkpoint.folder} writes the token {highest} and the model knows {known}, from 0: the "
            "tokenizer's files belong to another model; copy the checkpoint again"
        )


def join_processes() -> torch.device:
    """Make this process one of the run's, with a device of its own; without the launcher it is the only one."""
    # DeepSpeed looks in this table for a shared-memory operator, which CPU processes would compile at the first start
    # (gloo needs no compiler); left to itself it fills the table by trying every operator, seconds of it on a GPU
    deepspeed.ops.__compatible_ops__ = {}
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": process_group.LOOPBACK}
    for name, value in alone.items():  # without the launcher
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(process_group.free_port())
    device = devices.of_this_process(os.environ)
    muon.compile_late()
    # the Trainer's ddp_timeout comes too late for this group
    with process_group.meeting():
        deepspeed.init_distributed(timeout=LONGEST_WAIT, init_method=process_group.init_method())
    return device


def agree(choose: Callable[[], T], rank: int) -> T:
    """What the first process chooses, in every process; its UserError, too."""
    chosen: list[Any] = [None]
    if rank == 0:
        try:
            chosen[0] = choose()
        except UserError as error:
            chosen[0] = error
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(chosen, src=0)
    if isinstance(chosen[0], UserError):
        raise chosen[0]
    return chosen[0]


def deepspeed_settings(config: Config, step: int) -> dict[str, Any]:
    """The DeepSpeed JSON, its batch sizes left to the Trainer: a step is one batch there, cut up by `train.steps`.

    `step`: conversations of an optimizer step, over all processes.

    Raises UserError for sizes that are not those of the settings.
    """
    found = files.read_object(config.deepspeed_file, "the DeepSpeed file")
    size, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    expected = {
        "train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": steps,
        "train_batch_size": step,
    }  # fmt: skip
    for name, value in expected.items():
        if found.get(name, "auto") not in ("auto", value):
            raise UserError(
                f"{config.deepspeed_file} says {name} {found[name]} and the settings make it {value}; write auto there"
            )
    return found | dict.fromkeys(expected, "auto")


def training_arguments(config: Config, dtype: torch.dtype, choices: Choices, step: int) -> TrainingArguments:
    """Our settings in the Trainer's words; evaluation, saving and logging follow our own Schedule.

    `step`: conversations of an optimizer step, over all processes; what the Trainer hears is a process's part, rounded.
    """
    processes = dist.get_world_size()
    return TrainingArguments(
        output_dir=config.output_path,
        per_device_train_batch_size=math.ceil(step / processes),
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        learning_rate=choices.course.rate,
        num_train_epochs=choices.course.epochs,
        max_steps=config.max_steps,
        lr_scheduler_type=config.lr_scheduler_type
        if config.lr_scheduler_type != "constant"
        else "constant_with_warmup",
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        neftune_noise_alpha=config.neftune_noise_alpha or None,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        activation_checkpointing=choices.recompute > 0,
        activation_checkpointing_kwargs={"use_reentrant": False, "every_n_layers": choices.recompute},
        deepspeed=deepspeed_settings(config, step),
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        eval_strategy="steps",
        eval_steps=NEVER,
        save_strategy="steps",
        save_steps=NEVER,
        metric_for_best_model=f"eval_{config.metric_for_best}",
        greater_is_better=config.metric_for_best == "accuracy",
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_timeout=int(LONGEST_WAIT.total_seconds()),
    )


def load_for_training(config: Config, opened: ChatModel, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The base model, with LoRA layers on it unless every weight is trained.

    Straight onto a GPU, unless ZeRO 3 cuts the weights up while they are loaded.
    """
    base = opened.weights(dtype, None if is_deepspeed_zero3_enabled() else device)
    base.config.use_cache = False
    keep_ends_alone(base)
    if config.train_type == "all":
        return base
    model = add_lora(config, base)
    model.peft_config["default"].base_model_name_or_path = str(opened.checkpoint.folder.resolve())
    return model


def keep_ends_alone(model: transformers.PreTrainedModel) -> None:
    """Take all but tokens from the settings of generation, which no training reads: the base's own file is saved.

    The Trainer fits their tokens to the tokenizer's, and what was changed is not saved while it also holds a
    temperature without sampling, as published models do (Vicuna).
    """
    found = getattr(model, "generation_config", None)
    if found is not None:
        tokens = {name: getattr(found, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**tokens)


def why_padded(config: Config, base: torch.nn.Module) -> str | None:
    """Why a model's batches are padded, or None where its rows are packed."""
    if not config.packing:
        return "that was asked for"
    if config.neftune_noise_alpha:
        return "NEFTune's noise is defined per padded row"
    return attention.supports_packing(base)


def choose_collator(
    config: Config, model: torch.nn.Module, tokenizer: Any, device: torch.device, dtype: torch.dtype
) -> tuple[PackedCollator | PaddedCollator, str]:
    """Packed batches where they were asked for and the model can take them, and how attention is computed."""
    base = base_of(model)
    reason = why_padded(config, base)
    if reason:
        left = tokenizer.padding_side == "left" and not tokenizer.is_fast
        how = "padded batches of similar lengths"
        return PaddedCollator(tokenizer.pad_token_id, left), f"{how}; packing is off: {reason}"
    base.set_attn_implementation(attention.NAME)
    why_blocks = attention.why_no_flex(base, device, dtype)
    how = f"packed rows, attention in blocks, because {why_blocks}" if why_blocks else "packed rows, FlexAttention"
    return PackedCollator(flex=why_blocks is None, pad_id=tokenizer.pad_token_id), how


def build_trainer(config: Config, data: Data, peers: Peers | None = None) -> tuple[ChatTrainer, Schedule]:
    """Model, DeepSpeed and Trainer, ready to train; `peers` watch over other machines from here on."""
    dtype = devices.choose_dtype(config.dtype)
    device = join_processes()
    if peers:
        peers.begin()
    rank, world = dist.get_rank(), dist.get_world_size()
    step = agree(lambda: step_size(config, world), rank)
    free = all_least(free_memory(device), device)  # somebody else may be at work on one of the GPUs
    choices = agree(lambda: resolve(config, dtype, data.learned, device, world, free), rank)
    cpu_kernels.allow(choices.kernel)
    arguments = training_arguments(config, dtype, choices, step)  # starts ZeRO 3's partitioned loading
    set_seed(config.seed)
    model = load_for_training(config, data.model, dtype, device)
    speaks = arguments.process_index == 0
    collator, how = choose_collator(config, model, data.model.tokenizer, device, dtype)
    chosen = choices.to_json() | {
        "attention": how,
        "cross_entropy": cross_entropy_name(device, dtype),
        "dtype": str(dtype)[6:],
        STEP: step,
        PROCESSES: world,
    }
    if speaks:
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        count = [sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)]
        log(
            f"{data.model.chat.name}; {count[0]:,} weights, {count[1]:,} trained ({config.train_type}), "
            f"{str(dtype)[6:]}, {world} process{'es' if world > 1 else ''}, ZeRO from {config.deepspeed_file.name}; "
            f"{choices.words()}; {how}"
        )
        why_rows = why_no_loss_kernel(device, dtype) if device.type == "cuda" else None
        if why_rows:
            log(f"the loss is computed some rows at a time, not in one kernel, because {why_rows}")
        if step != config.per_device_train_batch_size * config.gradient_accumulation_steps * world:
            log(f"the run's steps keep their {step} conversations, now dealt to {world}")
        if data.replay is not None:
            log(replay_words(config, data, step))
        said = course_words(config, choices.course)
        if said:
            log(said)
    tokens = TokenCounter()
    output = Path(config.output_path)
    trainer = ChatTrainer(
        model, arguments, collator, data.train, data.test, processing_class=data.model.tokenizer,
        retention=data.retention, tokens=tokens, keep=config.save_total_limit,
        grouped=isinstance(collator, PaddedCollator), split=choices.split, step_size=step, replay=data.replay,
        replay_ratio=config.replay_ratio, opened=data.model,
        with_accuracy=config.scenario == "faq" or config.metric_for_best == "accuracy",
    )  # fmt: skip
    trainer.chosen = chosen
    schedule = Schedule(config.eval_steps, choices.course.between, trainer.evaluate_and_compare, output / STOP_NAME)
    training_log = TrainingLog(output, speaks, arguments.local_process_index == 0, tokens, chosen)
    add_callbacks(config, trainer, training_log, schedule)
    trainer.asked_to_end = lambda: schedule.agreed
    return trainer, schedule


def add_callbacks(config: Config, trainer: ChatTrainer, training_log: TrainingLog, schedule: Schedule) -> None:
    """Ours in the place of the Trainer's: they are called in this order."""
    for replaced in (DefaultFlowCallback, PrinterCallback):
        trainer.remove_callback(replaced)
    trainer.add_callback(training_log)
    if config.early_stopping_patience:
        trainer.add_callback(EarlyStopping(config.early_stopping_patience))
    trainer.add_callback(schedule)
    if trainer.args.process_index == 0:
        trainer.add_callback(TensorBoardCallback(event_writer(trainer.output / "tensorboard")))
    for tracker in get_reporting_integration_callbacks(config.trackers):
        trainer.add_callback(tracker)


def replay_words(config: Config, data: Data, size: int) -> str:
    """What of each step of `size` conversations is replayed, for people."""
    return (
        f"against forgetting, {replayed(size, config.replay_ratio)} of the {size} conversations of every step are "
        f"general ones ({len(data.replay or ()):,} of {data_files.name_of(config.replay_files)}; --replay_ratio)"
    )


def choose_checkpoint(config: Config, rank: int) -> str | None:
    """The checkpoint to go on from, the same in every process; None to begin at the first step."""

    def newest() -> str | None:
        found = None
        if config.resume:
            found = checkpointing.newest_whole(Path(config.output_path), judge=states.problem)
        return str(found) if found else None

    return agree(newest, rank)


def train(config: Config, trainer: ChatTrainer, schedule: Schedule, rank: int) -> None:
    """Train from the newest whole checkpoint to the end; expected faults become one sentence."""
    output = Path(config.output_path)
    barrier()
    checkpoint = choose_checkpoint(config, rank)
    if rank == 0:
        settings = config.to_json() | data_digests(config) | {RECORD: trainer.chosen}
        files.write_json(output / CONFIG_NAME, settings)
        if checkpoint:
            log(f"continuing from {checkpoint}")
    trainer.ended = checkpoint is not None and checkpointing.read_manifest(Path(checkpoint)).ended
    schedule.catch_signals()
    started = time.monotonic()
    with (
        TensorBoardServer(
            output / "tensorboard", config.tensorboard_host, config.tensorboard_port, config.tensorboard and rank == 0
        ),
        ConsoleServer(config.mount, config.console_host, config.console_port, config.console and rank == 0),
        explain_faults(config, trainer.split),
        states.loadable(),
        elastic.loading(checkpoint),
    ):
        trainer.train(resume_from_checkpoint=checkpoint)
    schedule.leave_signals()
    schedule.end_if_signalled(trainer.args.device)
    trainer.seconds = time.monotonic() - started
