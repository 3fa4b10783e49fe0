"""The course of a training where nobody says: how many epochs, how high the learning rate, when to evaluate.

Three passes over a dozen conversations are three optimizer steps, which teach nothing. docs/training.md, "Small data",
has the measurements behind the numbers. Standard library only.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.config import Config

EPOCHS = 3  # where they are steps enough
ENOUGH_STEPS = 40  # optimizer steps in which small data is learned
HIGHEST_RATES = {"lora": 5e-4, "all": 5e-5}  # of small data, which gets a higher rate as it gets more epochs
EVALUATIONS = 6  # of more epochs than usual: one costs as much as many steps of small data
FEW_STEPS = 20
FEWEST_JUDGES = 5  # conversations held out of the training data
NUMBER, BETWEEN, RATE = "num_train_epochs", "epochs_between_evaluations", "learning_rate"  # as they are written down


@dataclass(frozen=True)
class Course:
    """`epochs` of `steps` optimizer steps each, an evaluation after each `between`-th; `rate`: peak learning rate."""

    epochs: float
    steps: int
    rate: float
    between: int = 1

    @property
    def all_steps(self) -> int:
        """Optimizer steps of the run."""
        return math.ceil(self.epochs * self.steps)

    @property
    def evaluations(self) -> int:
        """Evaluations after the first step."""
        return math.ceil(self.epochs / self.between)

    def to_json(self) -> dict[str, Any]:
        """As it is written down."""
        return {NUMBER: self.epochs, BETWEEN: self.between, RATE: self.rate}


USUAL = Course(EPOCHS, steps=1, rate=1e-4)


def choose(config: Config, steps: int, record: Mapping[str, Any]) -> Course:
    """What was asked for, else what an earlier start chose, else EPOCHS, and for small data enough for ENOUGH_STEPS.

    `steps`: those of an epoch. `record`: what an earlier start wrote down.
    """
    if config.num_train_epochs or config.max_steps > 0:
        return Course(config.num_train_epochs or EPOCHS, steps, config.peak_learning_rate)
    if record.get(NUMBER):
        return Course(record[NUMBER], steps, record.get(RATE) or config.peak_learning_rate, record.get(BETWEEN, 1))
    epochs = max(EPOCHS, math.ceil(ENOUGH_STEPS / steps))
    rate = config.peak_learning_rate
    if not config.learning_rate:
        rate = min(rate * epochs / EPOCHS, HIGHEST_RATES[config.train_type])
    return Course(epochs, steps, rate, math.ceil(epochs / EVALUATIONS) if epochs > EPOCHS else 1)


def course_words(config: Config, course: Course) -> str:
    """What to say of a course that is not the usual one, or of too few steps to change a model; empty for others."""
    if config.max_steps > 0:
        return ""
    if not config.num_train_epochs:
        if course.epochs <= EPOCHS:
            return ""
        return (
            f"small data: an epoch has {course.steps} step{'s' if course.steps > 1 else ''}, so there are "
            f"{course.epochs:g} (--num_train_epochs) with a peak learning rate of {course.rate:.2g} (--learning_rate), "
            f"evaluated every {course.between}"
        )
    if course.all_steps >= FEW_STEPS:
        return ""
    enough = math.ceil(ENOUGH_STEPS / course.steps) * course.steps
    return (
        f"warning: {course.all_steps} optimizer step{'s' if course.all_steps > 1 else ''} will hardly change what the "
        f"model answers; without --num_train_epochs there are {enough} (docs/training.md, Small data)"
    )


def judges(config: Config, held_out: int) -> bool:
    """Whether the test loss may choose the weights that are kept.

    A handful of the training conversations, held out, asks other things than are learned: its loss is lowest long
    before these are known.
    """
    return bool(config.test_files) or held_out >= FEWEST_JUDGES
