"""Hugging Face Trainer and what it lacks: token-exact loss, whole checkpoints, retention loss."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import get_length_grouped_indices

from llmops.console import RunStopped
from llmops.models.chat_model import ChatModel
from train import checkpointing, ownership, states
from train.batches import (
    PackedCollator,
    PaddedCollator,
    right_answers,
    target_logits,
    target_losses,
    to_device,
    token_losses,
)
from train.dataset import TokenDataset
from train.replay import Joined, ReplayOrder, replayed
from train.steps import Ahead, Split, StepCollator, StepSampler
from train.training_log import ACCURACY, TokenCounter

if TYPE_CHECKING:
    from peft import PeftModel


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def all_sum(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sum over all processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def all_least(value: float, device: torch.device) -> float:
    """The least of the processes' values."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    least = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return float(least)


class EpochSampler(torch.utils.data.Sampler[int]):
    """A permutation that depends on seed and epoch alone, so that a resumed epoch has the order of the undisturbed one.

    `group` is the number of rows per step among which lengths should be alike, or None for a plain shuffle.
    """

    def __init__(self, lengths: np.ndarray, seed: int, group: int | None, epoch: Callable[[], int]) -> None:
        self.lengths, self.seed, self.group, self.epoch = lengths, seed, group, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        if self.group:
            return iter(get_length_grouped_indices(self.lengths.tolist(), self.group, generator=generator))
        return iter(torch.randperm(len(self), generator=generator).tolist())


def own_part(weight: torch.nn.Parameter) -> torch.Tensor:
    """What this process holds of a weight: all of it, or in ZeRO 3 its part, without what is padded there.

    DeepSpeed never writes to the padding (`Init._partition_param`): any number, or none, may stand in it.
    """
    cut: Any = weight  # in ZeRO 3 it has attributes of DeepSpeed's
    if not hasattr(cut, "ds_tensor"):
        return weight.detach()
    part: torch.Tensor = cut.ds_tensor.detach()
    return part[: max(0, cut.ds_numel - dist.get_rank(group=cut.ds_process_group) * part.numel())]


