"""Generation with shared prefixes equals the plain way and transformers' own; constrained choice is exact."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from llmops.console import RunStopped
from llmops.generation.choice_search import Tree
from llmops.generation.generator import PACE, Generator
from llmops.generation.shared_prefix import common_length, group_by_prefix
from llmops.models import tiny

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


def test_learned_positions_do_not_count_the_padding() -> None:
    """GPT-2's, in the plain way: a row has the likelihoods that it has alone, whatever stands beside it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=1,
        eos_token_id=END,
    )  # fmt: skip
    plain = Generator(GPT2LMHeadModel(config).eval(), 0, 64, reuse_prefix=False)
    prompts, asked = [[5, 6, 7], [9], [*range(20, 60)]], [[[7], [8, 9]]] * 3
    together = dict(plain.loglikelihoods(prompts, asked))
    for i, prompt in enumerate(prompts):
        assert together[i] == pytest.approx(dict(plain.loglikelihoods([prompt], asked[:1]))[0], abs=1e-4)


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


@pytest.mark.parametrize("reuse", [True, False])
def test_no_answer_keeps_a_graph_for_gradients(reuse: bool) -> None:
    """Every pass of every kind of answer, also while the caller does something else between two of them."""
    model, prompts = make_model("llama"), make_prompts()
    passes: list[bool] = []
    model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    generator, tree = Generator(model, 0, 4, reuse), Tree(make_candidates())
    candidates = [[[9, END], [8, 7, END]]] * len(prompts)
    for answers in (
        generator.choose(prompts, [tree] * len(prompts)),
        generator.loglikelihoods(prompts, candidates),
        generator.generate(prompts, 3, [END]),
    ):
        passes.clear()
        for _ in answers:
            assert torch.is_grad_enabled()  # the caller's own mode is as it was
        assert passes
        assert not any(passes)


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


