"""Loss curves in bounded memory: single points while they are few, then means of equally many neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

CELLS = 4096  # a curve keeps between so many and twice as many cells


class Place(NamedTuple):
    """Where a point lies: its number among all readings of the log, its step and epoch where the log tells them."""

    order: int
    step: float | None
    epoch: float | None


class Cell(NamedTuple):
    """One or more neighbouring points: their mean, the lowest and where it was, the last and where it was."""

    first: Place
    place: Place
    mean: float
    low: float
    low_place: Place
    last: float
    size: int


class Curve:
    """Values in the order of training. The lowest and the last one stay exact, whatever is averaged."""

    def __init__(self) -> None:
        self.cells: list[Cell] = []
        self.per_cell = 1
        # not yet in a cell: parallel columns
        self.orders: list[int] = []
        self.steps: list[float | None] = []
        self.epochs: list[float | None] = []
        self.values: list[float] = []

    def __len__(self) -> int:
        return len(self.cells) + bool(self.values)

    def add(self, place: Place, value: float) -> None:
        """Append one finite value."""
        self.extend((place.order,), (place.step,), (place.epoch,), (value,))

    def extend(
        self, orders: Sequence[int], steps: Sequence[float | None], epochs: Sequence[float | None],
        values: Sequence[float],
    ) -> None:  # fmt: skip
        """Append finite values with their places."""
        self.orders += orders
        self.steps += steps
        self.epochs += epochs
        self.values += values
        done = 0
        while len(self.values) - done >= self.per_cell:
            size = self.per_cell
            count = min((len(self.values) - done) // size, 2 * CELLS - len(self.cells))
            self.cells += [self._cell(i, i + size) for i in range(done, done + count * size, size)]
            done += count * size
            if len(self.cells) >= 2 * CELLS:
                self.cells = [merge(*self.cells[i : i + 2]) for i in range(0, len(self.cells), 2)]
                self.per_cell *= 2
        for column in (self.orders, self.steps, self.epochs, self.values):
            del column[:done]

    def _place(self, i: int) -> Place:
        return Place(self.orders[i], self.steps[i], self.epochs[i])

    def _cell(self, start: int, stop: int) -> Cell:
        if stop - start == 1:
            place, value = self._place(start), self.values[start]
            return Cell(place, place, value, value, place, value, 1)
        chunk = self.values[start:stop]
        low = min(chunk)
        lowest = self._place(start + chunk.index(low))
        return Cell(
            self._place(start), self._place(stop - 1), sum(chunk) / len(chunk), low, lowest, chunk[-1], len(chunk)
        )

    def all_cells(self) -> list[Cell]:
        """Every cell, the unfinished one included."""
        return [*self.cells, self._cell(0, len(self.values))] if self.values else list(self.cells)

    def cut(self, step: float | None, epoch: float | None) -> int:
        """Drop what lies at or after a step (or, where steps are not known, an epoch); how many points went.

        A cell of several points that begins before it stays whole.
        """
        gone = 0
        while self.values and reached(self._place(-1), step, epoch):
            for column in (self.orders, self.steps, self.epochs, self.values):
                column.pop()
            gone += 1
        while not self.values and self.cells and reached(self.cells[-1].first, step, epoch):
            gone += self.cells.pop().size
        return gone


def reached(place: Place, step: float | None, epoch: float | None) -> bool:
    """Whether a place is at or after a step or epoch."""
    if step is not None and place.step is not None:
        return place.step >= step
    return epoch is not None and place.epoch is not None and place.epoch >= epoch


def merge(a: Cell, b: Cell | None = None) -> Cell:
    """Two neighbours as one cell."""
    if b is None:
        return a
    count = a.size + b.size
    low = a if a.low <= b.low else b
    mean = (a.mean * a.size + b.mean * b.size) / count
    return Cell(a.first, b.place, mean, low.low, low.low_place, b.last, count)


@dataclass(frozen=True)
class Series:
    """A curve along one axis: parallel lists of places and means; the best and last single values."""

    x: list[float]
    y: list[float]
    orders: list[int]
    counts: list[int]
    best: float = 0.0
    best_x: float = 0.0
    best_index: int = 0
    last: float = 0.0
    last_x: float = 0.0

    def __len__(self) -> int:
        return len(self.x)


def series(curve: Curve, axis: str) -> Series:
    """A curve along `step`, `epoch` or `order`."""
    cells = curve.all_cells()
    if not cells:
        return Series([], [], [], [])

    def along(place: Place) -> float:
        return float(getattr(place, axis))

    lowest = min(range(len(cells)), key=lambda i: cells[i].low)
    return Series(
        [along(cell.place) for cell in cells], [cell.mean for cell in cells], [cell.place.order for cell in cells],
        [cell.size for cell in cells], cells[lowest].low, along(cells[lowest].low_place), lowest, cells[-1].last,
        along(cells[-1].place),
    )  # fmt: skip
