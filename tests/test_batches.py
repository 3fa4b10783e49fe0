"""Packed batches with shared prefixes are exact: same loss and gradients as one conversation at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.runtime import chunked_cross_entropy

from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from train import attention, batches
from train.attention import Layout, Node, does_not_run
from train.batches import (
    PackedCollator,
    PaddedCollator,
    Sample,
    first_learned,
    right_answers,
    target_logits,
    target_losses,
    token_losses,
)

Batchable = list[Sample]


def sample(prompt: list[int], *turns: tuple[list[int], list[int]]) -> Sample:
    """A conversation: prompt, then (answer, next question) pairs; answers are learned."""
    ids, learned = list(prompt), [False] * len(prompt)
    for answer, question in turns:
        ids += answer + question
        learned += [True] * len(answer) + [False] * len(question)
    return {"ids": np.asarray(ids, np.int32), "learned": np.asarray(learned)}


def random_samples(shape: str, seed: int = 0) -> Batchable:
    """Batches that exercise every branch of the layout."""
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        return rng.integers(3, 250, count).tolist()

    system, other, nested = tokens(100), tokens(40), tokens(30)
    return {
        "nothing shared": [sample(tokens(int(n)), (tokens(5), [])) for n in rng.integers(2, 60, 6)],
        "one long prefix": [sample(system + tokens(4), (tokens(3), [])) for _ in range(8)],
        "equal prompts": [sample(system, (tokens(4), [])) for _ in range(5)],
        "nested prefixes": [sample(system + nested + tokens(3), (tokens(4), [])) for _ in range(3)]
        + [sample(system + tokens(20), (tokens(4), [])) for _ in range(3)]
        + [sample(other + tokens(2), (tokens(2), []))] * 2,
        "several turns": [
            sample(system, (tokens(6), tokens(7)), (tokens(5), tokens(3)), (tokens(2), [])) for _ in range(4)
        ],
        "single": [sample(tokens(10), (tokens(4), []))],
        "longer than a block": [sample(system * 4 + tokens(3), (tokens(200), [])) for _ in range(3)]
        + [sample(tokens(300), (tokens(90), [])), sample(system * 4, (tokens(9), []))],
    }[shape]  # fmt: skip


SHAPES = (
    "nothing shared",
    "one long prefix",
    "equal prompts",
    "nested prefixes",
    "several turns",
    "single",
    "longer than a block",
)


def loss_and_gradients(model: torch.nn.Module, batches: list[dict]) -> tuple[float, list[torch.Tensor]]:
    """Sum of the target losses over the batches, and the gradients of every weight."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = target_losses(model, batch).sum()
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_tokens", [8, 256])
def test_packing_is_exact(checkpoints: dict[str, Path], architecture: str, shape: str, block_tokens: int) -> None:
    model = ChatModel(Checkpoint(checkpoints[architecture])).weights(torch.float32).train()
    samples = random_samples(shape)
    alone = [PaddedCollator(0)([one]) for one in samples]
    expected_loss, expected = loss_and_gradients(model, alone)
    model.set_attn_implementation(attention.NAME)
    for collator in (
        PackedCollator(block_tokens=block_tokens),
        PackedCollator(share_prefixes=False, block_tokens=block_tokens),
    ):
        loss, found = loss_and_gradients(model, [collator(samples)])
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm().clamp(min=1e-6)


