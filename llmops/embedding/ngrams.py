"""A baseline that needs no model: hashed character n-grams. It finds similar wording, not similar meaning."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

NAME = "builtin:ngram"
DIMENSION = 1024
LONGEST = 3  # characters


def ngram_vectors(texts: Sequence[str]) -> "np.ndarray":
    """Unit vectors (n, 1024): square roots of the counts of the letters' 1- to 3-grams, hashed with a sign.

    Source of the hashing: Weinberger et al. 2009, Feature Hashing for Large Scale Multitask Learning.
    """
    from zlib import crc32

    import numpy as np

    vectors = np.zeros((len(texts), DIMENSION), np.float32)
    for number, text in enumerate(texts):
        row = vectors[number]
        spelt = "".join(character for character in text.lower() if character.isalnum()) or text
        spelt = f"^{spelt}$"
        grams = Counter(spelt[i : i + n] for n in range(1, LONGEST + 1) for i in range(len(spelt) - n + 1))
        for gram, count in grams.items():
            value = crc32(gram.encode("utf-8", "surrogatepass"))
            row[value % DIMENSION] += count**0.5 * (1 if value >> 31 else -1)
        vectors[number] /= np.linalg.norm(row) or 1
    return vectors
