"""Values as the pages show them: one place for templates and for what the scripts fetch."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmops.console import duration
from serve.console.languages import Translate
from serve.console.runs import LOSSES, RUNNING, Run

NONE = "–"
UNITS = ((86400, "{n} d ago"), (3600, "{n} h ago"), (60, "{n} min ago"), (1, "{n} s ago"))


def loss(value: float | None) -> str:
    """A loss with four figures."""
    return NONE if value is None else f"{value:.4g}"


def ago(moment: float, t: Translate, now: float | None = None) -> str:
    """How long ago a moment was."""
    if not moment:
        return NONE
    seconds = max(0.0, (time.time() if now is None else now) - moment)
    for size, words in UNITS:
        if seconds >= size:
            return t(words, n=int(seconds // size))
    return t("just now")


def amount(value: Any) -> str:
    """A number for people, grouped by thousands; other values as they are."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: NONE}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {amount(of)}" for key, of in value.items())
    return ", ".join(map(amount, value)) if isinstance(value, list) else str(value)


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return NONE if share is None else f"{100 * share:.1f}%"


def three(value: float | None) -> str:
    """A score from 0 to 1."""
    return NONE if value is None else f"{value:.3f}"


def words(name: str) -> str:
    """A name of the files as words, where it has no text of its own; "kind: " before a word is left out."""
    return name.removeprefix("samples: ").replace("_", " ")


def cells(run: Run, t: Translate) -> dict[str, str]:
    """The texts of a run in the list and at the head of its page; the scripts put them into elements as they are."""
    found = {
        "state": t(run.state),
        "step": f"{run.step:,} / {run.steps:,}" if run.steps else f"{run.step:,}",
        "share": percent(run.share),
        "remaining": NONE if run.remaining is None else duration(run.remaining),
        "changed": ago(run.changed, t),
        "speed": NONE if run.speed is None else f"{run.speed:,.0f}",
        "epoch": NONE if run.epoch is None else f"{run.epoch:.2f}",
    }
    for name in LOSSES:
        found[name] = loss(run.losses.get(name))
        found[f"{name}_before"] = loss(run.before.get(name))
    return found


def checkpoints(found: Sequence[Mapping[str, Any]], t: Translate) -> list[dict[str, Any]]:
    """The checkpoints of a run, the newest first."""
    return [
        {"name": f"checkpoint-{one['step']}", "step": f"{one['step']:,}", "changed": ago(one["changed"], t),
         "best": one["best"]}
        for one in reversed(found)
    ]  # fmt: skip


def run_json(run: Run, t: Translate) -> dict[str, Any]:
    """What a script fetches of a run."""
    return {
        "name": run.name, "state": run.state, "share": run.share or 0.0, "live": run.state in RUNNING,
        "cells": cells(run, t),
    }  # fmt: skip
