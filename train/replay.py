"""Against forgetting: general conversations that are learned again, some in every optimizer step."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from train.dataset import TokenDataset


class Joined:
    """The training conversations and, after them, those that are replayed, as one data set."""

    def __init__(self, train: TokenDataset, replay: TokenDataset) -> None:
        self.train, self.replay = train, replay

    def __len__(self) -> int:
        return len(self.train) + len(self.replay)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return self.train[i] if i < len(self.train) else self.replay[i - len(self.train)]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 [samples]."""
        return np.concatenate([self.train.lengths, self.replay.lengths])


def replayed(size: int, ratio: float) -> int:
    """How many of a step's `size` conversations are replayed: the ratio of them, one at least, and never all."""
    return min(size - 1, max(1, round(size * ratio))) if ratio else 0


class ReplayOrder(torch.utils.data.Sampler[int]):
    """The replayed conversations of an epoch, without an end: all of them in an order of the epoch's, then in another.

    It depends on seed and epoch alone, so that a resumed epoch has the order of the undisturbed one. The indices are
    those of `Joined`.
    """

    def __init__(self, data: Joined, seed: int, epoch: Callable[[], int]) -> None:
        self.data, self.seed, self.epoch = data, seed, epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch() + 500_009)
        while True:
            for i in torch.randperm(len(self.data.replay), generator=generator).tolist():
                yield len(self.data.train) + i
