"""A checkpoint of N processes goes on with M, or in another ZeRO stage: its states are read and cut anew on the way.

Nothing is written: every process reads the parts of the N files that are its own, and the next checkpoint is written by
M processes as any other. So the old checkpoint stays what it was, a start that is killed has lost nothing, and there is
no second copy on the disk (DeepSpeed's universal checkpoints are one, in a file for each state of each weight).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from transformers import trainer as hf_trainer

from llmops.console import log, progress
from train import checkpointing
from train.shards import FP32, NUMBERS, Shards, has_bias_correction, is_whole

GLOBAL = ("loss_scaler", "dynamic_loss_scale", "overflow")  # of fp16, the same in every process


@dataclass(frozen=True)
class Target:
    """This process's part of a group of weights: `flat` is its fp32 copy, where the optimizer works.

    `parts`: (weight, first element of it, how many, where in `flat`). `first`: a weight of the group, also where this
    process has none of it.
    """

    flat: torch.Tensor
    parts: list[tuple[str, int, int, int]]
    first: str


@contextmanager
def loading(checkpoint: str | None) -> Iterator[None]:
    """Within this context the Trainer goes on from `checkpoint` with as many processes as this start has."""
    written = checkpointing.read_manifest(Path(checkpoint)).world_size if checkpoint else 0
    original = hf_trainer.deepspeed_load_checkpoint

    def load(engine: DeepSpeedEngine, checkpoint_path: str, load_module_strict: bool = True) -> None:
        folder = Path(checkpoint_path)
        same = written == dist.get_world_size() and is_whole(folder) == engine.zero_optimization_partition_weights()
        same = same and not other_adam(engine, folder)
        if same or not engine.zero_optimization():  # in stage 0 every process has all
            original(engine, checkpoint_path, load_module_strict=load_module_strict)
        else:
            cut_anew(engine, folder, written)

    hf_trainer.deepspeed_load_checkpoint = load
    try:
        yield
    finally:
        hf_trainer.deepspeed_load_checkpoint = original


def other_adam(engine: DeepSpeedEngine, checkpoint: Path) -> bool:
    """Whether states that torch's Adam keeps go to DeepSpeed's for CPUs (--zero_stage 3_offload), or the other way.

    Each stops at the other's settings and steps.
    """
    now = getattr(engine.optimizer, "optimizer", None)
    if not isinstance(now, (DeepSpeedCPUAdam, torch.optim.Adam)):
        return False
    return isinstance(now, DeepSpeedCPUAdam) != has_bias_correction(checkpoint)


def cut_anew(engine: DeepSpeedEngine, checkpoint: Path, written: int) -> None:
    """Load the states that `written` processes wrote into this process's part of a fresh engine.

    Raises UserError when the checkpoint's states, or this run's ZeRO, are of a kind that cannot be cut anew.
    """
    speaks = dist.get_rank() == 0
    shards = Shards(checkpoint, written)
    optimizer = engine.optimizer
    if type(optimizer) not in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        raise shards.refused(f"the DeepSpeed file asks for {type(optimizer).__name__}, which cuts states its own way")
    if engine.zero_nvme_offload_optimizer():
        raise shards.refused("the DeepSpeed file keeps states on NVMe")
    if speaks:
        log(
            f"{checkpoint} was written by {written} process{'es' if written > 1 else ''} in ZeRO stage {shards.stage} "
            f"and this start has {dist.get_world_size()} in stage {int(engine.zero_optimization_stage())}: its "
            "optimizer states are cut anew while they are read, and it stays as it is"
        )
    whole = engine.zero_optimization_partition_weights()
    if whole:
        optimizer.checkpoint_event_prologue()
    targets = targets_whole(engine) if whole else targets_sliced(engine)
    state = optimizer.state_dict()
    state |= {key: shards.states[0][key] for key in GLOBAL}
    inner = filled(shards, targets, optimizer, state[NUMBERS]["param_groups"] if whole else None, silent=not speaks)
    state[NUMBERS if whole else "base_optimizer_state"] = inner
    rank = dist.get_rank(group=optimizer.dp_process_group)
    optimizer.load_state_dict([{}] * rank + [state] + [{}] * (dist.get_world_size() - rank - 1),
                              load_from_fp32_weights=True)  # fmt: skip
    if whole:
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
    restore_counts(engine, shards.model)
    if speaks:
        log("the optimizer states are in place")


def targets_sliced(engine: DeepSpeedEngine) -> list[Target]:
    """Stages 1 and 2: a group's weights end to end, cut by process; DeepSpeed has noted on each weight what is here."""
    optimizer, targets = engine.optimizer, []
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        parts = [
            (engine.param_names[weight], here.lp_fragment_address.start, here.lp_fragment_address.numel,
             here.hp_fragment_address.start)
            for weight in group if (here := weight._hp_mapping) is not None
        ]  # fmt: skip
        targets.append(Target(flat.data, parts, engine.param_names[group[0]]))
    return targets


