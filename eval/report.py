"""eval_results.json and the radar chart of the five dimensions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from eval import answers
from eval.answers import FIVE, RESULTS_NAME
from eval.engine import Engine
from llmops import files, pictures
from llmops.console import UserError, log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.projections.polar import PolarAxes

FLOOR, CEILING = "floor: reached without a model", "ceiling: best to be expected"
COLORS = ("#2a6fbb", "#d9762b", "#2e7d5b", "#8f4aa8", "#b8413c", "#6b6b6b")


def write_results(engine: Engine, command: str, seconds: float, more: Mapping[str, Any]) -> None:
    """Write eval_results.json into output_path: how it was run, then the figures."""
    settings = engine.settings
    packages = {name: version(name) for name in ("torch", "transformers", "nltk", "rouge-score")}
    head = {
        "command": command,
        "model": settings.model,
        "settings": asdict(settings) | {"dtype": str(engine.dtype).removeprefix("torch.")},
        "chat_format": engine.renderer.chat.name if engine.renderer.chat else "plain text",
        "device": str(engine.generator.device),
        "processes": engine.processes.count,
        "batch_size_used": engine.generator.batch_size,
        "prefix_reuse": engine.generator.plain_because or "on",
        "seconds": round(seconds, 2),
        "versions": packages,
    }
    log(f"results in {answers.write_results(Path(settings.output_path), command, head | dict(more))}")


def read_scores(path: Path) -> tuple[str, dict[str, float]]:
    """(name of the model, score by dimension) of an eval_results.json or the folder that holds it."""
    path = answers.results_of(path, FIVE) if files.is_folder(path) else path
    found = files.read_object(path, f"the {RESULTS_NAME} of compare_with", "copy it again")
    scores, model = found.get("evaluation_results"), found.get("model")
    if not (isinstance(scores, dict) and scores and isinstance(model, str)) or not all(
        type(score) in (int, float) and 0 <= score <= 1 for score in scores.values()
    ):
        raise UserError(
            f"compare_with: {path} is no {RESULTS_NAME} of the five dimensions; expected the name of the model and "
            "evaluation_results with scores from 0 to 1"
        )
    return Path(model).name, {name: float(score) for name, score in scores.items()}


Bounds = Mapping[str, tuple[float, float]]


def draw_radar(
    models: Sequence[tuple[str, Mapping[str, float]]], dimensions: Sequence[str], path: Path, bounds: Bounds
) -> None:
    """One polygon per model over the dimensions, from 0 in the middle to 1; with one or two dimensions, bars.

    The scores stand beside the dimensions, in the order of the legend, with [floor, ceiling] below. A dimension that a
    model was not asked has no point in its polygon. `bounds` are floor and ceiling by dimension: the grey area needs no
    model, and the dashed line is the best that can be expected.
    """
    names = pictures.prepare_labels([name for name, _ in models])
    import matplotlib.pyplot as plt

    labels = [
        dimension.replace("_", "\n")
        + "\n"
        + " / ".join(f"{scores[dimension]:.2f}" if dimension in scores else "-" for _, scores in models)
        + "\n[{:.2f}, {:.2f}]".format(*bounds[dimension])
        for dimension in dimensions
    ]
    if len(dimensions) < 3:
        figure, axes = plt.subplots(figsize=(6, 4.5), dpi=120, layout="constrained")
        draw_bars(axes, names, models, dimensions, labels, bounds)
        pictures.save(figure, path)
        return
    figure, drawn = plt.subplots(figsize=(7.5, 6), dpi=120, layout="constrained", subplot_kw={"projection": "polar"})
    axes = cast("PolarAxes", drawn)
    angles = [2 * math.pi * i / len(dimensions) for i in range(len(dimensions))]
    draw_bounds(axes, angles, [bounds[dimension] for dimension in dimensions])
    for k, (name, (_, scores)) in enumerate(zip(names, models, strict=True)):
        known = [(angle, scores[d]) for angle, d in zip(angles, dimensions, strict=True) if d in scores]
        closed = [*known, known[0]] if known else []
        color = COLORS[k % len(COLORS)]
        axes.plot([a for a, _ in closed], [s for _, s in closed], color=color, marker="o", markersize=4, label=name)
        axes.fill([a for a, _ in closed], [s for _, s in closed], color=color, alpha=0.12)
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_xticks(angles, [""] * len(angles))
    for angle, label in zip(angles, labels, strict=True):
        side = "center" if abs(math.sin(angle)) < 0.1 else "left" if math.sin(angle) > 0 else "right"
        height = "bottom" if math.cos(angle) > 0.9 else "top" if math.cos(angle) < -0.5 else "center"
        axes.text(angle, 1.06, label, ha=side, va=height, fontsize=9)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.2, 0.4, 0.6, 0.8, 1.0])
    axes.tick_params(axis="y", labelsize=7, labelcolor="#777777")
    figure.legend(loc="upper right", fontsize=8, frameon=False)
    pictures.save(figure, path)


def draw_bounds(axes: "Axes", angles: Sequence[float], bounds: Sequence[tuple[float, float]]) -> None:
    """Floors as a grey area, ceilings as a dashed line, at each angle."""
    around = [*angles, angles[0]]
    floors, ceilings = ([pair[k] for pair in [*bounds, bounds[0]]] for k in (0, 1))
    axes.fill(around, floors, color="#9a9a9a", alpha=0.35, linewidth=0, label=FLOOR)
    axes.plot(around, ceilings, color="#777777", linestyle="--", linewidth=1, label=CEILING)


def draw_bars(
    axes: "Axes", names: Sequence[str], models: Sequence[tuple[str, Mapping[str, float]]], dimensions: Sequence[str],
    labels: Sequence[str], bounds: Bounds,
) -> None:  # fmt: skip
    """A group of bars per dimension, one per model; its floor as a grey box, its ceiling as a dashed line."""
    for i, dimension in enumerate(dimensions):
        floor, ceiling = bounds[dimension]
        first = i == 0
        axes.bar(i, floor, 0.96, color="#9a9a9a", alpha=0.35, label=FLOOR if first else None)
        axes.hlines(
            ceiling, i - 0.48, i + 0.48, color="#777777", linestyle="--", linewidth=1, label=CEILING if first else ""
        )
    width = 0.8 / len(models)
    for k, (name, (_, scores)) in enumerate(zip(names, models, strict=True)):
        places = [i + (k - (len(models) - 1) / 2) * width for i in range(len(dimensions))]
        heights = [scores.get(dimension, 0) for dimension in dimensions]
        axes.bar(places, heights, width, label=name, color=COLORS[k % len(COLORS)])
    axes.set_xticks(range(len(dimensions)), labels)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8)
