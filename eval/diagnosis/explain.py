"""What was seen in a log, for people."""

import sys
import unicodedata
from collections.abc import Mapping

from eval.diagnosis.criteria import LOW, Finding, Thresholds
from eval.diagnosis.judge import Diagnosis
from eval.diagnosis.training_run import LOSSES, TrainingRun
from llmops.translation import spoken

PASSED = {
    "best": "lines that tell a record again", "doubt": "lines whose loss may be an evaluation's",
    "other": "losses of further evaluation data", "summary": "means over steps that were told",
}  # fmt: skip
AGAINST_FORGETTING = (
    "against it: a lower --learning_rate, or chat_main.sh's --replay_ratio 0.25, which puts general conversations "
    "(ours, or --replay_file) into every optimizer step"
)
# by risk: measured number, its words, the thresholds it is held against
ROWS = {
    "overfitting": (
        ("generalisation_loss", "generalisation loss (GL), percent", ("gl_medium", "gl_high")),
        ("lasting_gl", "the same, lowest of the last `patience` evaluations", ("gl_medium", "gl_high")),
        ("slight_gl", "the same, of twice as many", ("gl_slight",)),
        ("rise_of_eval_loss", "lasting rise in units of the loss", ()),
        ("loss_at_start", "evaluation loss at the start of the run", ("floor",)),
        ("evaluations_since_better", "evaluations without a better one", ("patience",)),
        ("typical_gl", "median of the evaluations since the best over it, percent", ()),
        ("recovered_gl", "largest rise that it came back from before, percent", ()),
        ("recovered_after", "  after so many evaluations", ()),
        ("best_eval_loss", "best evaluation loss", ()),
        ("best_at", "  at {axis}", ()),
        ("last_eval_loss", "last evaluation loss", ()),
        ("training_loss_at_best", "training loss at that place", ()),
        ("training_loss", "training loss at the end", ()),
        ("gap_at_best", "evaluation loss - training loss at the best", ()),
        ("gap", "evaluation loss - training loss at the end", ()),
        ("gap_share", "share of the rise that widened this gap", ("gap",)),
        ("progress_quotient", "GL / training progress (PQ)", ("pq",)),
    ),
    "underfitting": (
        ("start", "loss at the start", ()),
        ("middle", "loss when half of the learning was spent", ()),
        ("end", "loss at the end", ("high_loss",)),
        ("gain", "share of the loss taken away", ("gain_high", "gain_medium", "gain_enough")),
        ("late_share", "share of the fall in the second half", ("late_medium", "late_high")),
        ("recent_fall", "share of the evaluation loss lost in the last quarter", ("recent", "floor")),
        ("values_not_finite", "values that are NaN or inf", ()),
    ),
    "catastrophic_forgetting": (
        ("first_retention_loss", "first retention loss", ()),
        ("last_retention_loss", "last retention loss", ()),
        ("rise", "last - first, nats per token", ("retention_medium", "retention_high")),
        ("factor", "last / first", ("retention_factor",)),
        ("lasting_rise", "largest sudden lasting rise of the loss, factor", ("spike",)),
    ),
}


def explain(diagnosis: Diagnosis, run: TrainingRun, thresholds: Thresholds) -> str:
    """Several lines: what was read, then per risk the level, its reason and the numbers against the thresholds."""
    lines = [read_summary(diagnosis, run)]
    for risk, finding in diagnosis.findings.items():
        reason = spoken(finding.reason, sys.stderr.encoding)
        lines += ["", f"{risk}: {finding.level} ({reason})", *rows(risk, finding, diagnosis.axis, thresholds)]
        if risk == "catastrophic_forgetting" and finding.level != LOW:
            lines.append(f"  {AGAINST_FORGETTING}")
    return "\n".join(lines)


def read_summary(diagnosis: Diagnosis, run: TrainingRun) -> str:
    """What was read, in one line."""
    points = {name: sum(diagnosis.curves[name].counts) for name in LOSSES}
    words = {"loss": "training", "eval_loss": "evaluation", "retention_loss": "retention"}
    text = ", ".join(f"{points[name]:,} {words[name]} losses" for name in LOSSES)
    counted: Mapping[str, int] = {
        "not finite": sum(run.nonfinite.values()), "repeated and counted once": run.repeated, "restarts": run.restarts,
    } | {words: run.passed[kind] for kind, words in PASSED.items()}  # fmt: skip
    text += "".join(f", {count:,} {what}" for what, count in counted.items() if count)
    return f"read {text}; along the {diagnosis.axis}"


def rows(risk: str, finding: Finding, axis: str, thresholds: Thresholds) -> list[str]:
    """The measured numbers that a finding has, a line each."""
    lines = []
    for name, words, limits in ROWS[risk]:
        if name in finding.numbers:
            against = ", ".join(f"{limit} {getattr(thresholds, limit):g}" for limit in limits)
            label = spoken(words.format(axis=axis), sys.stderr.encoding)
            shown = f"  {padded(label, 54)}{finding.numbers[name]:>12.5g}"
            lines.append(shown + (f"   ({against})" if against else ""))
    return lines


def padded(text: str, width: int) -> str:
    """Text with blanks after it, `width` columns of a terminal together: a Chinese character takes two."""
    columns = sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
    return text + " " * (width - columns)
