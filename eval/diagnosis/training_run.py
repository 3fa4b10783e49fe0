"""The curves of a run, put together from readings of its log.

What is counted once: lines that several processes repeat, and lines of processes other than the first that spoke. Where
the step falls back, the run was resumed or begun anew: what follows replaces what was told for these steps before. But
steps that fall back while the epoch rises count within the epoch, and a few lines that fall back before the log goes on
where it was are another process's. Values that are not finite are counted and left out of the curves.
"""

import copy
from collections import Counter, deque
from collections.abc import Sequence
from math import isfinite
from operator import le, lt
from typing import NamedTuple

from eval.diagnosis.curves import Curve, Place, Series, series
from eval.diagnosis.log_lines import Reading

LOSSES = ("loss", "eval_loss", "retention_loss")
CURVES = (*LOSSES, "lr")
REMEMBERED = 512  # readings among which a repeated one is recognised
FEW = 3  # lines in a row that fall back: from so many on a run is told again, under it they are another process's
Key = tuple[str, float | None, float | None, float]


class Told(NamedTuple):
    """A reading with its place in the run."""

    step: float | None
    epoch: float | None
    values: dict[str, float]
    lr: float | None

    @property
    def position(self) -> float | None:
        """Where it lies: its step, or the epoch where it has none."""
        return self.step if self.step is not None else self.epoch


