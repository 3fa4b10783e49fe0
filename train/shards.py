"""DeepSpeed's ZeRO states of all processes of a checkpoint, read by the names of weights.

ZeRO cuts what an optimizer keeps of a weight (the fp32 copy, Adam's averages) into a part for each process. The form on
disk, as DeepSpeed writes it (`deepspeed/checkpoint/ds_to_universal.py` reads it alike):
stages 1 and 2: the weights of a parameter group end to end, cut by process without regard to where a weight ends;
`param_slice_mappings` says which weights a part holds, and where. Stage 3: every weight cut by process, in parts of
ceil(numel / processes), the last one padded; a part's weights stand end to end in the order of `param_shapes`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from llmops.console import UserError

FP32 = "fp32"  # the key of the weights themselves, beside those of the optimizer's states
NUMBERS = "optimizer_state_dict"


@dataclass(frozen=True)
class Piece:
    """[start, start + count) of a flat group of process `rank` is the weight from its element `place` on."""

    place: int
    count: int
    rank: int
    group: int
    start: int


def newest(checkpoint: Path) -> Path:
    """DeepSpeed's folder in a checkpoint, which its file `latest` names."""
    return checkpoint / Path((checkpoint / "latest").read_text(encoding="utf-8").strip()).name


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is of stage 3, where weights are cut one by one."""
    return any(newest(checkpoint).glob("zero_pp_rank_0_*model_states.pt"))


def has_bias_correction(checkpoint: Path) -> bool:
    """Whether a checkpoint's states are of an Adam of DeepSpeed's, which has this setting; torch's has not."""
    found = sorted(newest(checkpoint).glob("*zero_pp_rank_0_*optim_states.pt"))
    if not found:
        return False
    state = torch.load(found[0], map_location="cpu", weights_only=True, mmap=True)[NUMBERS]
    inner = state.get(NUMBERS, state.get("base_optimizer_state"))
    return isinstance(inner, dict) and any("bias_correction" in group for group in inner["param_groups"])


class Shards:
    """The states of `processes` processes in a checkpoint. Tensors are mapped from their files, read when asked for.

    Within `states.loadable()` only. Raises UserError for states that are not those of so many processes.
    """

    def __init__(self, checkpoint: Path, processes: int) -> None:
        self.checkpoint, self.processes = checkpoint, processes
        self.folder = newest(checkpoint)
        self.states: list[dict[str, Any]] = [self._load(f"*zero_pp_rank_{i}_*optim_states.pt")[NUMBERS]
                                             for i in range(processes)]  # fmt: skip
        self.stage = int(self.states[0]["zero_stage"])
        self.whole = self.stage == 3
        self.model = self._load("zero_pp_rank_0_*model_states.pt" if self.whole else "mp_rank_*model_states.pt")
        self.pieces: dict[str, list[Piece]] = {}
        for piece_name, piece in self._pieces_of_whole() if self.whole else self._pieces_of_slices():
            self.pieces.setdefault(piece_name, []).append(piece)
        self._check()

    def _load(self, pattern: str) -> dict[str, Any]:
        """The one file of this name."""
        found = sorted(self.folder.glob(pattern))
        if len(found) != 1:
            raise self.refused(f"{len(found)} files {pattern} where one should be")
        return torch.load(found[0], map_location="cpu", weights_only=True, mmap=True)

    def refused(self, why: str) -> UserError:
        """The error of a checkpoint that cannot be cut anew."""
        return UserError(
            f"{self.checkpoint} cannot go on with another number of processes ({why}); start with {self.processes} "
            "again, or begin anew with --overwrite_output_path true"
        )

    def _pieces_of_slices(self) -> Iterator[tuple[str, Piece]]:
        """Stages 1 and 2: what a process has of a weight follows what the process before it has."""
        ends: dict[str, int] = {}
        for rank, state in enumerate(self.states):
            for group, slices in enumerate(state["param_slice_mappings"]):
                for name, part in slices.items():
                    place = ends.get(name, 0)
                    ends[name] = place + part.numel
                    yield name, Piece(place, part.numel, rank, group, part.start)

    def _pieces_of_whole(self) -> Iterator[tuple[str, Piece]]:
        """Stage 3: every process has an equal part of every weight."""
        for group, shapes in enumerate(self.model["param_shapes"]):
            start = 0
            for name, shape in shapes.items():
                numel = prod(shape)
                size = -(-numel // self.processes)
                for rank in range(self.processes):
                    count = min(size, numel - rank * size)
                    if count > 0:
                        yield name, Piece(rank * size, count, rank, group, start)
                start += size

    def _check(self) -> None:
        """Whether the states have the sizes that their tables promise."""
        for name, shape in ((name, shape) for shapes in self.model["param_shapes"] for name, shape in shapes.items()):
            if sum(piece.count for piece in self.pieces.get(name, [])) != prod(shape):
                raise self.refused(f"the parts of {name} are not the whole of it")
        for name, pieces in self.pieces.items():
            for piece in pieces:
                ends = [self._flat(piece.rank, piece.group, key).numel() for key in (FP32, *self.keys(piece.group))]
                if piece.start < 0 or piece.start + piece.count > min(ends):
                    raise self.refused(f"a state is shorter than its table says, at {name}")

    def _optimizer(self, rank: int) -> dict[str, Any]:
        """The state dict of the optimizer that ZeRO wraps, as torch's optimizers have it."""
        found = self.states[rank][NUMBERS if self.whole else "base_optimizer_state"]
        return found if isinstance(found, dict) else {"state": dict(enumerate(found)), "param_groups": []}

    def _flat(self, rank: int, group: int, key: str) -> torch.Tensor:
        if key == FP32:
            return self.states[rank]["fp32_flat_groups" if self.whole else "single_partition_of_fp32_groups"][group]
        found = self._optimizer(rank)["state"].get(group, {}).get(key)
        if found is None:
            raise self.refused(f"process {rank} has no {key}")
        return found

    def group_of(self, name: str) -> int:
        """The flat group that holds a weight. Raises UserError when none does."""
        if name not in self.pieces:
            raise self.refused(f"it has no state of {name}")
        return self.pieces[name][0].group

    def keys(self, group: int) -> list[str]:
        """The optimizer's states that are a number for each element of a weight, such as exp_avg."""
        state = self._optimizer(0)["state"].get(group, {})
        return [key for key, value in state.items() if torch.is_tensor(value) and value.dim()]

    def dtype(self, group: int, key: str) -> torch.dtype:
        """The number format of a state."""
        return self._flat(0, group, key).dtype

    def scalars(self, group: int) -> dict[str, Any]:
        """The optimizer's states that are one number for a group, such as step."""
        state = self._optimizer(0)["state"].get(group, {})
        return {key: value for key, value in state.items() if not (torch.is_tensor(value) and value.dim())}

    def settings(self) -> list[dict[str, Any]]:
        """What the optimizer's parameter groups are trained with: learning rate, betas and so on; none from a list."""
        groups = self._optimizer(0)["param_groups"]
        return [{key: value for key, value in group.items() if key != "params"} for group in groups]

    def copy(self, key: str, name: str, place: int, into: torch.Tensor) -> None:
        """Fill `into` (1-dimensional) with a weight's state from its element `place` on. Reads no more than that."""
        end = place + into.numel()
        self.group_of(name)
        for piece in self.pieces[name]:
            first, last = max(place, piece.place), min(end, piece.place + piece.count)
            if first < last:
                start = piece.start + first - piece.place
                part = self._flat(piece.rank, piece.group, key)[start : start + last - first]
                into[first - place : last - place].copy_(part)
