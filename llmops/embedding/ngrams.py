"""A baseline that needs no model: hashed character n-grams. It finds similar wording, not similar meaning."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    import numpy as np

NAME = "builtin:ngram"
DIMENSION = 1024
LONGEST = 3  # characters
TEXTS_AT_ONCE = 512
KEPT_HASHES = 1 << 18  # n-grams come again and again
BITS = 21  # of a character's number


@lru_cache(KEPT_HASHES)
def hashed(gram: int) -> tuple[int, float]:
    """(place in the vector, sign) of an n-gram: its characters' numbers plus 1, BITS each, the first one lowest."""
    numbers = (gram >> shift & ((1 << BITS) - 1) for shift in range(0, BITS * LONGEST, BITS))
    value = crc32("".join(chr(number - 1) for number in numbers if number).encode("utf-8", "surrogatepass"))
    return value % DIMENSION, 1.0 if value >> 31 else -1.0


def ngram_vectors(texts: Sequence[str]) -> "np.ndarray":
    """Unit vectors (n, 1024): square roots of the counts of the letters' 1- to 3-grams, hashed with a sign.

    Source of the hashing: Weinberger et al. 2009, Feature Hashing for Large Scale Multitask Learning.
    """
    import numpy as np

    vectors = np.zeros((len(texts), DIMENSION), np.float32)
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = vectors[start : start + TEXTS_AT_ONCE]
        add_grams(some, texts[start : start + TEXTS_AT_ONCE])
        for number, row in enumerate(some):
            some[number] /= np.linalg.norm(row) or 1
    return vectors


def add_grams(vectors: "np.ndarray", texts: Sequence[str]) -> None:
    """Add the n-grams of each text to its row of (n, 1024), one after the other, as they come first in the text."""
    import numpy as np

    letters = ["".join(character for character in text.lower() if character.isalnum()) or text for text in texts]
    spelt = [f"^{text}$" for text in letters]
    numbers = np.frombuffer("".join(spelt).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64) + 1
    row_of = np.repeat(np.arange(len(texts)), [len(text) for text in spelt])
    longer, grams, rows = numbers, [numbers], [row_of]
    for n in range(1, LONGEST):  # longer by one character, where that is the same text's
        whole = row_of[n:] == row_of[:-n]
        longer = longer[: len(whole)] | numbers[n:] << (BITS * n)
        grams.append(longer[whole])
        rows.append(row_of[n:][whole])
    known, gram = np.unique(np.concatenate(grams), return_inverse=True)
    pairs = np.concatenate(rows) * len(known) + gram
    pair, first, count = np.unique(pairs, return_index=True, return_counts=True)
    pair, count = (values[first.argsort()] for values in (pair, count))
    places, signs = zip(*map(hashed, known.tolist()), strict=True)
    roots = np.array([number**0.5 for number in range(int(count.max()) + 1)], np.float32)
    row, gram = np.divmod(pair, len(known))
    np.add.at(vectors, (row, np.array(places)[gram]), roots[count] * np.array(signs, np.float32)[gram])


class NgramRows:
    """The vectors of many texts without their zeros, 6 bytes for each other number; rows (k, 1024) when asked for."""

    def __init__(self, texts: Sequence[str]) -> None:
        import numpy as np

        places, values, counts = [], [], []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            dense = ngram_vectors(texts[start : start + TEXTS_AT_ONCE])
            row, place = dense.nonzero()
            places.append(place.astype(np.uint16))
            values.append(dense[row, place])
            counts.append(np.bincount(row, minlength=len(dense)))
        self.shape = (len(texts), DIMENSION)
        self._places, self._values = np.concatenate(places), np.concatenate(values)
        self._ends = np.concatenate([[0], np.concatenate(counts).cumsum()])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: "slice | np.ndarray") -> "np.ndarray":
        """The rows of a slice, or of these numbers (k,), with their zeros: (k, 1024)."""
        import numpy as np

        numbers = np.arange(len(self))[rows]
        starts = self._ends[numbers]
        counts = self._ends[numbers + 1] - starts
        before = counts.cumsum() - counts
        flat = np.arange(counts.sum()) + np.repeat(starts - before, counts)
        found = np.zeros((len(numbers), DIMENSION), np.float32)
        found[np.repeat(np.arange(len(numbers)), counts), self._places[flat]] = self._values[flat]
        return found
