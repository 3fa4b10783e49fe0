"""The picture of a diagnosis: the curves above, the findings marked in them, their reasons below."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from eval.diagnosis.criteria import HIGH, LOW, MEDIUM
from eval.diagnosis.judge import Diagnosis
from eval.diagnosis.training_run import TrainingRun
from llmops import pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {HIGH: "#c0392b", MEDIUM: "#c77c11", LOW: "#2e7d5b"}
STYLES = {
    "loss": ("train", "#8fb3d9", 1.1),
    "eval_loss": ("evaluation", "#d1495b", 2.0),
    "retention_loss": ("retention", "#2e7d5b", 2.0),
}


def draw(diagnosis: Diagnosis, run: TrainingRun, path: Path) -> None:
    """Write the picture as a PNG."""
    pictures.prepare_labels([])
    import matplotlib.pyplot as plt

    figure, (axes, words) = plt.subplots(
        2, 1, figsize=(9, 6.6), dpi=120, layout="constrained", height_ratios=(4.2, 1.5)
    )
    for name, (label, color, width) in STYLES.items():
        curve = diagnosis.curves[name]
        if len(curve):
            marker = "o" if len(curve) <= 60 else ""
            axes.plot(curve.x, curve.y, color=color, linewidth=width, marker=marker, markersize=3.5,
                      label=f"{label} loss (last {curve.last:.4g})")  # fmt: skip
    mark_overfitting(axes, diagnosis)
    mark_forgetting(axes, diagnosis)
    if run.first_nonfinite and diagnosis.axis == "step" and run.first_nonfinite.step is not None:
        axes.axvline(run.first_nonfinite.step, color="black", linewidth=1, linestyle="--", label="NaN or inf from here")
    axes.set(xlabel={"order": "reading", "step": "step", "epoch": "epoch"}[diagnosis.axis], ylabel="loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    words.axis("off")
    height = 1.0
    for risk, finding in diagnosis.findings.items():
        words.text(0.0, height, f"{risk.replace('_', ' ')}: {finding.level}", color=COLORS[finding.level],
                   va="top", fontsize=10, weight="bold", transform=words.transAxes)  # fmt: skip
        reason = textwrap.fill(finding.missing if finding.level == LOW and finding.missing else finding.reason, 82)
        words.text(0.34, height, reason, va="top", fontsize=9, transform=words.transAxes)
        height -= 0.36
    pictures.save(figure, path)


def mark_overfitting(axes: "Axes", diagnosis: Diagnosis) -> None:
    """The best evaluation, and from there on the rise, when overfitting is a risk."""
    evaluation, finding = diagnosis.curves["eval_loss"], diagnosis.findings["overfitting"]
    if not len(evaluation):
        return
    axes.axvline(evaluation.best_x, color="#d1495b", linewidth=1, linestyle=":")
    axes.plot([evaluation.best_x], [evaluation.best], marker="*", markersize=12, color="#d1495b", linestyle="",
              label=f"best evaluation loss {evaluation.best:.4g} at {evaluation.best_x:g}")  # fmt: skip
    if finding.level != LOW:
        axes.axvspan(evaluation.best_x, evaluation.last_x, color=COLORS[finding.level], alpha=0.08)


def mark_forgetting(axes: "Axes", diagnosis: Diagnosis) -> None:
    """The first retention loss as a level to compare with; a sudden rise where it is only hinted at."""
    finding = diagnosis.findings["catastrophic_forgetting"]
    if "first_retention_loss" in finding.numbers:
        axes.axhline(finding.numbers["first_retention_loss"], color="#2e7d5b", linewidth=1, linestyle=":",
                     label="first retention loss")  # fmt: skip
    elif finding.level != LOW and "at" in finding.numbers:
        axes.axvline(finding.numbers["at"], color=COLORS[finding.level], linewidth=1, linestyle="--",
                     label="sudden lasting rise")  # fmt: skip
