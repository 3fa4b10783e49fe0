"""The radar of several models as coordinates for an SVG: made here, so that the page needs no script for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from serve.console.evaluations import Result

SIZE = 460.0
RADIUS = 150.0
RINGS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Spoke:
    """A dimension: where its axis ends and where its words stand."""

    name: str
    x: float
    y: float
    words_x: float
    words_y: float
    anchor: str


@dataclass(frozen=True)
class Shape:
    """A model: its polygon, its points, its 95% intervals along the axes."""

    polygon: str
    points: list[tuple[float, float]]
    intervals: list[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Radar:
    """Everything that is drawn, in a square of SIZE."""

    size: float
    rings: list[str]
    spokes: list[Spoke]
    floor: str
    ceiling: str
    shapes: list[Shape]


def place(share: float, i: int, count: int, radius: float = RADIUS) -> tuple[float, float]:
    """Where a share from 0 to 1 of axis i of `count` is; the first axis goes up, the others follow clockwise."""
    angle = 2 * math.pi * i / count - math.pi / 2
    reach = radius * min(1.0, max(0.0, share))
    return round(SIZE / 2 + reach * math.cos(angle), 2), round(SIZE / 2 + reach * math.sin(angle), 2)


def path(points: Sequence[tuple[float, float]]) -> str:
    """Points as SVG's polygon takes them."""
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def radar(results: Sequence[Result], dimensions: Sequence[str]) -> Radar | None:
    """The radar of results over dimensions; None for fewer than three of them, of which no area can be made."""
    count = len(dimensions)
    if count < 3:
        return None
    spokes = []
    for i, name in enumerate(dimensions):
        x, y = place(1, i, count)
        words_x, words_y = place(1, i, count, RADIUS + 18)
        anchor = "middle" if abs(words_x - SIZE / 2) < 5 else "start" if words_x > SIZE / 2 else "end"
        spokes.append(Spoke(name, x, y, words_x, words_y, anchor))
    bounds = []
    for of in ("floor", "ceiling"):
        told = [next((v for r in results if d in r.scores and (v := getattr(r.scores[d], of)) is not None), None)
                for d in dimensions]  # fmt: skip
        known = all(value is not None for value in told)
        bounds.append(path([place(value or 0, i, count) for i, value in enumerate(told)]) if known else "")
    rings = [path([place(ring, i, count) for i in range(count)]) for ring in RINGS]
    return Radar(SIZE, rings, spokes, bounds[0], bounds[1], [shape(result, dimensions) for result in results])


def shape(result: Result, dimensions: Sequence[str]) -> Shape:
    """A model's polygon; a dimension that it was not asked has no point in it."""
    count = len(dimensions)
    known = [(i, result.scores[name]) for i, name in enumerate(dimensions) if name in result.scores]
    points = [place(score.value, i, count) for i, score in known]
    intervals = [
        (*place(score.low, i, count), *place(score.high, i, count))
        for i, score in known
        if score.low is not None and score.high is not None
    ]
    return Shape(path(points), points, intervals)
