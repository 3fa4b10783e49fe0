"""What more than one risk measures on a curve: means, levels, where it starts, how long it has not been better."""

import math
from statistics import stdev

from eval.diagnosis.curves import Series


def weighted(curve: Series, start: int, stop: int) -> float:
    """Mean of the points in cells start to stop."""
    total = sum(curve.counts[start:stop])
    return sum(y * n for y, n in zip(curve.y[start:stop], curve.counts[start:stop], strict=True)) / total


def recent(train: Series, x: float, share: float = 0.1) -> tuple[float, float]:
    """Mean training loss over the last tenth of the points up to x (at least 3 where there are so many), and its
    standard error.
    """
    stop = max(1, sum(1 for value in train.x if value <= x))
    start = max(0, stop - max(3, round(share * stop)))
    spread = stdev(train.y[start:stop]) if stop - start > 1 else 0.0
    return weighted(train, start, stop), spread / math.sqrt(stop - start)


def evaluation_start(evaluation: Series, train: Series) -> float:
    """The evaluation loss at the start of the run: its first value, and what the training loss fell by until then."""
    before = sum(1 for x in train.x if x < evaluation.x[0])
    if not before:
        return evaluation.y[0]
    few = max(1, min(3, len(train) // 8))
    return evaluation.y[0] + max(0.0, weighted(train, 0, min(few, before)) - recent(train, evaluation.x[0])[0])


def persistence(evaluation: Series, min_delta: float) -> int:
    """Evaluations since the last one that was better by min_delta, as early stopping counts them."""
    best, index = math.inf, 0
    for i, value in enumerate(evaluation.y):
        if value < best * (1 - min_delta) or best == math.inf:
            best, index = value, i
    return len(evaluation) - 1 - index


def learning_spent(curve: Series, rates: Series) -> list[float]:
    """Share of all learning (learning rate summed over the run) spent at each point; by position without rates."""
    if len(rates) < 2 or max(rates.y) <= 0:
        first, span = curve.x[0], curve.x[-1] - curve.x[0]
        return [(x - first) / span if span > 0 else 1.0 for x in curve.x]
    done, spent, i = 0.0, [], 0
    for order in curve.orders:
        while i < len(rates) and rates.orders[i] <= order:
            done += rates.y[i] * rates.counts[i]
            i += 1
        spent.append(done)
    total = done + sum(y * n for y, n in zip(rates.y[i:], rates.counts[i:], strict=True))
    return [share / total for share in spent]


def level(curve: Series, spent: list[float], low: float, high: float) -> float:
    """Mean loss where between `low` and `high` of the learning was spent; the straight line between the two
    nearest points where there is none.
    """
    inside = [i for i, share in enumerate(spent) if low <= share <= high]
    if inside:
        return weighted(curve, inside[0], inside[-1] + 1)
    middle = (low + high) / 2
    after = next((i for i, share in enumerate(spent) if share > middle), len(spent) - 1)
    before = max(0, after - 1)
    width = spent[after] - spent[before]
    share = min(1.0, max(0.0, (middle - spent[before]) / width)) if width > 0 else 1.0
    return curve.y[before] + share * (curve.y[after] - curve.y[before])
