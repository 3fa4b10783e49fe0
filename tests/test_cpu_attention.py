"""Attention by plain products beside torch's own with the whole mask, forward and backward, on random trees."""

import random

import pytest
import torch

from train import cpu_attention
from train.attention import Layout, Node
from train.cpu_attention import BlockAttention, is_faster, parts_of


def random_tree(draw: random.Random, start: int, most: int, depth: int) -> Node:
    """A node with some children, in depth-first order."""
    stop = start + draw.randint(1, most)
    node, end = Node(start, stop), stop
    for _ in range(draw.randint(0, 3) if depth else 0):
        child = random_tree(draw, end, most, depth - 1)
        node.children.append(child)
        end = child.end
    node.end = end
    return node


def seen(end: torch.Tensor) -> torch.Tensor:
    """[T, T]: q sees k when k <= q < end[k]."""
    place = torch.arange(len(end))
    return (place[None, :] <= place[:, None]) & (place[:, None] < end[None, :])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_products_are_the_attention_of_the_whole_mask(
    heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, number = random.Random(heads), torch.Generator().manual_seed(heads)
    for case in range(12):
        monkeypatch.setattr(cpu_attention, "MOST_QUERIES", draw.choice([1, 7, 32, 128]))
        monkeypatch.setattr(cpu_attention, "SCORES", draw.choice([1, 1 << 12, 1 << 22]))
        roots, length = [], 0
        for _ in range(draw.randint(1, 4)):
            roots.append(random_tree(draw, length, draw.choice([3, 40, 150]), draw.randint(0, 2)))
            length = roots[-1].end
        layout = Layout(roots, length, draw.choice([8, 64, 256]))
        shapes = ((heads, length, 16), (kv_heads, length, 16), (kv_heads, length, 24))
        inputs = [torch.randn(shape, generator=number).requires_grad_() for shape in shapes]
        ours = BlockAttention.apply(*inputs, layout.blocks, 0.3)
        wide = [inputs[0], *(one.repeat_interleave(heads // kv_heads, 0) for one in inputs[1:])]
        theirs = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=seen(layout.end), scale=0.3)
        above = torch.randn(ours.shape, generator=number)
        found = [ours, *torch.autograd.grad(ours, inputs, above)]
        expected = [theirs, *torch.autograd.grad(theirs, inputs, above)]
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() <= 2e-6 * other.abs().max().clamp(min=1), (case, length)


def test_a_part_is_as_large_as_the_cache_and_no_query_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout([Node(0, 900, 900), Node(900, 930, 930)], 930)
    parts = list(parts_of(layout.blocks, 8))
    assert [part.start for part in parts] == [0, 128, 256, 384, 512, 640, 768, 896, 900]
    assert parts[-1].runs == [(900, 930)]
    monkeypatch.setattr(cpu_attention, "SCORES", 8 * 64 * 500)
    counts = [part.stop - part.start for part in parts_of(layout.blocks, 8)]
    assert sum(counts) == 930
    assert min(counts[:5]) >= 32
    assert max(counts) == 128


def test_long_plain_blocks_other_devices_types_and_dropout_go_another_way() -> None:
    query = torch.zeros(1, 2, 2000, 8)
    short, long = Layout([Node(0, 1024, 1024)], 1024), Layout([Node(0, 1025, 1025)], 1025)
    assert is_faster(query, short.blocks, 0.0)
    assert not is_faster(query, long.blocks, 0.0)
    assert not is_faster(query, short.blocks, 0.1)
    assert not is_faster(query.bfloat16(), short.blocks, 0.0)
    assert not is_faster(query.to("meta"), short.blocks, 0.0)
