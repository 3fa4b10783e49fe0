"""From answers to what is said of a dimension: score, floor and ceiling, counts, and what a reader must know."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.dimensions.base import Dimension, Scores
from eval.prompts import Prepared
from eval.samples import Answer, Loaded, Sample, spread, summarise
from eval.thoughts import thought_note

ONE_CHOICE = 0.95  # a model that takes one choice so often has not read the questions
FEW = 200  # samples under which the interval is said with the score


@dataclass(frozen=True)
class Data:
    """A dimension with its samples, where they are from, and whether they are those that ship with the toolkit."""

    dimension: Dimension
    loaded: Loaded
    path: Path
    shipped: bool


@dataclass(frozen=True)
class Outcome:
    """What is known of one dimension after it was asked."""

    score: float
    report: dict[str, Any]
    notes: list[str]


def score_answers(dimension: Dimension, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Scores]:
    """The scores of every answer; for choices also `acc_norm`, of the choice that is the likeliest per token."""
    found = []
    for sample, answer in zip(samples, answers, strict=True):
        scores = dimension.score(answer.text, sample)
        if sample.choices:
            other = dimension.score(answer.normalised_choice(sample.choices), sample)
            scores["acc_norm"] = other[dimension.metric]
        found.append(scores)
    return found


def judge(data: Data, prepared: Prepared, answers: Sequence[Answer], scores: Sequence[Scores], seed: int) -> Outcome:
    """Score, report and notes of a dimension."""
    dimension, samples = data.dimension, prepared.samples
    figures = summarise(scores, seed)
    score = figures[dimension.metric]["mean"]
    baselines = dimension.baselines(samples, seed)
    floor = max(baselines.items(), key=lambda pair: pair[1])
    ceiling = ceiling_of(dimension, samples, answers)
    report: dict[str, Any] = {
        "dataset": dimension.dataset, "path": str(data.path), "shipped_sample": data.shipped,
        "metric": dimension.metric, "score": round(score, 4), "metrics": figures,
        "baselines": {name: round(value, 4) for name, value in baselines.items()},
        "floor": {"what": floor[0], "score": round(floor[1], 4)},
        "ceiling": {"what": ceiling[0], "score": round(ceiling[1], 4)},
        "share_of_the_way": share(score, floor[1], ceiling[1]),
        "max_seq_len": prepared.length, "counts": counts_of(data, prepared, answers),
    }  # fmt: skip
    if samples[0].choices:
        report["spread"] = spread(samples, answers)
    if dimension.by_group:
        report["by_group"] = group_means(samples, [row[dimension.metric] for row in scores])
    notes = [
        *source_notes(data, len(samples)),
        *sample_notes(report, data.loaded.total),
        *prompt_notes(report, prepared, score),
        *answer_notes(report),
        *choice_notes(report, answers),
        *floor_notes(report, score),
    ]
    report["notes"] = notes
    return Outcome(round(score, 4), report, notes)


def ceiling_of(dimension: Dimension, samples: Sequence[Sample], answers: Sequence[Answer]) -> tuple[str, float]:
    """(what it is, the best mean score that can be expected): nothing where the cut took the answer away."""
    what, best = dimension.ceiling(samples)
    known = [0.0 if answer.lost else value for value, answer in zip(best, answers, strict=True) if value is not None]
    return (what, sum(known) / len(known)) if known else ("not known: one reference each", 1.0)


def share(score: float, floor: float, ceiling: float) -> float | None:
    """How far a score is on the way from floor to ceiling; None where there is no way."""
    return round((score - floor) / (ceiling - floor), 4) if ceiling > floor else None


def counts_of(data: Data, prepared: Prepared, answers: Sequence[Answer]) -> dict[str, int]:
    """How many samples there were and what happened to them."""
    unread = map(data.dimension.unread, prepared.samples, answers)
    return {
        "data": data.loaded.total, "samples": len(answers), "left_out": len(prepared.left_out),
        "prompts_cut": sum(answer.cut for answer in answers), "answers_cut_off": sum(a.lost for a in answers),
        "answers_not_read": sum(unread), "answers_at_the_limit": sum(not answer.ended for answer in answers),
        "answers_in_thought": sum(answer.in_thought for answer in answers),
    }  # fmt: skip


def source_notes(data: Data, count: int) -> list[str]:
    """Where the samples are from."""
    dimension = data.dimension
    shipped = (
        f"scored on {count} samples that ship with the toolkit, which is no {dimension.dataset} score; for "
        f"one, put {dimension.get} into mnt/datasets/eval or data_dir"
    )
    return ([shipped] if data.shipped else []) + data.loaded.notes


def sample_notes(report: dict[str, Any], total: int) -> list[str]:
    """How far a score of few samples can be trusted."""
    figure = report["metrics"][report["metric"]]
    drawn = report["counts"]["samples"] + report["counts"]["left_out"]
    if drawn >= total and figure["samples"] >= FEW:
        return []
    low, high = figure["interval_95"]
    interval = f"{report['metric']} {figure['mean']:.3f}, 95% interval {low:.3f} to {high:.3f}"
    if drawn < total:
        return [f"{figure['samples']} samples drawn from {total} (limit {drawn}): {interval}"]
    return [f"{figure['samples']} samples: {interval}"]


def prompt_notes(report: dict[str, Any], prepared: Prepared, score: float) -> list[str]:
    """What did not fit."""
    counts, notes = report["counts"], []
    asked, left_out = counts["samples"], counts["left_out"]
    if left_out:
        everything = asked + left_out
        cure = prepared.too_short(prepared.needed) or f"with max_seq_len {prepared.needed} none is"
        notes.append(
            f"{left_out} of {everything} prompts do not fit into {prepared.length} tokens even without their passage "
            f"and are left out of the score ({cure}; counted as wrong they would make it "
            f"{score * asked / everything:.3f})"
        )
    if counts["prompts_cut"]:
        cut = [f"{counts['prompts_cut']} of {asked} prompts were longer than max_seq_len allows and were cut"]
        if counts["answers_cut_off"]:
            cut.append(f"{counts['answers_cut_off']} of them lost their answer by it")
        notes.append("; ".join(cut))
    return notes


def answer_notes(report: dict[str, Any]) -> list[str]:
    """Answers that say nothing or were not finished."""
    counts, notes = report["counts"], []
    asked = counts["samples"]
    if counts["answers_not_read"]:
        notes.append(
            f"{counts['answers_not_read']} of {asked} answers could not be read (nothing in them) and count as wrong"
        )
    if counts["answers_in_thought"]:
        notes.append(thought_note(counts["answers_in_thought"], asked))
    if counts["answers_at_the_limit"]:
        notes.append(
            f"{counts['answers_at_the_limit']} of {asked} answers ran into the limit of tokens and are scored as far "
            "as they go"
        )
    return notes


def choice_notes(report: dict[str, Any], answers: Sequence[Answer]) -> list[str]:
    """A model that does not look at the question, and choices that cannot be compared by their sums."""
    if "spread" not in report:
        return []
    notes, asked = [], len(answers)
    letter, count = max(report["spread"]["predictions"].items(), key=lambda pair: pair[1])
    right = report["spread"]["references"].get(letter, 0)
    if asked >= 10 and count >= ONE_CHOICE * asked and right < count:
        notes.append(f"the model answered {letter!r} in {count} of {asked} cases, whatever was asked")
    lengths = Counter(answer.choice_tokens for answer in answers if len(set(answer.choice_tokens)) > 1)
    figures = report["metrics"]
    if lengths and figures["acc_norm"]["mean"] != figures[report["metric"]]["mean"]:
        shown = " and ".join(map(str, lengths.most_common(1)[0][0]))
        notes.append(
            f"the choices have {shown} tokens, and sums of logarithms favour the shorter ones: by the likeliest per "
            f"token (acc_norm) the score would be {figures['acc_norm']['mean']:.3f}"
        )
    return notes


def floor_notes(report: dict[str, Any], score: float) -> list[str]:
    """A score that something without a model reaches, too."""
    metric, floor, ceiling = report["metric"], report["floor"], report["ceiling"]
    low = report["metrics"][metric]["interval_95"][0]
    base = f"{floor['what']!r} ({floor['score']:.3f})"
    best = f"the ceiling, {ceiling['what']}, is {ceiling['score']:.3f}"
    if score <= floor["score"]:
        return ["; ".join([f"{metric} {score:.3f} is not above the baseline {base}", best])]
    if low <= floor["score"]:
        less = f"{metric} {score:.3f} is above the baseline by less than the interval is wide: {base}"
        return ["; ".join([less, best])]
    return []


def group_means(samples: Sequence[Sample], values: Sequence[float]) -> dict[str, dict[str, float]]:
    """Mean and count by group."""
    grouped: dict[str, list[float]] = {}
    for sample, value in zip(samples, values, strict=True):
        grouped.setdefault(sample.group, []).append(value)
    return {
        group: {"score": round(sum(found) / len(found), 4), "samples": len(found)} for group, found in grouped.items()
    }