def host_copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict in host memory, each memory once: tied weights stay tied."""
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for tensor in state.values():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in copies:
            copies[place] = tensor.cpu()
    return {name: copies[tensor.data_ptr(), tensor.shape] for name, tensor in state.items()}


class ChatTrainer(Trainer):
    """Trains on whole steps of `train.steps`: an item of its loader is an optimizer step, cut into micro-batches here.

    The loss is the sum over learned tokens divided by their number in the whole optimizer step, over all
    micro-batches and processes; evaluation is the mean over all learned tokens of a set. Between two optimizer steps
    nothing asks a tensor for its value, so a GPU is never waited for: counts are made where the data is.
    """

    train_dataset: TokenDataset
    eval_dataset: TokenDataset
    data_collator: PackedCollator | PaddedCollator
    model: "PreTrainedModel | PeftModel"

    def __init__(
        self, *args: Any, retention: TokenDataset, tokens: TokenCounter, keep: int, grouped: bool, split: Split,
        step_size: int, opened: ChatModel, replay: TokenDataset | None = None, replay_ratio: float = 0.0,
        with_accuracy: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.retention = retention
        self.step_size = step_size  # conversations of an optimizer step, over all processes
        self.replay = replay
        self.replayed = replayed(self.step_size, replay_ratio) if replay is not None else 0
        self.with_accuracy = with_accuracy  # an evaluation says how many conversations are written rightly
        self.tokens = tokens
        self.keep = keep
        self.grouped = grouped
        self.split = split
        self.opened = opened  # what the training begins with
        self.chosen: dict[str, Any] = {}  # what the run chose by itself, for the record
        assert self.args.output_dir
        self.output = Path(self.args.output_dir)
        self.seconds = 0.0
        self._staging = False
        self._ahead: Ahead | None = None
        self.ended = False  # the checkpoint that this start goes on from was the last one
        self.asked_to_end: Callable[[], bool] = lambda: False

    def _get_train_sampler(self, train_dataset: torch.utils.data.Dataset[Any] | None = None) -> EpochSampler:
        size = self.step_size - self.replayed if self.grouped else None
        return EpochSampler(self.train_dataset.lengths, self.args.seed, size, self._epoch)

    def _epoch(self) -> int:
        return int((self.state.epoch or 0) + 1e-6)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        """One item per optimizer step, the same conversations in every process."""
        args, on_gpu = self.args, self.args.device.type == "cuda"
        data: Any = self.train_dataset if self.replay is None else Joined(self.train_dataset, self.replay)
        again = () if self.replay is None else ReplayOrder(data, args.seed, self._epoch)
        return torch.utils.data.DataLoader(
            data,
            batch_sampler=StepSampler(self._get_train_sampler(), self.step_size, again, self.replayed),
            collate_fn=StepCollator(self.data_collator, self.split, args.process_index, args.world_size),
            pin_memory=on_gpu,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """The next step; it knows its number of learned tokens itself. On a GPU the one after it is made meanwhile."""
        if device.type != "cuda":
            return [next(epoch_iterator)], None
        self._ahead = self._ahead or Ahead(epoch_iterator, device)
        return [next(self._ahead)], None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the Trainer's estimate knows neither shared prefixes nor LoRA."""
        return 0

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of every micro-batch of a step; DeepSpeed's optimizer steps after the last one."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        last = len(inputs["batches"]) - 1
        for i, batch in enumerate(inputs["batches"]):
            self.tokens.local += batch["tokens"]
            loss = self.compute_loss(model, to_device(batch, self.args.device), num_items_in_batch=inputs["learned"])
            total += loss.detach()
            if i == last:
                self._stop_if_broken(total)
            self.accelerator.gradient_state._set_sync_gradients(i == last)
            self.accelerator.backward(loss, scale_wrt_gas=False)
        return total

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """This micro-batch's share of the step's mean loss per learned token.

        Times the number of processes, because DeepSpeed averages over them.
        """
        share = inputs.get("weight", 1.0) * self.args.world_size / num_items_in_batch
        return target_losses(model, inputs).sum() * share

    def _stop_if_broken(self, loss: torch.Tensor) -> None:
        """NaN and inf in any of a step's micro-batches end the run with advice, before they reach the weights."""
        value = float(loss)  # the one wait of a step, when all that is left is its last backward pass
        if not math.isfinite(value):
            self._stop(f"the loss is {value} at step {self.state.global_step + 1}")

    def _stop(self, found: str) -> NoReturn:
        """End the run for numbers that are none, with advice."""
        advice = (
            "fp16 overflows easily: pass --dtype bf16 (or fp32), or lower --learning_rate"
            if self.args.fp16
            else "lower --learning_rate, or check the data and the base model"
        )
        raise RunStopped(f"{found}; {advice}. The last good checkpoint is kept, a new start continues from it")

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None, *args: Any, **kwargs: Any
    ) -> None:
        """Gradients that were no numbers end the run before what they made of the weights is measured or saved.

        DeepSpeed calls the norm of such gradients -1. In fp16 it leaves their step out.
        """
        due = (self.control.should_evaluate or self.control.should_save) and not self.args.fp16
        if due and grad_norm is not None and not 0 <= float(grad_norm) < math.inf:  # else nothing waits for a GPU here
            self._stop(f"the gradients are not finite at step {self.state.global_step}")
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _stop_if_weights_broken(self) -> None:
        """Raise RunStopped in every process when a trained weight is no number; in ZeRO 3 each looks at its part."""
        trained = (own_part(p) for p in self.model.parameters() if p.requires_grad)
        broken = not all(bool(torch.isfinite(part).all()) for part in trained)
        if all_sum([float(broken)], self.args.device)[0]:
            self._stop(f"the weights are not finite after step {self.state.global_step}")

    def mean_loss(self, dataset: TokenDataset) -> float:
        """Mean loss per learned token of a data set, over all processes."""
        return self.measure(dataset)[0]

    def measure(self, dataset: TokenDataset) -> tuple[float, float]:
        """Mean loss per learned token, and share of conversations that are written rightly to their end."""
        size, world, rank = self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
        order = np.argsort(-dataset.lengths, kind="stable")  # longest first: memory runs out early or never
        rounds = math.ceil(len(order) / (size * world))
        sums, count = torch.zeros(2, dtype=torch.float64, device=self.args.device), 0
        was_training = self.model_wrapped.training
        self.model_wrapped.eval()
        with torch.no_grad():
            for i in range(rounds):
                start = (i * world + rank) * size
                chosen = order[start : start + size]
                empty = len(chosen) == 0  # every process runs as many forward passes (ZeRO 3 gathers in step)
                batch = self.data_collator([dataset[int(j)] for j in (order[-1:] if empty else chosen)])
                batch = to_device(batch, self.args.device)
                logits = target_logits(self.model_wrapped, batch)
                if not empty:
                    losses = token_losses(logits, batch["labels"])
                    sums += torch.stack([losses.double().sum(), right_answers(logits, batch).double()])
                    count += len(losses)
        self.model_wrapped.train(was_training)
        loss, right, tokens = all_sum([*sums.tolist(), float(count)], self.args.device)
        return loss / tokens, right / len(order)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss on the held-out and on the retention conversations; logged and handed to the callbacks."""
        loss, accuracy = self.measure(self.eval_dataset)
        metrics = {"eval_loss": loss, "retention_loss": self.mean_loss(self.retention)}
        if self.with_accuracy:
            metrics[ACCURACY] = accuracy
        self.log(metrics)
        for name, value in metrics.items():
            if not math.isfinite(value):
                self._stop(f"{name} is {value} at step {self.state.global_step}")
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_and_compare(self) -> None:
        """Evaluate outside the Trainer's own rhythm and keep account of the best step."""
        metrics = self.evaluate()
        if self.state.global_step:
            self._determine_best_metric(metrics, trial=None)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The state of the random numbers that dropout draws; new ones of this step where other processes drew them."""
        if checkpoint is None or checkpointing.read_manifest(Path(checkpoint)).world_size == self.args.world_size:
            super()._load_rng_state(checkpoint)
            return
        place = [self.args.seed, self.state.global_step, self.args.process_index]
        set_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def _at_end(self) -> bool:
        """Whether no step is left: all are done, or the run stopped early and not because it was asked to end."""
        stopped = self.control.should_training_stop and not self.asked_to_end()
        return self.ended or self.state.global_step >= self.state.max_steps or stopped

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch as the Trainer runs it; none when the run goes on from its last checkpoint.

        The Trainer looks whether it has done all steps, or has stopped early, only after a step.
        """
        if self.ended or self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        try:
            super()._run_epoch(*args, **kwargs)
        finally:
            if self._ahead:
                self._ahead.close()
            self._ahead = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.output / checkpointing.STAGING) if self._staging else super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model; below ZeRO 3 on the first process alone, and without a copy of what is not written.

        The Trainer's own way copies the whole model on every process first, frozen weights included.
        """
        if is_deepspeed_zero3_enabled():
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            whole = self.args.device.type == "cuda" and isinstance(self.model, PreTrainedModel)
            # ZeRO's weights are views of one buffer, which save_pretrained would copy where they are: on the GPU
            self._save(output_dir, state_dict=host_copy(self.model.state_dict()) if whole else None)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # ZeRO 3 gathers on every process, one writes
            return
        self.opened.make_portable(Path(output_dir or self.output), self.opened.chat.stop_ids())

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save aside, then give the checkpoint its name; a kill or a full disk leaves the earlier ones whole."""
        self._stop_if_weights_broken()
        staging = self.output / checkpointing.STAGING
        if self.is_world_process_zero() and staging.exists():
            shutil.rmtree(staging)
        barrier()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        barrier()
        if self.is_world_process_zero():
            name = f"checkpoint-{self.state.global_step}"
            ownership.claim(self.output, [name])
            checkpointing.publish(staging / name, self.output / name, self.args.world_size, self._at_end())
            checkpointing.rotate(self.output, self.keep, self.state.best_global_step, states.problem)
        barrier()
