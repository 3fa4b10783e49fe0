"""Every pair of vectors whose cosine reaches a threshold: exact, in bounded memory, half of the square only.

A fast product proposes pairs with a margin that no rounding can exceed; each proposal is then decided by its cosine in
float64, rounded to nine places. So which pairs are found does not depend on blocks, threads or the product used:
- float32, the margin being the error bound of a dot product of unit vectors, d * 2**-24 (Higham, Accuracy and Stability
  of Numerical Algorithms, section 3.1), times four;
- int8 on CPUs whose product is exact and faster: vectors are turned by a random rotation (it keeps all products and
  evens out large components) and rounded. With x' the rounded x, Cauchy-Schwarz gives
  |x.y - x'.y'| <= |x - x'| + |x'||y - y'|; the norms of the differences are measured, not estimated.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmops.console import UserError, progress

if TYPE_CHECKING:
    import numpy as np

    Proposals = tuple[np.ndarray, np.ndarray]

PLACES = 9
ROWS, COLUMNS = 1024, 4096  # of a block
SMALL = 20_000  # below, the product takes about a second anyway and torch need not be imported
CLIP = 4.0  # standard deviations of a component at the end of the int8 scale: about the smallest total error
CHECKED_AT_ONCE = 4096


@dataclass(frozen=True)
class Pairs:
    """Rows `i` < `j` of the vectors and their cosine; sorted by (i, j)."""

    i: "np.ndarray"
    j: "np.ndarray"
    cosine: "np.ndarray"


def float_slack(dimension: int) -> float:
    """How far a float32 product of unit vectors can be off."""
    return 4 * (dimension + 8) * 2.0**-24


class FloatProduct:
    """Proposals by NumPy's float32 product."""

    def __init__(self, vectors: "np.ndarray", threshold: float) -> None:
        self.vectors = vectors
        self.bound = threshold - float_slack(vectors.shape[1])

    def propose(self, rows: slice, columns: slice) -> "Proposals":
        """Pairs of the block that may reach the threshold, as (row, column) of the whole."""
        import numpy as np

        found = np.nonzero(self.vectors[rows] @ self.vectors[columns].T >= self.bound)
        return found[0] + rows.start, found[1] + columns.start


class GpuProduct:
    """Proposals by a GPU's float32 product (not TF32: torch's default)."""

    def __init__(self, vectors: "np.ndarray", threshold: float, device: str) -> None:
        import torch

        self.vectors = torch.from_numpy(vectors).to(device)
        self.bound = threshold - float_slack(vectors.shape[1])

    def propose(self, rows: slice, columns: slice) -> "Proposals":
        """As FloatProduct's."""
        found = (self.vectors[rows] @ self.vectors[columns].T >= self.bound).nonzero().cpu().numpy()
        return found[:, 0] + rows.start, found[:, 1] + columns.start


class ByteProduct:
    """Proposals by an int8 product with exact int32 sums."""

    def __init__(self, vectors: "np.ndarray", threshold: float) -> None:
        import numpy as np
        import torch

        count, dimension = vectors.shape
        rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((dimension, dimension)))[0].astype(np.float32)
        self.step = CLIP / dimension**0.5 / 127
        self.threshold = threshold - 2 * float_slack(dimension)  # of this rotation, and of the comparison's scale
        self.rows = torch.empty((count, dimension), dtype=torch.int8)
        self.columns = []
        self.error = np.empty(count)
        for start in range(0, count, COLUMNS):
            rotated = vectors[start : start + COLUMNS] @ rotation
            rounded = np.clip(np.rint(rotated / self.step), -127, 127)
            self.error[start : start + COLUMNS] = np.linalg.norm(rotated - rounded * self.step, axis=1)
            block = torch.from_numpy(rounded.astype(np.int8))
            self.rows[start : start + COLUMNS] = block
            self.columns.append(block.T.contiguous())
        self.sums = torch.empty((ROWS, COLUMNS), dtype=torch.int32)

    def propose(self, rows: slice, columns: slice) -> "Proposals":
        """As FloatProduct's; `columns` lies within one block of COLUMNS."""
        import math

        import torch

        error, other = self.error[rows].max(), self.error[columns].max()
        bound = (self.threshold - error - other * (1 + error)) / self.step**2
        right = self.columns[columns.start // COLUMNS]
        skipped = columns.start % COLUMNS
        left = self.rows[rows]
        sums = self.sums.view(-1)[: len(left) * right.shape[1]].view(len(left), -1)
        torch._int_mm(left, right, out=sums)
        sums = sums[:, skipped:]
        bound = math.ceil(bound)
        hit = (sums.amax(1) >= bound).nonzero().flatten()
        found = (sums[hit] >= bound).nonzero()
        return hit[found[:, 0]].numpy() + rows.start, found[:, 1].numpy() + columns.start


def bytes_are_worth_it(dimension: int) -> bool:
    """Whether the int8 product of this CPU and torch is exact, also for the largest sums, and faster than float32."""
    import numpy as np
    import torch

    draw = torch.Generator().manual_seed(0)
    left = torch.randint(-127, 128, (ROWS, dimension), dtype=torch.int8, generator=draw)
    right = torch.randint(-127, 128, (dimension, COLUMNS), dtype=torch.int8, generator=draw)
    left[0], right[:, 0], right[:, 1] = 127, 127, -127
    floats = left.numpy().astype(np.float32), right.numpy().astype(np.float32)  # exact: sums are below 2**24
    try:
        exact = bool((torch._int_mm(left, right).numpy() == floats[0] @ floats[1]).all())
    except RuntimeError:  # not made for this CPU
        return False

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times)

    return exact and seconds(lambda: torch._int_mm(left, right)) < seconds(lambda: floats[0] @ floats[1])


