"""Attention over a shared prefix and a row's own keys, in 16 bits on a processor, against one exact softmax."""

import pytest
import torch

from llmops.generation import shared_prefix
from llmops.generation.shared_prefix import NOTHING, Prefix, Segment

HEADS, KV_HEADS, D = 6, 2, 16


class Layer(torch.nn.Module):
    """What a model's attention knows of itself."""

    layer_idx = 0


def exactly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, prefix: Prefix
) -> torch.Tensor:
    """One row's attention in float64: its prefix's keys, then its own; each head with keys of its own."""
    keys, values = key.double(), value.double()
    seen = mask
    if prefix.length:
        shared_keys, shared_values = (tensor.double() for tensor in prefix.layers[0])
        keys, values = torch.cat([shared_keys, keys], dim=1), torch.cat([shared_values, values], dim=1)
        seen = torch.cat([torch.ones(len(mask), prefix.length, dtype=torch.bool), mask], dim=1)
    keys, values = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=0) for tensor in (keys, values))
    scores = (query.double() @ keys.transpose(1, 2) * D**-0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ values).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 5])
def test_parts_are_one_softmax(dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with one prefix, with another one, and with none, the first padded on the left."""
    torch.manual_seed(0)
    columns, rows = 9, 5

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    long, short = (Prefix([0] * n, [(random(KV_HEADS, n, D), random(KV_HEADS, n, D))]) for n in (70, 3))
    segments: list[Segment] = [(0, 2, long), (2, 3, short), (3, 5, NOTHING)]
    query = random(rows, HEADS, length, D)
    key, value = random(rows, KV_HEADS, columns + 4, D)[:, :, :columns], random(rows, KV_HEADS, columns, D)
    mask = torch.ones(rows, length, columns, dtype=torch.bool).tril(columns - length)
    mask[0, :, :3] = False

    def found() -> torch.Tensor:
        return shared_prefix.attention(Layer(), query, key, value, None, segments, mask)[0].double()

    prefixes = [long, long, short, NOTHING, NOTHING]
    exact = torch.stack([exactly(query[k], key[k], value[k], mask[k], prefixes[k]) for k in range(rows)])
    fused = found()
    monkeypatch.setattr(shared_prefix, "FLASH", None)
    worst = ((fused - exact).abs().max(), (found() - exact).abs().max())
    assert worst[0] <= worst[1]
    assert worst[0] < exact.abs().max() * torch.finfo(dtype).eps
