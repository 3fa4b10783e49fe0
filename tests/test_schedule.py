"""When a run ends: all processes by the same signal, and early by the evaluations of all its starts."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from llmops.console import Terminated
from train import schedule as schedule_module
from train.schedule import EarlyStopping, Schedule

CPU = torch.device("cpu")


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    """Of a run on this machine, judged by its loss."""
    return TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, eval_strategy="steps", metric_for_best_model="eval_loss",
        greater_is_better=False,
    )  # fmt: skip


def schedule_of(tmp_path: Path) -> Schedule:
    """It evaluates at every epoch."""
    return Schedule(0, 1, lambda: None, tmp_path / "STOP")


def last_step() -> TrainerState:
    """At the end of the last epoch."""
    return TrainerState(global_step=6, max_steps=6, epoch=2.0)


def test_a_signal_after_the_last_step_leaves_a_checkpoint(arguments: TrainingArguments, tmp_path: Path) -> None:
    schedule, control = schedule_of(tmp_path), TrainerControl()
    before = signal.getsignal(signal.SIGTERM)
    schedule.catch_signals()
    try:
        schedule.on_step_end(arguments, last_step(), control)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not control.should_save
        schedule.on_epoch_end(arguments, last_step(), control)
    finally:
        schedule.leave_signals()
    assert (control.should_save, control.should_evaluate, control.should_training_stop) == (True, False, True)
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(Terminated) as ended:
        schedule.end_if_signalled(CPU)
    assert ended.value.code == 143


@pytest.mark.parametrize("moment", ["step", "epoch", "end"])
def test_no_process_acts_on_its_own_signal(
    arguments: TrainingArguments, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes one gets the signal between two agreements; both do the same, whatever each knows."""
    schedules, controls = [schedule_of(tmp_path) for _ in range(2)], [TrainerControl() for _ in range(2)]
    monkeypatch.setattr(
        schedule_module, "all_sum", lambda values, device: [float(sum(one.signal for one in schedules) or values[0])]
    )

    def both(does: Callable[[Schedule, TrainerControl], None]) -> None:
        known = [one.signal for one in schedules]
        for i in (0, 1):
            schedules[i].signal = known[i]
            does(schedules[i], controls[i])
        assert vars(controls[0]) == vars(controls[1])

    for name, does in {
        "step": lambda one, control: one.on_step_end(arguments, last_step(), control),
        "epoch": lambda one, control: one.on_epoch_end(arguments, last_step(), control),
    }.items():
        if name == moment:
            schedules[1].signal = signal.SIGTERM
        both(does)
    if moment == "end":
        schedules[1].signal = signal.SIGTERM
        assert controls[0].should_evaluate
    for one in schedules:
        with pytest.raises(Terminated):
            one.end_if_signalled(CPU)


def test_evaluations_of_earlier_starts_count(arguments: TrainingArguments) -> None:
    """As many without a better one as in a run that nobody disturbs; the one before the first step is none."""
    losses = [5.0, 4.0, 6.0, 3.0, 3.5, 3.4]
    for count, expected in enumerate([0, 0, 0, 1, 0, 1, 2]):
        history = [{"step": i, "eval_loss": loss, "retention_loss": 9.0} for i, loss in enumerate(losses[:count])]
        history.insert(1, {"step": 1, "loss": 1.0})
        stopping, control = EarlyStopping(2), TrainerControl()
        stopping.on_train_begin(arguments, TrainerState(log_history=history), control)
        assert stopping.early_stopping_patience_counter == expected
        assert control.should_training_stop == (expected == 2)
