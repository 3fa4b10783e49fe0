"""The curves of a run, put together from readings of its log.

What is counted once: lines that several processes repeat, and lines of processes other than the first that spoke.
Where the step falls back, the run was resumed or begun anew: what follows replaces what was told for these steps
before. Values that are not finite are counted and left out of the curves.
"""

from collections import deque
from collections.abc import Sequence
from math import isfinite
from operator import le, lt

from eval.diagnosis.curves import Curve, Place, Series, series
from eval.diagnosis.log_lines import Reading

LOSSES = ("loss", "eval_loss", "retention_loss")
CURVES = (*LOSSES, "lr")
REMEMBERED = 512  # readings among which a repeated one is recognised


class TrainingRun:
    """The curves of a run, fed reading by reading or by whole columns."""

    def __init__(self) -> None:
        self.curves = {name: Curve() for name in CURVES}
        self.readings = 0
        self.restarts = 0
        self.repeated = 0
        self.nonfinite = dict.fromkeys(LOSSES, 0)
        self.broken = dict.fromkeys(LOSSES, 0)  # values that are not finite since the last finite one
        self.first_nonfinite: Place | None = None
        self.stepless = 0  # lines with a step and no loss
        self._rank: int | None = None
        self._step: float | None = None
        self._epoch: float | None = None
        self._heading: float | None = None
        self._carried: tuple[float, set[str]] | None = None  # the step of a line without a loss, and who used it
        self._offset = 0.0  # where steps count within an epoch
        self._raw_step: float | None = None
        self._recent: deque[tuple[str, float | None, float | None, float]] = deque(maxlen=REMEMBERED)
        self._known: set[tuple[str, float | None, float | None, float]] = set()

    def add(self, reading: Reading) -> None:
        """Take in one reading."""
        if reading.heading:
            self._heading = reading.epoch
            return
        if not reading.has_loss:
            if reading.step is not None:
                self.stepless += 1
                self._carried = (reading.step, set())
            return
        if reading.rank is not None and reading.rank != self.choose_rank(reading.rank):
            self.repeated += 1
            return
        told = {name: value for name in LOSSES if (value := getattr(reading, name)) is not None}
        epoch = reading.epoch if reading.epoch is not None or reading.step is not None else self._heading
        keys = [(name, reading.step, epoch, value) for name, value in told.items()]
        if (reading.step is not None or epoch is not None) and all(key in self._known for key in keys):
            self.repeated += 1
            return
        self._remember(keys)
        if reading.step is None and "eval_loss" in told and self._step is not None:
            told.pop("loss", None)  # a summary of an epoch whose steps were told before
        step = self._place_step(reading.step, epoch, told)
        self._detect_restart(step if reading.step is not None else None, epoch, told)
        self._append(Place(self.readings, step, epoch), told, reading.lr)

    def choose_rank(self, rank: int | None) -> int | None:
        """The process whose lines count: the first one that spoke."""
        self._rank = rank if self._rank is None else self._rank
        return self._rank

    def _remember(self, keys: Sequence[tuple[str, float | None, float | None, float]]) -> None:
        for key in keys:
            if len(self._recent) == REMEMBERED:
                self._known.discard(self._recent[0])
            self._recent.append(key)
            self._known.add(key)

    def _place_step(self, step: float | None, epoch: float | None, told: dict[str, float]) -> float | None:
        """The step counted from the start of the run; of a line without one, the step that a line before it told."""
        if step is None:
            if "loss" not in told and self._step is not None:
                return self._step  # an evaluation of the newest step
            if self._carried is None or self._carried[1] & told.keys():
                return None
            self._carried[1].update(told)
            return self._carried[0]
        falls = self._raw_step is not None and step <= self._raw_step
        rises = epoch is not None and self._epoch is not None and epoch >= self._epoch + 1
        if falls and rises and self._raw_step is not None and step < self._raw_step:
            self._offset += self._raw_step  # steps count within the epoch
        elif falls and self._offset and epoch is not None and self._epoch is not None and epoch < self._epoch:
            self._offset = 0.0 if epoch <= 1 else self._offset
        self._raw_step = step
        return step + self._offset

    def _detect_restart(self, step: float | None, epoch: float | None, told: dict[str, float]) -> None:
        """Drop what is told again: everything from this step on, or this very curve's value of the same step."""
        if step is not None:
            if self._step is not None and step < self._step:
                self._restart(step, epoch)
            else:
                for name in told:
                    self.curves[name].cut(step, None)
            self._step = step
        elif epoch is not None and self._epoch is not None and epoch < self._epoch - 1e-6:
            self._restart(None, epoch)
            self._step = self._raw_step = self._carried = None
        if epoch is not None:
            self._epoch = epoch

    def _restart(self, step: float | None, epoch: float | None) -> None:
        gone = [self.curves[name].cut(step, epoch) for name in CURVES]
        self.restarts += any(gone)

    def _append(self, place: Place, told: dict[str, float], lr: float | None) -> None:
        for name, value in told.items():
            if isfinite(value):
                self.curves[name].add(place, value)
                self.broken[name] = 0
            else:
                self.nonfinite[name] += 1
                self.broken[name] += 1
                self.first_nonfinite = self.first_nonfinite or place
        if lr is not None and isfinite(lr):
            self.curves["lr"].add(place, lr)
        self.readings += 1

    def add_columns(self, roles: Sequence[str], rows: Sequence[Sequence[bytes]]) -> bool:
        """Take in many readings of one shape at once; False (and nothing taken) when they are not plainly in order."""
        try:
            columns = {
                role: list(map(float, column)) for role, column in zip(roles, zip(*rows, strict=True), strict=False)
            }
        except ValueError:
            return False
        columns.pop("rank", None)
        steps, epochs = columns.pop("step", None), columns.pop("epoch", None)
        if not all(all(map(isfinite, column)) for column in (*columns.values(), steps or (), epochs or ())):
            return False
        if steps:
            ordered = all(map(lt, steps, steps[1:])) and (self._step is None or steps[0] > self._step)
            ordered = ordered and not self._offset and (not epochs or all(map(le, epochs, epochs[1:])))
        else:
            ordered = bool(epochs) and all(map(le, epochs, epochs[1:])) and self._carried is None
            ordered = ordered and (self._epoch is None or epochs[0] >= self._epoch)
        if not ordered:
            return False
        count, start = len(rows), self.readings
        places = (steps or [None] * count, epochs or [None] * count)
        for role, values in columns.items():
            self.curves[role].extend(range(start, start + count), *places, values)
            if role in self.broken:
                self.broken[role] = 0
                recent = zip(*(column[-REMEMBERED:] for column in (*places, values)), strict=True)
                self._remember([(role, *key) for key in recent])
        self._step = self._raw_step = steps[-1] if steps else self._step
        self._epoch = epochs[-1] if epochs else self._epoch
        self.readings += count
        return True

    def epochs_of(self, name: str) -> list[float | None]:
        """The epoch of every cell of a curve."""
        return [cell.place.epoch for cell in self.curves[name].all_cells()]

    def axis(self) -> str:
        """What all points have: `step`, else `epoch`, else only their `order`."""
        for name in ("step", "epoch"):
            cells = (cell for curve in LOSSES for cell in self.curves[curve].all_cells())
            if all(getattr(cell.place, name) is not None for cell in cells):
                return name
        return "order"


def series_of(run: TrainingRun, name: str, axis: str) -> Series:
    """A curve along an axis; the learning rates along their order, they are only ever looked up by it."""
    return series(run.curves[name], "order" if name == "lr" else axis)
