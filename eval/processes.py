"""Several processes that share the samples of a run, one GPU each, as torchrun starts them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from llmops import process_group
from llmops.console import UserError

LONGEST_WAIT = timedelta(days=7)  # processes wait for the slowest one


class Processes:
    """The processes that share the samples (RANK and WORLD_SIZE, as torchrun sets them); one by itself otherwise."""

    def __init__(self) -> None:
        try:
            self.rank, self.count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
            self.local_rank = int(os.environ.get("LOCAL_RANK", str(self.rank)))
        except ValueError as error:
            raise UserError(f"RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers ({error})") from error

    @property
    def first(self) -> bool:
        """Whether this one reports."""
        return self.rank == 0

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Within this context they can exchange answers; over gloo, because only texts travel."""
        if self.count == 1:
            yield
            return
        if "MASTER_ADDR" not in os.environ:
            raise UserError("WORLD_SIZE is set but not MASTER_ADDR; start several processes with torchrun")
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=process_group.init_method(), timeout=LONGEST_WAIT)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def share(self, items: Sequence[int]) -> Sequence[int]:
        """This process's part: neighbours stay together, because they share prompt beginnings."""
        size = -(-len(items) // self.count)
        return items[self.rank * size : (self.rank + 1) * size]

    def gather(self, mine: dict[int, Any]) -> dict[int, Any]:
        """What all processes have, by index."""
        if self.count == 1:
            return mine
        import torch.distributed as dist

        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, mine)
        return {index: value for part in everyone for index, value in part.items()}
