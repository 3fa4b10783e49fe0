"""Conversations to batches: packed with shared prompt prefixes, or padded. Both hold the same targets.

A batch is a dict:
    input_ids      int64 [rows, T]
    position_ids   int64 [rows, T]
    attention_mask int64 [rows, T]      padded batches only
    layout         attention.Layout     packed batches only (rows = 1)
    rows, columns  int64 [n]            where the logits stand that predict each learned token
    kept           int64 [m]            padded batches only: the columns in `columns`, each once, in order
    kept_columns   int64 [n]            padded batches only: where each of `columns` stands in `kept`
    labels         int64 [n]            the learned tokens, aligned with rows and columns (not shifted)
    samples        int64 [n]            which of the conversations each belongs to
    tokens         int                  tokens of the conversations, as a plain padding-free run would process them
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from train.attention import BLOCK_TOKENS, Layout, Node, compile_errors, does_not_run

Sample = dict[str, np.ndarray]
CACHED = 1 << 19  # logits that are worked on together
MIN_SHARED = 16  # a shorter common beginning is not worth a branch


def first_learned(sample: Sample) -> int:
    """Index of the first learned token, at least 1; the tokens before it are the prompt."""
    return max(1, int(np.argmax(sample["learned"])))


class PackedCollator:
    """One row without padding; equal prompt beginnings are stored once."""

    def __init__(
        self, share_prefixes: bool = True, block_tokens: int = BLOCK_TOKENS, flex: bool = False, pad_id: int = 0
    ) -> None:
        self.share_prefixes = share_prefixes
        self.block_tokens = block_tokens
        self.flex = flex
        self.pad_id = pad_id

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        builder = _TreeBuilder(samples, self.share_prefixes)
        roots = builder.build()
        columns, labels = [], []
        for sample, path in zip(samples, builder.paths, strict=True):
            places = np.concatenate([np.arange(start, stop) for start, stop in path])
            targets = np.flatnonzero(sample["learned"][1:]) + 1
            columns.append(places[targets - 1])
            labels.append(sample["ids"][targets])
        column = torch.from_numpy(np.concatenate(columns))
        layout = Layout(roots, builder.length, self.block_tokens, self.flex)
        more = len(layout.end) - builder.length  # FlexAttention's tiles are full
        ids = np.concatenate([*builder.ids, np.full(more, self.pad_id)]).astype(np.int64)
        positions = np.concatenate([*builder.positions, np.zeros(more, np.int64)])
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "position_ids": torch.from_numpy(positions)[None],
            "layout": layout,
            "rows": torch.zeros_like(column),
            "columns": column,
            "labels": torch.from_numpy(np.concatenate(labels).astype(np.int64)),
            "samples": numbered(labels),
            "tokens": sum(len(sample["ids"]) for sample in samples),
        }


class _TreeBuilder:
    """Lays out samples as a tree in depth-first order; `paths[i]` are the token runs of sample i from the root down."""

    def __init__(self, samples: Sequence[Sample], share: bool) -> None:
        self.samples = samples
        self.paths: list[list[tuple[int, int]]] = [[] for _ in samples]
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.length = 0
        prompts = [sample["ids"][: first_learned(sample)] for sample in samples]
        # big-endian bytes sort like the token sequences, so equal beginnings become neighbours
        self.order = list(range(len(samples)))
        if share:
            self.order.sort(key=lambda i: prompts[i].astype(">u4").tobytes())
        pairs = zip(self.order, self.order[1:], strict=False)
        self.common = [common_length(prompts[a], prompts[b]) if share else 0 for a, b in pairs]

    def build(self) -> list[Node]:
        """The roots of the tree."""
        return self._children(0, len(self.order), 0, [])

    def _children(self, low: int, high: int, depth: int, path: list[tuple[int, int]]) -> list[Node]:
        """Nodes for the sorted samples [low, high), which share their first `depth` tokens."""
        nodes = []
        start = low
        for i in range(low, high):
            if i + 1 == high or self.common[i] - depth < MIN_SHARED:  # too little more in common with the next one
                nodes.append(self._node(start, i + 1, depth, path))
                start = i + 1
        return nodes

    def _node(self, low: int, high: int, depth: int, path: list[tuple[int, int]]) -> Node:
        sample = self.samples[self.order[low]]
        alone = high - low == 1
        stop = len(sample["ids"]) if alone else min(self.common[low : high - 1])
        node = Node(self.length, self.length + stop - depth)
        self.ids.append(sample["ids"][depth:stop])
        self.positions.append(np.arange(depth, stop))
        self.length = node.stop
        path = [*path, (node.start, node.stop)]
        if alone:
            self.paths[self.order[low]] = path
        else:
            node.children = self._children(low, high, stop, path)
        node.end = self.length
        return node


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning of two token sequences."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


class PaddedCollator:
    """One row per conversation, padded at the end (or at the beginning) with `pad_id`."""

    def __init__(self, pad_id: int, left: bool = False) -> None:
        self.pad_id = pad_id
        self.left = left

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        longest = max(len(sample["ids"]) for sample in samples)
        shape = (len(samples), longest)
        ids, mask, positions = (
            np.full(shape, self.pad_id, np.int64),
            np.zeros(shape, np.int64),
            np.zeros(shape, np.int64),
        )
        rows, columns, labels = [], [], []
        for i, sample in enumerate(samples):
            length = len(sample["ids"])
            offset = longest - length if self.left else 0
            ids[i, offset : offset + length] = sample["ids"]
            mask[i, offset : offset + length] = 1
            positions[i, offset : offset + length] = np.arange(length)
            targets = np.flatnonzero(sample["learned"][1:]) + 1
            rows.append(np.full(len(targets), i))
            columns.append(targets - 1 + offset)
            labels.append(sample["ids"][targets])
        kept, kept_columns = np.unique(np.concatenate(columns), return_inverse=True)
        return {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "attention_mask": torch.from_numpy(mask),
            "rows": torch.from_numpy(np.concatenate(rows)),
            "columns": torch.from_numpy(np.concatenate(columns)),
            "kept": torch.from_numpy(kept),
            "kept_columns": torch.from_numpy(kept_columns),
            "labels": torch.from_numpy(np.concatenate(labels).astype(np.int64)),
            "samples": numbered(labels),
            "tokens": sum(len(sample["ids"]) for sample in samples),
        }


def numbered(labels: Sequence[np.ndarray]) -> torch.Tensor:
    """The number of its conversation for every learned token, int64 [n]."""
    return torch.from_numpy(np.repeat(np.arange(len(labels)), [len(one) for one in labels]))


def target_losses(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Cross entropy of every learned token, float32 [n]; logits are computed at these positions only."""
    return token_losses(target_logits(model, batch), batch["labels"])


