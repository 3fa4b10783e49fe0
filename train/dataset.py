"""Tokenised conversations on disk: three flat files that are memory-mapped.

A million conversations need no more memory than ten. They stay beside the `datasets` package because the collator asks
for single rows: 5 µs each here, from a Dataset on disk 28 µs as lists and 102 µs as arrays (on the machine that the
figures of docs/speed.md are from).
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llmops import files
from llmops.console import UserError
from llmops.conversations import data_files

FILE_BIT = 40  # of a place: the file's number above it, the line's or row's below


def read_index(folder: Path) -> np.ndarray:
    """`index.npy` of a cache folder. Raises UserError where it does not fit the folder's other files."""
    try:
        index = np.load(folder / "index.npy", allow_pickle=False)
        sizes = [(folder / name).stat().st_size for name in ("ids.bin", "learned.bin")]
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the cache {folder} is damaged ({error}); delete this folder") from error
    whole = index.ndim == 2 and index.shape[1] == 2 and index.dtype == np.int64 and len(index) > 0
    if not whole or sizes != [4 * index[-1, 0], index[-1, 0]] or (np.diff(index[:, 0], prepend=0) < 0).any():
        raise UserError(f"the cache {folder} is damaged (its files do not fit each other); delete this folder")
    return index


class TokenDataset:
    """Tokenised conversations in a folder: `ids.bin` (int32), `learned.bin` (bool), `index.npy`, `meta.json`.

    `index.npy` has shape [samples, 2], int64: where a sample ends in the flat files, and the place it came from.
    Indexing gives {"ids": int32 [length], "learned": bool [length]}.
    """

    def __init__(self, folder: Path, indices: np.ndarray | None = None) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = files.read_object(folder / "meta.json", "the cache", "delete its folder")
        index = read_index(folder)
        self._ends, self.lines = index[:, 0], index[:, 1]
        self._starts = np.concatenate([[0], self._ends[:-1]])
        self.indices = np.arange(len(index)) if indices is None else indices

    @cached_property
    def _flat(self) -> tuple[np.ndarray, np.ndarray]:
        return (
            np.memmap(self.folder / "ids.bin", dtype=np.int32, mode="r"),
            np.memmap(self.folder / "learned.bin", dtype=np.bool_, mode="r"),
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        sample = self.indices[i]
        span = slice(self._starts[sample], self._ends[sample])
        ids, learned = self._flat
        return {"ids": np.array(ids[span]), "learned": np.array(learned[span])}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 [samples]."""
        return (self._ends - self._starts)[self.indices]

    def highest_token(self) -> int:
        """The largest token id of the whole file."""
        return int(self._flat[0].max())

    def learned_tokens(self) -> int:
        """Learned tokens of all samples."""
        return sum(int(self[i]["learned"].sum()) for i in range(len(self)))

    def places(self) -> set[tuple[int, int]]:
        """(number of the file, line or row in it) of every sample."""
        return {divmod(place, 1 << FILE_BIT) for place in self.lines[self.indices].tolist()}

    def place(self, i: int) -> str:
        """Where a sample came from, in words."""
        file, number = divmod(int(self.lines[self.indices[i]]), 1 << FILE_BIT)
        names = self.meta["files"]
        words = f"{data_files.unit_of(Path(names[file]))} {number}"
        return words if len(names) == 1 else f"{names[file]}, {words}"

    def split(self, ratio: float, seed: int) -> tuple["TokenDataset", "TokenDataset"]:
        """(kept, held out): `ratio` of the lines, seeded; the samples of one line stay together."""
        lines = np.unique(self.lines)
        if len(lines) < 2:
            raise UserError(
                f"{', '.join(self.meta['files'])} has one usable line, none to hold out; add lines or give a test file"
            )
        count = min(max(1, round(ratio * len(lines))), len(lines) - 1)
        held = np.random.default_rng(seed).permutation(lines)[:count]
        mask = np.isin(self.lines, held)
        return TokenDataset(self.folder, np.flatnonzero(~mask)), TokenDataset(self.folder, np.flatnonzero(mask))