def targets_whole(engine: DeepSpeedEngine) -> list[Target]:
    """Stage 3: an equal part of every weight, the last one padded."""
    optimizer, targets = engine.optimizer, []
    rank = dist.get_rank(group=optimizer.dp_process_group)
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        parts, start = [], 0
        for weight in group:
            size = weight.partition_numel()
            count = min(size, weight.ds_numel - rank * size)
            if count > 0:
                parts.append((engine.param_names[weight], rank * size, count, start))
            start += size
        targets.append(Target(flat.data, parts, engine.param_names[group[0]]))
    return targets


def filled(
    shards: Shards, targets: list[Target], optimizer: Any, groups: list[dict[str, Any]] | None, silent: bool
) -> dict[str, Any]:
    """Fill the fp32 copies; the state dict of the wrapped optimizer for this process, padding zero.

    `groups`: its parameter groups in stage 3, where several targets may be of one; else every target is one.
    """
    inner: dict[int, dict[str, Any]] = {}
    work: list[tuple[str, str, int, torch.Tensor]] = []
    for index, target in enumerate(targets):
        group = shards.group_of(target.first)
        states = {
            key: torch.zeros_like(target.flat, dtype=shards.dtype(group, key), requires_grad=False)
            for key in shards.keys(group)
        }
        inner[index] = scalars(shards, group, optimizer) | states
        for key, flat in (states | {FP32: target.flat}).items():
            work += [(key, name, place, flat[start : start + count]) for name, place, count, start in target.parts]
    for key, name, place, into in progress(work, "optimizer states", len(work), "parts", silent):
        shards.copy(key, name, place, into)
    if groups is None:
        groups = [{**group, "params": [i]} for i, group in enumerate(optimizer.optimizer.param_groups)]
    found = shards.settings() or [{}] * len(groups)
    if len(found) != len(groups):
        raise shards.refused(f"it has {len(found)} groups of weights and this start {len(groups)}")
    groups = [now | then | {"params": now["params"]} for now, then in zip(groups, found, strict=True)]
    return {"state": inner, "param_groups": groups}


def scalars(shards: Shards, group: int, optimizer: Any) -> dict[str, Any]:
    """A group's states that are one number; torch's Adam has its steps in a tensor, DeepSpeed's for CPUs in an int."""
    found = shards.scalars(group)
    if "step" in found and isinstance(optimizer.optimizer, DeepSpeedCPUAdam):
        found["step"] = int(found["step"])
    elif "step" in found and isinstance(optimizer.optimizer, torch.optim.Adam):
        found["step"] = torch.tensor(float(found["step"]))
    return found


def restore_counts(engine: DeepSpeedEngine, saved: dict[str, Any]) -> None:
    """What DeepSpeed keeps beside the optimizer's states: its counts, its own scheduler, buffers of the model."""
    engine.global_steps, engine.skipped_steps = saved["global_steps"], saved["skipped_steps"]
    engine.global_samples = saved["global_samples"]
    if engine.lr_scheduler is not None and saved["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(saved["lr_scheduler"])
    kept = {name: saved["module"][name] for name in saved["buffer_names"] if name in saved["module"]}
    engine.module.load_state_dict(kept, strict=False)