class TrainingRun:
    """The curves of a run, fed reading by reading or by whole columns."""

    def __init__(self) -> None:
        self.curves = {name: Curve() for name in CURVES}
        self.readings = 0
        self.restarts = 0
        self.repeated = 0
        self.passed: Counter[str] = Counter()  # lines with a loss that counts for nothing, by reason
        self.nonfinite = dict.fromkeys(LOSSES, 0)
        self.broken = dict.fromkeys(LOSSES, 0)  # values that are not finite since the last finite one
        self.first_nonfinite: Place | None = None
        self.stepless = 0  # lines with a step and no loss
        self._rank: int | None = None
        self._data = ""  # the evaluation data whose losses count
        self._section = ""
        self._step: float | None = None
        self._epoch: float | None = None
        self._heading: float | None = None
        self._carried: tuple[float, set[str]] | None = None  # the step of a line without a loss, and who used it
        self._stepped = False  # whether training losses have steps of their own
        self._offsets: list[tuple[float, float]] = [
            (0.0, 0.0)
        ]  # where steps count within an epoch: (epoch, steps before)
        self._raw_step: float | None = None
        self._recent: deque[Key] = deque(maxlen=REMEMBERED)
        self._known: set[Key] = set()
        self._places: Counter[tuple[str, float | None]] = Counter()  # (curve, position) of what is known
        self._columns: list[tuple[str, list[list[float | None]], list[float]]] = []  # to be remembered, when needed
        self._pending: list[Told] = []  # lines that fall back, until it shows what they are
        self._interleaved = False

    def add(self, reading: Reading) -> None:
        """Take in one reading."""
        if reading.passed and not (reading.loss is not None and reading.passed == "best"):
            self.passed[reading.passed] += 1
        if reading.heading:
            self._heading, self._section = reading.epoch, ""
            return
        if reading.section:
            self._section = reading.section
            return
        if not reading.has_loss:
            if reading.step is not None and not reading.passed:
                self.stepless += 1
                self._carried = (reading.step, set())
            elif reading.epoch is not None and not reading.passed:
                self._heading = reading.epoch  # "Epoch: 01 | Time: 0m 30s"
            return
        if reading.rank is not None and reading.rank != self.choose_rank(reading.rank):
            self.repeated += 1
            return
        values = self._counted(reading)
        if values:
            self._take(reading, values)

    def choose_rank(self, rank: int | None) -> int | None:
        """The process whose lines count: the first one that spoke."""
        self._rank = rank if self._rank is None else self._rank
        return self._rank

    def choose_data(self, data: str) -> bool:
        """Whether evaluation losses of this data count: those of the first, but validation rather than a test."""
        if self._data.startswith("test") and data.startswith("valid"):
            self.curves["eval_loss"], self._data = Curve(), data
        self._data = self._data or data
        return data in ("", self._data)

    def _counted(self, reading: Reading) -> dict[str, float]:
        """The losses of a reading that count, each for its curve."""
        values = {name: value for name in LOSSES if (value := getattr(reading, name)) is not None}
        placed = reading.step is not None or reading.epoch is not None
        if "eval_loss" in values and not self.choose_data(reading.data):
            del values["eval_loss"]
            self.passed["other"] += 1
        if reading.bar and "eval_loss" in values and values["eval_loss"] == self._last("eval_loss"):
            del values["eval_loss"]  # a progress bar carries the last one on
        if values and not placed and self._section == "summary":
            self.passed["summary"] += 1
            return {}
        if "loss" in values and self._section == "eval" and not (placed and self._goes_on(reading)):
            del values["loss"]
            self.passed["doubt"] += 1
        if (
            "loss" in values
            and reading.step is None
            and self._stepped
            and (self._carried is None or "eval_loss" in values)
        ):
            del values["loss"]  # a mean over steps that were told before
            self.passed["summary"] += 1
        if placed and "loss" in values and "eval_loss" not in values:
            self._section = ""
        elif "eval_loss" in values and self._section == "eval":
            self._section = "after eval"
        return values

    def _goes_on(self, reading: Reading) -> bool:
        """Whether a loss with a place lies behind what was told last: one that begins anew may be an evaluation's."""
        if reading.step is not None and self._raw_step is not None:
            newer = reading.epoch is not None and self._epoch is not None and reading.epoch > self._epoch
            return newer or reading.step > self._raw_step
        return True

    def _last(self, name: str) -> float | None:
        curve = self.curves[name]
        return curve.values[-1] if curve.values else curve.cells[-1].last if curve.cells else None

    def _take(self, reading: Reading, values: dict[str, float]) -> None:
        self._remember_columns()
        epoch = reading.epoch if reading.epoch is not None else self._heading
        if epoch is None and "loss" not in values:
            epoch = self._epoch  # an evaluation of what was told last
        keys = [(name, reading.step, epoch, value) for name, value in values.items()]
        if (reading.step is not None or epoch is not None) and all(key in self._known for key in keys):
            self.repeated += 1
            return
        step = self._place_step(reading.step, epoch, values)
        self._stepped |= reading.step is not None and "loss" in values
        told = Told(step, epoch, values, reading.lr)
        own = reading.step is not None or step is None
        if self._pending and not self._settle(told):
            self._pending.append(told)
        elif own and self._falls(told) and self._told_before(told):
            self._pending = [told]
        else:
            self._remember(keys)
            self._append(told, own)

    def _remember(self, keys: Sequence[Key]) -> None:
        for key in keys:
            if len(self._recent) == REMEMBERED:
                old = self._recent[0]
                self._known.discard(old)
                place = (old[0], old[1] if old[1] is not None else old[2])
                self._places[place] -= 1
                if self._places[place] <= 0:
                    del self._places[place]
            self._recent.append(key)
            self._known.add(key)
            self._places[key[0], key[1] if key[1] is not None else key[2]] += 1

    def _remember_columns(self) -> None:
        """Remember the end of the last columns, as far as nothing came after it that is remembered anyway."""
        if self._columns:
            for role, places, column in self._columns:
                self._remember([(role, *key) for key in zip(*places, column, strict=True)])
            self._columns = []

    # --- places
    def _place_step(self, step: float | None, epoch: float | None, values: dict[str, float]) -> float | None:
        """The step counted from the start of the run; of a line without one, the step that a line before it told."""
        if step is None:
            newer = self._carried is not None and (self._step is None or self._carried[0] > self._step)
            if "loss" not in values and self._step is not None and not newer:
                return self._step  # an evaluation of the newest step
            if self._carried is None or self._carried[1] & values.keys():
                return None
            self._carried[1].update(values)
            return self._carried[0]
        if self._raw_step is not None and epoch is not None and self._epoch is not None:
            again = step < self._raw_step or (step == self._raw_step and epoch >= self._epoch + 1)
            if again and epoch > self._epoch + 1e-9:
                self._offsets.append((epoch, self._offsets[-1][1] + self._raw_step))  # steps count within the epoch
            while len(self._offsets) > 1 and epoch < self._offsets[-1][0] - 1e-9:
                self._offsets.pop()
        self._raw_step = step
        return step + self._offsets[-1][1]

    def _falls(self, told: Told) -> bool:
        """Whether a reading lies before the newest one."""
        if told.step is not None:
            return self._step is not None and told.step < self._step
        return told.epoch is not None and self._epoch is not None and told.epoch < self._epoch - 1e-6

    def _told_before(self, told: Told) -> bool:
        """Whether all losses of a reading were told for this very place, not long ago."""
        raw = told.step - self._offsets[-1][1] if told.step is not None else told.epoch
        return all((name, raw) in self._places for name in told.values)

    # --- lines that fall back
    def _settle(self, told: Told) -> bool:
        """Decide on the lines that fell back, as far as the next one shows what they are; whether that is done."""
        head, last, new = (self._step, self._pending[-1].position, told.position)
        head = head if told.step is not None else self._epoch
        if new is None or head is None or last is None:
            self.settle()
            return True
        if new > head or (new == head > last and not self._told_before(told)):  # the log goes on where it was
            self.settle(another=len(self._pending) < FEW or last < head)
            return True
        if (new < last and len(self._pending) >= FEW) or not self._told_before(told):
            self.settle()
            return True
        return False

    def settle(self, another: bool = False) -> None:
        """Lines that fell back are `another` process's, or else the run told again from there."""
        pending, self._pending = self._pending, []
        if another:
            self._interleaved = True
            self.repeated += len(pending)
            return
        for told in pending:
            raw = told.step - self._offsets[-1][1] if told.step is not None else None
            self._remember([(name, raw, told.epoch, value) for name, value in told.values.items()])
            self._append(told, True)

    def settled(self) -> "TrainingRun":
        """The run as it stands, with what is not decided yet taken for the run told again (or left out, in a log where
        processes mix): itself, or a copy.
        """
        if not self._pending:
            return self
        run = copy.deepcopy(self)
        run.settle(another=run._interleaved and len(run._pending) < FEW)
        return run

    # --- curves
    def _append(self, told: Told, own: bool) -> None:
        """Add a reading to the curves; `own` is whether its step or epoch stood in its own line."""
        step, epoch = told.step, told.epoch
        if step is not None:
            if own and self._falls(told):
                self._restart(step, epoch)
            else:
                for name in told.values:
                    self.curves[name].cut(step, None)
            self._step = step
        elif self._falls(told):
            self._restart(None, epoch)
            self._step = self._raw_step = self._carried = None
        if epoch is not None:
            self._epoch = epoch
        place = Place(self.readings, step, epoch)
        for name, value in told.values.items():
            if isfinite(value):
                self.curves[name].add(place, value)
                self.broken[name] = 0
            else:
                self.nonfinite[name] += 1
                self.broken[name] += 1
                self.first_nonfinite = self.first_nonfinite or place
        if told.lr is not None and isfinite(told.lr):
            self.curves["lr"].add(place, told.lr)
        self.readings += 1

    def _restart(self, step: float | None, epoch: float | None) -> None:
        gone = [self.curves[name].cut(step, epoch) for name in CURVES]
        self.restarts += any(gone)

    def add_columns(self, roles: Sequence[str], texts: Sequence[Sequence[bytes]], data: str = "") -> bool:
        """Take in many readings of one shape at once, a column per role; False (and nothing taken) when they are not
        plainly in order.
        """
        if self._pending or len(self._offsets) > 1 or (data and not self.choose_data(data)):
            return False
        try:
            columns = {role: list(map(float, column)) for role, column in zip(roles, texts, strict=False)}
        except ValueError:
            return False
        columns.pop("rank", None)
        steps, epochs = columns.pop("step", None), columns.pop("epoch", None)
        if not all(isfinite(sum(column)) for column in (*columns.values(), steps or (), epochs or ())):
            return False  # NaN and inf are in their sum
        if not self._in_order(steps, epochs):
            return False
        count, start = len(texts[0]), self.readings
        heading = self._heading if steps and not epochs else None
        places: tuple[Sequence[float | None], Sequence[float | None]] = (
            steps or [None] * count,
            epochs or [heading] * count,
        )
        if count < REMEMBERED:
            self._remember_columns()
        self._columns = []
        for role, values in columns.items():
            self.curves[role].extend(range(start, start + count), *places, values)
            if role in self.broken:
                self.broken[role] = 0
                recent = [list(column[-REMEMBERED:]) for column in places]
                self._columns.append((role, recent, values[-REMEMBERED:]))
        self._stepped |= bool(steps) and "loss" in columns
        self._step = self._raw_step = steps[-1] if steps else self._step
        self._epoch = epochs[-1] if epochs else self._epoch if heading is None else heading
        self._section = ""
        self.readings += count
        return True

    def _in_order(self, steps: list[float] | None, epochs: list[float] | None) -> bool:
        """Whether places rise, from where the run is, as one process writes them."""
        if steps:
            ordered = all(map(lt, steps, steps[1:])) and (self._step is None or steps[0] > self._step)
            return ordered and (not epochs or all(map(le, epochs, epochs[1:])))
        if not epochs or self._stepped or self._carried is not None:
            return False
        return all(map(le, epochs, epochs[1:])) and (self._epoch is None or epochs[0] >= self._epoch)

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
