"""Several processes that share the samples of a run, one GPU each, on one machine or on several."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from llmops.console import UserError
from llmops.machine import process_group
from llmops.machine.peers import Peers, watch_launcher

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=7)  # processes wait for the slowest one
TO_NOTICE = 60.0  # seconds for a pass of the model, after which a process sees that a machine is gone


class Processes:
    """The processes that share the samples (RANK, WORLD_SIZE, as the launcher sets them); one by itself otherwise."""

    def __init__(self) -> None:
        try:
            self.rank, self.count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
            self.local_rank = int(os.environ.get("LOCAL_RANK", str(self.rank)))
        except ValueError as error:
            raise UserError(f"RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers ({error})") from error
        self.peers: Peers | None = None

    @property
    def first(self) -> bool:
        """Whether this one reports."""
        return self.rank == 0

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Within this context they can exchange answers; over gloo, because only texts travel."""
        with watch_launcher():
            if self.count == 1:
                yield
                return
            if "MASTER_ADDR" not in os.environ:
                raise UserError("WORLD_SIZE is set but not MASTER_ADDR; start several processes with NUM_PROCESSES")
            import torch.distributed as dist

            with process_group.meeting():
                dist.init_process_group("gloo", init_method=process_group.init_method(), timeout=LONGEST_WAIT)
            with Peers("the answers until then are kept", TO_NOTICE) as self.peers:
                self.peers.begin()
                yield
            dist.destroy_process_group()

    def look(self) -> None:
        """Raise the end of the run when another machine of it is gone."""
        if self.peers and self.peers.lost:
            raise self.peers.end_of_run()

    def share(self, items: Sequence[int]) -> Sequence[int]:
        """This process's part: neighbours stay together, because they share prompt beginnings."""
        size = -(-len(items) // self.count)
        return items[self.rank * size : (self.rank + 1) * size]

    def from_first(self, find: Callable[[], T]) -> T:
        """What the first process finds, in every process."""
        if self.count == 1:
            return find()
        import torch.distributed as dist

        found: list[Any] = [None]
        if self.first:
            found[0] = find()
        self._meet()
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def gather(self, mine: dict[int, Any]) -> dict[int, Any]:
        """What all processes have, by index."""
        if self.count == 1:
            return mine
        import torch.distributed as dist

        self._meet()
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, mine)
        return {index: value for part in everyone for index, value in part.items()}

    def _meet(self) -> None:
        """Wait for every process, and look meanwhile whether all machines are there."""
        import torch
        import torch.distributed as dist

        waiting = dist.all_reduce(torch.zeros(1), async_op=True)
        while not waiting.is_completed():
            self.look()
            time.sleep(0.02)
        waiting.wait()
