"""When a run logs, evaluates, saves and ends: by its steps, by a signal, by evaluations that get no better."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmops.console import EXIT_TERMINATED, Terminated, log
from llmops.machine.processes import to_heed
from train.trainer import all_sum


class Schedule(TrainerCallback):
    """When to log, evaluate, save and stop; replaces the Trainer's DefaultFlowCallback.

    Evaluation before the first step; evaluation and a checkpoint at every `epochs`-th epoch, at the last step and
    every N steps; a checkpoint when asked to end.
    """

    def __init__(self, eval_steps: int, epochs: int, evaluate: Callable[[], Any], stop_file: Path) -> None:
        self.eval_steps = eval_steps
        self.epochs = epochs
        self.stop_file = stop_file
        self.evaluate = evaluate
        self.signal = 0  # what this process received
        self.agreed = False  # one of the processes was asked to end, and all know it
        self.evaluated = -1
        self.handlers: dict[int, Any] = {}

    def catch_signals(self) -> None:
        """SIGTERM, SIGINT and SIGHUP end the run in good order."""
        for number in to_heed():
            self.handlers[number] = signal.signal(number, self._on_signal)

    def leave_signals(self) -> None:
        """They do again what they did before: no step is left after which a checkpoint would be saved."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if not self.signal:
            log(f"process {os.getpid()}: {signal.Signals(number).name} received; saving a checkpoint after this step")
        self.signal = number

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The losses before the first step; after a resume the evaluation that the end by signal left out."""
        due = (state.epoch or 0) % self.epochs == 0 or (self.eval_steps and state.global_step % self.eval_steps == 0)
        due = due or state.global_step >= state.max_steps
        done = any(line["step"] == state.global_step and "eval_loss" in line for line in state.log_history)
        if due and not done:
            self.evaluate()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Every N steps; and all processes agree whether one of them was asked to end."""
        control.should_log = state.global_step % args.logging_steps == 0
        control.should_training_stop = control.should_training_stop or state.global_step >= state.max_steps
        if self.eval_steps and state.global_step % self.eval_steps == 0:
            self._evaluate_and_save(state, control)
        if state.is_world_process_zero and self.stop_file.exists():
            self._on_signal(signal.SIGTERM, None)
        if self._agree(args.device):
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unless this very step was just evaluated or the run is ending by a signal, be it one since the step's end."""
        due = round(state.epoch or 0) % self.epochs == 0 or state.global_step >= state.max_steps
        if self.agreed:
            return
        if self._agree(args.device):
            control.should_save = self.evaluated != state.global_step
            control.should_training_stop = True
        elif due:
            self._evaluate_and_save(state, control)

    def _agree(self, device: torch.device) -> bool:
        """Whether one of the processes was asked to end. All must call it, and none acts on its own signal."""
        if all_sum([float(self.signal)], device)[0]:
            self.signal = self.signal or signal.SIGTERM
            self.agreed = True
        return self.agreed

    def _evaluate_and_save(self, state: TrainerState, control: TrainerControl) -> None:
        if self.evaluated != state.global_step:
            self.evaluated = state.global_step
            control.should_evaluate = control.should_save = True

    def end_if_signalled(self, device: torch.device) -> None:
        """Raise Terminated with 128 + signal in every process when the run was asked to end."""
        if self._agree(device):
            code = EXIT_TERMINATED if self.signal == signal.SIGTERM else 128 + self.signal
            raise Terminated(code)


class EarlyStopping(EarlyStoppingCallback):
    """Ends a run after as many evaluations without a better one, whichever starts they were made in.

    Must be told of the beginning before Schedule, which may evaluate then.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the evaluations of the earlier starts; the Trainer begins at 0 again."""
        name, past = args.metric_for_best_model, TrainerState()
        for line in state.log_history:
            if name in line:
                self.check_metric_value(args, past, control, line[name])
                best = past.best_metric
                if line["step"] and (best is None or self.early_stopping_patience_counter == 0):
                    past.best_metric = line[name]
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
