"""What the risks are judged by: levels, thresholds, findings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HIGH, MEDIUM, LOW = "High", "Medium", "Low"
RISKS = ("overfitting", "underfitting", "catastrophic_forgetting")


def limit(default: float, help: str) -> Any:
    """A threshold with its help text."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Thresholds:
    """Every threshold; `help` says what it is. The flags of eval/diagnosis_monitoring.py have these names."""

    gl_high: float = limit(10.0, "overfitting High from this generalisation loss on, percent")
    gl_medium: float = limit(3.0, "overfitting Medium from this generalisation loss on, percent")
    gl_slight: float = limit(1.0, "overfitting Medium from this on, percent, when it lasted for twice the patience")
    floor: float = limit(0.005, "a late rise or fall under this share of the loss at the start is nothing")
    patience: int = limit(2, "evaluations without a better one for a rise to count as lasting")
    min_delta: float = limit(0.005, "an evaluation is better when it is lower by this share of the best one")
    pq: float = limit(2.0, "a rise to gl_high that is not lasting yet is Medium when GL / progress reaches this")
    gap: float = limit(0.5, "a rise counts when this share of it is a wider gap to the training loss")
    gain_high: float = limit(0.05, "underfitting High when training took away less than this share of the loss")
    gain_medium: float = limit(0.10, "underfitting Medium below this share")
    gain_enough: float = limit(0.6, "from this share on only the last quarter of the run tells, see recent")
    recent: float = limit(0.05, "underfitting Medium when the evaluation loss fell by this share in the last quarter")
    late_high: float = limit(
        0.35, "underfitting High when this share of the fall came in the second half of the learning"
    )
    late_medium: float = limit(0.25, "underfitting Medium from this share on")
    high_loss: float = limit(4.0, "underfitting Medium when every loss ended over this, nats per token (perplexity 55)")
    retention_high: float = limit(0.4, "forgetting High when retention_loss rose by this over its first value, nats")
    retention_medium: float = limit(0.2, "forgetting Medium from this rise on")
    retention_factor: float = limit(1.1, "a rise to less than the first value times this is never forgetting")
    spike: float = limit(1.5, "without retention_loss: a sudden lasting rise of the loss by this factor is Medium")
    min_evaluations: int = limit(3, "evaluations needed to judge overfitting")
    min_points: int = limit(4, "training losses needed to judge underfitting")


@dataclass(frozen=True)
class Finding:
    """A risk's level, what led to it in words, the measured numbers, and what evidence was missing ("" for none).

    `diverged`: the training made nothing better, so that more of it is no cure.
    """

    risk: str
    level: str
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    missing: str = ""
    diverged: bool = False