def make_choices(count: int) -> list[list[list[int]]]:
    """Candidates per prompt: single tokens, the same and other lengths, one the beginning of another."""
    kinds = [[[5], [6], [7], [8]], [[5, 9, 11], [5, 9], [4]], [[30, 31, 32, 33], [40, 41]]]
    return [kinds[i % len(kinds)] for i in range(count)]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_loglikelihoods_are_exact(architecture: str) -> None:
    """Batches of 1, 3 and 8, with and without prefix reuse, equal one plain pass per candidate within 1e-4."""
    prompts = make_prompts()
    choices = make_choices(len(prompts))
    reference = make_model(architecture).eval()
    exact = []
    for prompt, candidates in zip(prompts, choices, strict=True):
        row = []
        for ids in candidates:
            with torch.no_grad():
                logp = reference(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
            row.append(sum(logp[len(prompt) + k - 1, token].item() for k, token in enumerate(ids)))
        exact.append(row)
    model = make_model(architecture)
    for size, reuse in [(1, False), (3, False), (8, False), (1, True), (3, True), (8, True)]:
        found = dict(Generator(model, 0, size, reuse).loglikelihoods(prompts, choices))
        assert len(found) == len(prompts)
        for i, row in enumerate(exact):
            assert found[i] == pytest.approx(row, abs=1e-4)


def test_likelihoods_are_read_from_the_device_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many candidates there are: every number that is read singly makes a GPU wait."""
    read = []

    def watched(name: str) -> Callable[[torch.Tensor], Any]:
        plain = getattr(torch.Tensor, name)

        def reads(tensor: torch.Tensor) -> Any:
            read.append((name, tensor.is_floating_point()))
            return plain(tensor)

        return reads

    for name in ("item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    generator = Generator(make_model("llama"), 0, 8)
    list(generator.loglikelihoods([[5, 6, 7]], [[[t, t + 1, t + 2][: 1 + t % 3] for t in range(5, 25)]]))
    assert ("item", True) not in read
    assert read.count(("tolist", True)) == 3  # 20 first tokens, then 13 longer candidates in passes of 8


def test_rows_follow_from_memory() -> None:
    """2 x layers x key/value heads x head width x 4 bytes a token, counted by hand; half of what is free."""
    model = make_model("llama")
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    generator = Generator(model, 0, 0)
    generator.fit(512)
    assert generator.batch_size == 128
    free = psutil.virtual_memory().available
    generator.fit(free // token // 20)
    assert 8 <= generator.batch_size <= 12
    generator.fit(2 * free // token)
    assert generator.batch_size == 1
    plain = Generator(make_model("llama"), 0, 0, reuse_prefix=False)
    plain.fit(512)
    assert plain.batch_size == 16


class Counting(torch.nn.Module):
    """Counts what goes through a model, and runs out of memory when a batch has too many rows, or in one pass."""

    def __init__(self, model: PreTrainedModel, rows: int = 10**9, fails_at: int = 0) -> None:
        super().__init__()
        self.tokens, self.passes, self.rows, self.fails_at = 0, 0, rows, fails_at
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        """Before each pass."""
        self.tokens += kwargs["input_ids"].numel()
        self.passes += 1
        if len(kwargs["input_ids"]) > self.rows or self.passes == self.fails_at:
            raise torch.OutOfMemoryError("no memory left")


def test_nested_prefixes_are_computed_once() -> None:
    """Examples shared by all, two passages of several questions and one with a single question: each once."""
    draw = random.Random(4)

    def tokens(n: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(n)]

    examples, passages = tokens(100), [[k, *tokens(700)] for k in (10, 20, 30)]
    asked = [4, 1, 3]
    prompts = [
        [*examples, *passage, 40 + q, *tokens(4)] for passage, n in zip(passages, asked, strict=True) for q in range(n)
    ]
    model = make_model("llama")
    plain = dict(Generator(model, 0, 8, False).loglikelihoods(prompts, [[[5], [6]]] * len(prompts)))
    model = make_model("llama")
    counting = Counting(model)
    found = dict(Generator(model, 0, 8).loglikelihoods(prompts, [[[5], [6]]] * len(prompts)))
    assert counting.tokens == 100 + 3 * 701 + 5 * sum(asked)
    for i, row in plain.items():
        assert found[i] == pytest.approx(row, abs=1e-4)


def test_out_of_memory_halves_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = make_prompts()
    expected = {i: answer.ids for i, answer in Generator(make_model("llama"), 0, 8).generate(prompts, 6, [END])}
    model = make_model("llama")
    Counting(model, rows=3)
    generator = Generator(model, 0, 8)
    answers = list(generator.generate(prompts, 6, [END]))
    assert generator.batch_size == 2
    assert "out of memory with 8 prompts at once; going on with 4" in capsys.readouterr().err
    assert sorted(i for i, _ in answers) == list(range(len(prompts)))
    assert {i: answer.ids for i, answer in answers} == expected
    model = make_model("llama")
    Counting(model, rows=0)
    with pytest.raises(RunStopped, match="does not suffice for one prompt of"):
        list(Generator(model, 0, 8, False).generate(prompts, 6, [END]))


def test_answers_end_one_by_one() -> None:
    """Short answers do not wait for a long one, waiting prompts take their places, and the texts stay the same."""
    prompts = make_prompts()
    limits = [40 if i in (3, 17) else 1 + i % 3 for i in range(len(prompts))]
    alone = dict(Generator(make_model("llama"), 0, 1).generate(prompts, limits, [END]))
    model = make_model("llama")
    counting = Counting(model)
    answers = list(Generator(model, 0, 4).generate(prompts, limits, [END]))
    assert sorted(i for i, _ in answers) == list(range(len(prompts)))
    assert {i for i, _ in answers[-2:]} == {3, 17}
    for i, answer in answers:
        assert (answer.ids, answer.ended) == (alone[i].ids, alone[i].ended)
        assert answer.ended == (len(answer.ids) < limits[i])
        assert answer.probability == pytest.approx(alone[i].probability, rel=1e-3)
    # batch by batch, the long answers alone would take two times 40 passes of 4 rows
    first = next(k for k, (i, _) in enumerate(answers) if i in (3, 17))
    assert first == len(answers) - 2
    assert counting.passes < 80


def test_answers_of_one_length_end_at_different_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read little by little: the first answers are there before the last prompts are read."""
    draw = random.Random(5)
    prompts = [[draw.randrange(3, VOCABULARY) for _ in range(90)] for _ in range(24)]
    expected = {i: answer.ids for i, answer in Generator(make_model("llama"), 0, 1).generate(prompts, 4, [END])}
    monkeypatch.setitem(PACE, "cpu", (180, 20))
    model = make_model("llama")
    counting = Counting(model)
    moments, found = [], {}
    for i, answer in Generator(model, 0, 16).generate(prompts, 4, [END]):
        found[i] = answer.ids
        moments.append((counting.passes, counting.tokens))
    assert found == expected
    assert len({passes for passes, _ in moments}) >= 8
    assert moments[0][1] < 24 * 90 / 3  # tokens until the first answer, of the 2160 of all prompts


def test_answers_survive_when_memory_runs_out_on_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    """A pass that fails in the middle of answers: they go on where they were, fewer at once."""
    prompts = make_prompts()
    expected = {i: answer.ids for i, answer in Generator(make_model("llama"), 0, 8).generate(prompts, 12, [END])}
    model = make_model("llama")
    Counting(model, fails_at=12)
    generator = Generator(model, 0, 8)
    answers = list(generator.generate(prompts, 12, [END]))
    assert {i: answer.ids for i, answer in answers} == expected
    assert len(answers) == len(prompts)
    assert generator.batch_size == 4
    assert "out of memory with 8 prompts at once" in capsys.readouterr().err