def choose_product(vectors: "np.ndarray", threshold: float, device: str) -> "FloatProduct | GpuProduct | ByteProduct":
    """The fastest product for so many vectors on this machine."""
    if len(vectors) < SMALL:
        return FloatProduct(vectors, threshold)
    if device != "cpu":
        return GpuProduct(vectors, threshold, device)
    if vectors.shape[1] * 127**2 < 2**24 and bytes_are_worth_it(vectors.shape[1]):
        return ByteProduct(vectors, threshold)
    return FloatProduct(vectors, threshold)


def blocks(count: int) -> Iterator[tuple[slice, slice]]:
    """The blocks that cover the upper triangle; columns never cross a multiple of COLUMNS."""
    for row in range(0, count, ROWS):
        first = row
        while first < count:
            last = min((first // COLUMNS + 1) * COLUMNS, count)
            yield slice(row, min(row + ROWS, count)), slice(first, last)
            first = last


def cosines(vectors: "np.ndarray", norms: "np.ndarray", i: "np.ndarray", j: "np.ndarray") -> "np.ndarray":
    """Cosine of each pair of rows in float64, rounded to nine places."""
    import numpy as np

    found = np.empty(len(i))
    for start in range(0, len(i), CHECKED_AT_ONCE):
        a, b = i[start : start + CHECKED_AT_ONCE], j[start : start + CHECKED_AT_ONCE]
        dots = np.einsum("nd,nd->n", vectors[a].astype(np.float64), vectors[b].astype(np.float64))
        found[start : start + CHECKED_AT_ONCE] = dots / (norms[a] * norms[b])
    return found.round(PLACES)


def norms_of(vectors: "np.ndarray") -> "np.ndarray":
    """Euclidean norm of every row in float64."""
    import numpy as np

    parts = [
        np.linalg.norm(vectors[start : start + COLUMNS].astype(np.float64), axis=1)
        for start in range(0, len(vectors), COLUMNS)
    ]
    return np.concatenate(parts)


def similar_pairs(
    vectors: "np.ndarray", threshold: float, groups: "np.ndarray", max_pairs: int, device: str = "cpu"
) -> Pairs:
    """All pairs of unit vectors (n, d) float32 that reach the threshold and are not both of one group (-1: of none).

    Raises UserError when there are more than max_pairs.
    """
    import numpy as np

    product = choose_product(vectors, threshold, device)
    norms = norms_of(vectors)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    count, compared, total = 0, 0, len(vectors) * (len(vectors) + 1) // 2
    every = list(blocks(len(vectors)))
    for rows, columns in progress(every, "comparing", len(every), "blocks"):
        one = groups[rows.start]
        compared += (rows.stop - rows.start) * (columns.stop - columns.start)
        if one >= 0 and (groups[rows] == one).all() and (groups[columns] == one).all():
            continue
        i, j = product.propose(rows, columns)
        wanted = (i < j) & ((groups[i] != groups[j]) | (groups[i] < 0))
        i, j = i[wanted].astype(np.int32), j[wanted].astype(np.int32)
        cosine = cosines(vectors, norms, i, j)
        reached = cosine >= threshold
        if reached.any():
            parts.append((i[reached], j[reached], cosine[reached]))
            count += len(parts[-1][0])
        if count > max_pairs:
            raise too_many(count, min(1.0, compared / total), max_pairs, np.concatenate([part[2] for part in parts]))
    i, j, cosine = (np.concatenate([part[k] for part in parts]) if parts else np.empty(0, int) for k in range(3))
    order = np.lexsort((j, i))
    return Pairs(i[order], j[order], cosine[order])


def too_many(count: int, share: float, max_pairs: int, cosine: "np.ndarray") -> UserError:
    """The sentence for a threshold that is too low for the data."""
    import numpy as np

    higher = min(1.0, float(np.quantile(cosine, 1 - min(1, 0.5 * share * max_pairs / count))))
    return UserError(
        f"{count} pairs with different intents reach the threshold after {share:.0%} of the comparisons, more than "
        f"--max_pairs {max_pairs}; raise --similarity_threshold (by these pairs {higher:.4f} would do) or --max_pairs"
    )
