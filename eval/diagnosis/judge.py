"""Three risks judged from loss curves. Pure: curves and thresholds in, findings out. Read on in a file per risk."""

from collections.abc import Mapping
from dataclasses import dataclass

from eval.diagnosis.criteria import Finding, Thresholds
from eval.diagnosis.curves import Series
from eval.diagnosis.forgetting import judge_forgetting
from eval.diagnosis.overfitting import judge_overfitting
from eval.diagnosis.training_run import TrainingRun, series_of
from eval.diagnosis.underfitting import judge_underfitting


@dataclass(frozen=True)
class Diagnosis:
    """The findings by risk, the curves they were made from, and what the steps are counted in."""

    findings: Mapping[str, Finding]
    curves: Mapping[str, Series]
    axis: str


def judge(run: TrainingRun, thresholds: Thresholds) -> Diagnosis:
    """Judge a run as it stands."""
    axis = run.axis()
    curves = {name: series_of(run, name, axis) for name in ("loss", "eval_loss", "retention_loss", "lr")}
    overfitting = judge_overfitting(curves, run, thresholds)
    findings = (
        overfitting,
        judge_underfitting(curves, run, overfitting, thresholds),
        judge_forgetting(curves, run, thresholds),
    )
    return Diagnosis({finding.risk: finding for finding in findings}, curves, axis)