def test_the_plain_loss_is_the_models_own(checkpoints: dict[str, Path]) -> None:
    """Our target losses against transformers' own label handling, full logits and shifting included."""
    model = ChatModel(Checkpoint(checkpoints["llama"])).weights(torch.float32).eval()
    samples = random_samples("several turns")
    with torch.no_grad():
        ours = target_losses(model, PaddedCollator(0)(samples)).mean().item()
        longest = max(len(s["ids"]) for s in samples)
        ids = torch.zeros(len(samples), longest, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for i, one in enumerate(samples):
            n = len(one["ids"])
            ids[i, :n], mask[i, :n] = torch.from_numpy(one["ids"]), 1
            labels[i, :n] = torch.where(
                torch.from_numpy(one["learned"]), torch.from_numpy(one["ids"].astype(np.int64)), -100
            )
        theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_right_answers_are_what_greedy_decoding_writes(checkpoints: dict[str, Path]) -> None:
    """Against transformers' generate: answers that it wrote, and the same with one token changed."""
    model = ChatModel(Checkpoint(checkpoints["llama"])).weights(torch.float32).eval()
    samples, expected = [], []
    for k, plain in enumerate(random_samples("one long prefix")):
        prompt = plain["ids"][: first_learned(plain)].tolist()
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=[])[0]
        answer = whole[len(prompt) :].tolist()
        if k % 3 == 1:
            answer[k % 6] = (answer[k % 6] + 1) % 250
        samples.append(sample(prompt, (answer, [])))
        expected.append(k % 3 != 1)
    for collator in (PackedCollator(), PaddedCollator(0), PaddedCollator(0, left=True)):
        packed = isinstance(collator, PackedCollator)
        model.set_attn_implementation(attention.NAME if packed else "sdpa")
        with torch.no_grad():
            batch = collator(samples)
            assert right_answers(target_logits(model, batch), batch) == sum(expected)
            for one, right in zip(samples, expected, strict=True):
                batch = collator([one])
                assert right_answers(target_logits(model, batch), batch) == right


def test_left_padding_gives_the_same_losses(checkpoints: dict[str, Path]) -> None:
    model = ChatModel(Checkpoint(checkpoints["llama"])).weights(torch.float32).eval()
    samples = random_samples("nothing shared")
    with torch.no_grad():
        right, left = (target_losses(model, PaddedCollator(0, left=left)(samples)) for left in (False, True))
    assert torch.allclose(left, right, rtol=1e-5)


def test_shared_prefix_is_stored_once() -> None:
    samples = random_samples("one long prefix")
    packed = PackedCollator()(samples)
    alone = sum(len(s["ids"]) for s in samples)
    assert packed["input_ids"].shape[1] == alone - 100 * (len(samples) - 1)
    assert packed["tokens"] == alone
    assert len(packed["labels"]) == sum(int(s["learned"].sum()) for s in samples)


def test_short_common_beginnings_are_not_shared() -> None:
    samples = [sample([1, 2, 3, i], ([9], [])) for i in range(4, 8)]
    assert PackedCollator()(samples)["input_ids"].shape[1] == 20


def test_layout_blocks_see_what_the_tree_says() -> None:
    """Every (query, key) pair against the definition: the same node or an ancestor, not later."""
    leaf_a, leaf_b = Node(6, 9, 9), Node(9, 12, 12)
    inner = Node(4, 6, 12, [leaf_a, leaf_b])
    root = Node(0, 4, 15, [inner, Node(12, 15, 15)])
    other = Node(15, 20, 20)
    paths = {(0, 4): [0], (4, 6): [0, 4], (6, 9): [0, 4, 6], (9, 12): [0, 4, 9], (12, 15): [0, 12], (15, 20): [15]}
    parents = {token: path for (start, stop), path in paths.items() for token in range(start, stop)}
    for block_tokens in (1, 4, 8, 100):
        layout = Layout([root, other], 20, block_tokens)
        seen = torch.zeros(20, 20, dtype=torch.bool)
        for block in layout.blocks:
            keys = [k for a, b in block.runs for k in range(a, b)] + list(range(block.start, block.stop))
            mask = block.mask
            if mask is None:
                mask = torch.ones(block.stop - block.start, len(keys), dtype=torch.bool).tril(
                    len(keys) - (block.stop - block.start)
                )
            for row, q in enumerate(range(block.start, block.stop)):
                for column, k in enumerate(keys):
                    seen[q, k] = mask[row, column]
        for q in range(20):
            for k in range(20):
                assert seen[q, k] == (k <= q and parents[k][-1] in parents[q]), (block_tokens, q, k)