def target_logits(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The logits [n, V] that predict the learned tokens."""
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask", "layout") if key in batch}
    if "layout" in batch:
        return model(**inputs, use_cache=False, logits_to_keep=batch["columns"]).logits[0]
    if accepts_logits_to_keep(model):
        kept, column = batch["kept"], batch["kept_columns"]
        return model(**inputs, use_cache=False, logits_to_keep=kept).logits[batch["rows"], column]
    return model(**inputs, use_cache=False).logits[batch["rows"], batch["columns"]]


def right_answers(logits: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """How many conversations have the likeliest token at every learned place: those that greedy decoding would write.

    A scalar on the logits' device. Decoding goes another way at its first wrong token, so this is exact.
    """
    wrong = (logits.argmax(-1) != batch["labels"]).long()
    return (torch.zeros_like(wrong).index_add_(0, batch["samples"], wrong)[: int(batch["samples"][-1]) + 1] == 0).sum()


@cache
def why_no_loss_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a GPU's loss is computed some rows at a time, or None when one kernel does it.

    A tiny forward and backward pass tells: Triton compiles its start with the machine's C compiler.
    """
    from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

    with torch.inference_mode(False), torch.enable_grad():
        logits = torch.zeros(2, 16, device=device, dtype=dtype, requires_grad=True)
        labels = torch.zeros(2, device=device, dtype=torch.int64)
        try:
            chunked_cross_entropy(logits, labels, reduction="none", backend="triton").sum().backward()
        except compile_errors() as error:
            return does_not_run(error)
    return None


def cross_entropy_name(device: torch.device, dtype: torch.dtype) -> str:
    """How `token_losses` computes where gradients are wanted, for people."""
    if device.type != "cpu":
        reason = why_no_loss_kernel(device, dtype)
        return f"some rows at a time, because {reason}" if reason else "one kernel"
    return "some rows at a time" if dtype == torch.float32 else "torch's"


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy in float32 [n] of logits [n, V].

    On a GPU in one kernel that keeps no copy of the logits in float32 (14 bytes a logit become 4) and computes the
    softmax anew in the backward pass; without a C compiler, and on a CPU, some rows at a time.
    """
    if logits.device.type == "cpu":
        if logits.requires_grad and logits.dtype == torch.float32:
            return CrossEntropy.apply(logits, labels)
        return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

    backend = "torch" if why_no_loss_kernel(logits.device, logits.dtype) else "triton"
    return chunked_cross_entropy(logits, labels, reduction="none", backend=backend)


class CrossEntropy(torch.autograd.Function):
    """Cross entropy in rows that fit into the cache; the logits' gradient is made beside it, in one array.

    torch's own has four (log-softmax, two gradients and a zeroed one), and making them takes most of its time.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Losses [n] of float32 logits [n, V]."""
        slopes, losses = torch.empty_like(logits), logits.new_empty(len(labels))
        rows = max(1, CACHED // logits.shape[1])
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            slope = torch.log_softmax(logits[part], 1, out=slopes[part])
            label = labels[part, None]
            losses[part] = -slope.gather(1, label)[:, 0]
            slope.exp_().scatter_add_(1, label, slope.new_full((len(slope), 1), -1.0))
        ctx.slopes = slopes
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The slopes, weighted in place: a loss is gone through once."""
        slopes, ctx.slopes = ctx.slopes, None
        if slopes is None:
            raise RuntimeError("the backward pass of this loss ran before")
        return slopes.mul_(gradient[:, None]), None


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on a device; from page-locked memory the copies do not wait for the GPU."""
    return {key: value.to(device, non_blocking=True) if hasattr(value, "to") else value for key, value in batch.items()}


def accepts_logits_to_keep(model: torch.nn.Module) -> bool:
    """Whether the wrapped causal model computes logits at chosen positions."""
    import inspect

    while True:
        wrapped: Any = getattr(model, "module", None)
        adapted: Any = getattr(model, "get_base_model", None)
        if wrapped is None and adapted is None:
            return "logits_to_keep" in inspect.signature(model.forward).parameters
        model = adapted() if wrapped is None else wrapped
