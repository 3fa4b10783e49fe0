"""Generation with shared prefixes equals the plain way and transformers' own; constrained choice is exact."""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from llmops import tiny
from llmops.generation import Generator, Tree, common_length, group_by_prefix

VOCABULARY, END = 300, 2


def make_model(architecture: str) -> PreTrainedModel:
    """A tiny model whose logits differ clearly from token to token."""
    model = tiny.make_model(architecture, VOCABULARY, 64, 3, 4, END)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    return model


def make_prompts() -> list[list[int]]:
    """Two families of prompts with a long common beginning, of unequal lengths, and two that share nothing."""
    draw = random.Random(0)
    one, two = ([draw.randrange(3, VOCABULARY) for _ in range(n)] for n in (60, 45))
    tails = [[draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(1, 9))] for _ in range(22)]
    return [*(one + tail for tail in tails[:15]), *(two + tail for tail in tails[15:]), [5, 6, 7], [9]]


def make_candidates() -> list[list[int]]:
    """Answers that begin alike, branch at several depths, and end with the end token."""
    draw = random.Random(1)
    return [[9, *(draw.randrange(3, 8) for _ in range(draw.randrange(1, 5))), END] for _ in range(20)]


def exact_probabilities(model: PreTrainedModel, prompt: Sequence[int], tree: Tree) -> dict[int, float]:
    """The probability of every candidate under constrained decoding, one forward pass per candidate."""
    found = {}
    for ids, index in tree.index.items():
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0].double()
        logp = 0.0
        for depth, token in enumerate(ids):
            allowed = tree.children[ids[:depth]]
            logp += logits[len(prompt) + depth - 1][allowed].log_softmax(-1)[allowed.index(token)].item()
        found[index] = math.exp(logp)
    return found


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize(("batch_size", "reuse"), [(1, True), (4, True), (64, True), (1, False), (64, False)])
def test_choice_is_exact(architecture: str, batch_size: int, reuse: bool) -> None:
    """The two best candidates and their probabilities equal those of scoring every candidate by itself."""
    prompts, tree = make_prompts(), Tree(make_candidates())
    reference = make_model(architecture).eval()
    generator = Generator(make_model(architecture), 0, batch_size, reuse)
    assert (generator.plain_because is None) == reuse
    choices = dict(generator.choose(prompts, [tree] * len(prompts)))
    assert sorted(choices) == list(range(len(prompts)))
    for i in (0, 7, 16, len(prompts) - 2, len(prompts) - 1):
        exact = exact_probabilities(reference, prompts[i], tree)
        assert sum(exact.values()) == pytest.approx(1, abs=1e-6)
        best = sorted(exact, key=exact.__getitem__, reverse=True)[:2]
        assert [index for index, _ in choices[i].ranked] == best
        assert [p for _, p in choices[i].ranked] == pytest.approx([exact[k] for k in best], abs=1e-5)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize(("batch_size", "reuse"), [(3, True), (64, True), (64, False)])
def test_greedy_equals_transformers(architecture: str, batch_size: int, reuse: bool) -> None:
    prompts = make_prompts()
    reference = make_model(architecture).eval()
    stop = [END, 88]  # the second one comes up soon in some rows: they end early
    answers = dict(Generator(make_model(architecture), 0, batch_size, reuse).generate(prompts, 12, stop))
    lengths = set()
    for i, prompt in enumerate(prompts):
        expected = reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), max_new_tokens=12,
            do_sample=False, eos_token_id=stop, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert answers[i].ids == [token for token in expected if token not in stop]
        lengths.add(len(answers[i].ids))
    assert len(lengths) > 1  # rows that end at different steps were among them


def test_one_candidate_needs_no_model() -> None:
    """A choice among one answer is that answer, with probability 1."""
    generator = Generator(make_model("llama"), 0)
    (_, choice), *_ = generator.choose([[5, 6, 7]], [Tree([[9, 8, END]])])
    assert choice.ranked == [(0, 1.0)]


def test_a_candidate_that_begins_another_is_refused() -> None:
    with pytest.raises(ValueError, match="beginning of another"):
        Tree([[3, 4], [3, 4, 5]])


def test_groups_cover_every_prompt_once() -> None:
    prompts = make_prompts()
    groups = list(group_by_prefix(prompts))
    assert sorted(i for rows, _ in groups for i in rows) == list(range(len(prompts)))
    assert sorted(len(rows) for rows, shared in groups if shared) == [7, 15]
    for rows, shared in groups:
        for i in rows:
            assert prompts[i][:shared] == prompts[rows[0]][:shared]
            assert shared < len(prompts[i])  # a row keeps a token of its own
    assert list(group_by_prefix([[1, 2, 3]])) == [([0], 0)]
    assert common_length([1, 2, 3], [1, 2, 3]) == 2