def test_models_that_cannot_be_packed_are_told_apart(checkpoints: dict[str, Path]) -> None:
    model = ChatModel(Checkpoint(checkpoints["qwen2"])).weights(torch.float32)
    assert attention.supports_packing(model) is None
    model.config.layer_types = ["sliding_attention", "full_attention"]
    assert "sliding_attention" in str(attention.supports_packing(model))


def test_a_model_with_sinks_is_not_packed() -> None:
    """transformers hands a layer's sinks to its attention, which SDPA does not know: packed rows would lose them."""
    from transformers import GraniteSWAConfig, GraniteSWAForCausalLM

    torch.manual_seed(0)
    config = GraniteSWAConfig(
        vocab_size=250, layer_types=["full_attention"], hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GraniteSWAForCausalLM(config).eval()
    torch.nn.init.constant_(model.model.layers[0].self_attn.sinks, 8)
    samples = random_samples("nested prefixes")
    alone = torch.cat([target_losses(model, PaddedCollator(0)([one])) for one in samples])
    assert attention.supports_packing(model) == "its attention is more than SDPA computes"
    model.set_attn_implementation(attention.NAME)
    assert not torch.allclose(target_losses(model, PackedCollator()(samples)), alone, rtol=1e-3)


def test_cross_entropy_in_the_cache_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(37, 50, generator=draw) * 5, torch.randint(50, (37,), generator=draw)
    weights = torch.rand(37, generator=draw)
    for cached in (1, 200, 1 << 19):
        monkeypatch.setattr(batches, "CACHED", cached)
        found = []
        for losses in (token_losses, lambda x, y: torch.nn.functional.cross_entropy(x, y, reduction="none")):
            given = logits.clone().requires_grad_()
            loss = losses(given, labels)
            (gradient,) = torch.autograd.grad((loss * weights).sum(), given)
            found.append((loss.detach(), gradient))
        for one, other in zip(*found, strict=True):
            assert (one - other).abs().max() < 2e-6


def test_a_loss_is_gone_through_once() -> None:
    loss = token_losses(torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran before"):
        loss.backward()


def test_a_loss_kernel_that_cannot_be_compiled_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """On no real device, with a kernel that a probe finds here or not."""
    asked = []

    def compiled(works: bool) -> None:
        def fake(logits: torch.Tensor, labels: torch.Tensor, reduction: str, backend: str) -> torch.Tensor:
            asked.append(backend)
            if backend == "triton" and not works:
                raise RuntimeError("Failed to find C compiler.\nMore of it")
            return logits.sum(1)

        monkeypatch.setattr(chunked_cross_entropy, "chunked_cross_entropy", fake)
        batches.why_no_loss_kernel.cache_clear()

    meta = torch.device("meta")
    logits, labels = torch.zeros(3, 5, device=meta, dtype=torch.bfloat16), torch.zeros(3, device=meta).long()
    compiled(works=False)
    with torch.inference_mode():  # an evaluation comes first
        token_losses(logits, labels)
        token_losses(logits, labels)
    assert asked == ["triton", "torch", "torch"]
    reason = "it does not run here (RuntimeError: Failed to find C compiler.)"
    assert batches.cross_entropy_name(meta, torch.bfloat16) == f"some rows at a time, because {reason}"
    asked.clear()
    compiled(works=True)
    token_losses(logits, labels)
    assert asked == ["triton", "triton"]
    assert batches.cross_entropy_name(meta, torch.bfloat16) == "one kernel"
    batches.why_no_loss_kernel.cache_clear()


def test_deepspeed_still_refuses_a_kernel_that_it_cannot_run() -> None:
    """The probe rests on it."""
    reason = batches.why_no_loss_kernel(torch.device("cpu"), torch.float32)
    assert reason == does_not_run(RuntimeError(str(reason).partition("RuntimeError: ")[2][:-1]))
    assert "Triton" in str(reason)
