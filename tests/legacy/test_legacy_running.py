"""Masks, caches and generation of old checkpoints: each symptom there without its patch, gone with it.

`tests/check_checkpoint.sh` runs the same and more on the vendors' real code.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationMixin

from legacy.styles import CAUSAL, SOP, Make, close, load, logits_of, padded, prompt
from llmops.legacy import patches
from llmops.legacy.two_positions import read_prompt


@pytest.mark.parametrize("style", CAUSAL)
@pytest.mark.parametrize("left", [True, False])
def test_padded_equals_unpadded(make: Make, style: str, left: bool) -> None:
    model = load(make(style))
    rows = [prompt(style, 12), prompt(style, 7, seed=1)]
    batch = padded(rows)
    if not left:
        shifts = [int((mask == 0).sum()) for mask in batch["attention_mask"]]
        batch = {
            key: torch.stack([row.roll(-shift) for row, shift in zip(value, shifts, strict=True)])
            for key, value in batch.items()
        }
    with torch.no_grad():
        logits = model(**batch).logits
    for i, row in enumerate(rows):
        assert close(logits[i, -1 if left else len(row) - 1], logits_of(model, row)[-1])


def test_mask_tokens_that_the_config_does_not_name() -> None:
    """ChatGLM-6B with 150,528 rows: its code had the ids of [MASK] and [gMASK] written in it."""
    rows = torch.tensor([[5, 6, 150001, 150004, 7], [5, 150000, 8, 150004, 7]])
    hidden = torch.zeros_like(rows, dtype=torch.bool)
    named = SimpleNamespace(bos_token_id=150004, gmask_token_id=150001, mask_token_id=150000)
    old = read_prompt(rows, hidden, SimpleNamespace(bos_token_id=150004))
    assert all(torch.equal(a, b) for a, b in zip(old, read_prompt(rows, hidden, named), strict=True))
    assert old[2].tolist() == [2, 1]  # where the mask tokens stand


def test_a_2d_mask_crashes_the_prefix_style(make: Make) -> None:
    batch = padded([prompt("prefix", 12), prompt("prefix", 7, seed=1)])
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        load(make("prefix", without="masks_only_in_four_dimensions"))(**batch)
    model = load(make("prefix"))
    four = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    for i, row in enumerate(batch["input_ids"].tolist()):
        for query in range(12):
            for key in range(12):
                visible = key <= query or key < row.index(SOP)
                four[i, 0, query, key] = not (visible and batch["attention_mask"][i, key])
    with torch.no_grad():
        expected = model(**batch).logits[:, -1]
        assert close(model(input_ids=batch["input_ids"], attention_mask=four).logits[:, -1], expected)
        greedy = model.generate(**batch, max_new_tokens=6, do_sample=False)
        assert torch.equal(
            model.generate(input_ids=batch["input_ids"], attention_mask=four, max_new_tokens=6, do_sample=False), greedy
        )
    with pytest.raises(ValueError, match="sop"):
        model(input_ids=torch.tensor([[5, 6, 7]]))


@pytest.mark.parametrize("style", ["rotary", "alibi", "prefix"])
def test_generate_is_back(make: Make, style: str) -> None:
    def kind(folder: Path) -> type:
        patches.prepare_model(folder)
        names = patches.auto_map(folder)
        return patches.load_class(names.get("AutoModelForCausalLM") or names["AutoModel"], folder)

    assert not issubclass(kind(make(style, without="generate_is_gone")), GenerationMixin)
    assert issubclass(kind(make(style)), GenerationMixin)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sampled", "beams"])
@pytest.mark.parametrize("style", CAUSAL)
def test_cached_generation_equals_uncached_and_single(make: Make, style: str, options: dict[str, Any]) -> None:
    model = load(make(style))
    model.config.use_cache = False  # as training leaves it
    rows = [prompt(style, 12), prompt(style, 7, seed=1), prompt(style, 5, seed=2)]

    def answer(batch: dict[str, torch.Tensor], cache: bool) -> list[list[int]]:
        torch.manual_seed(0)
        found = model.generate(
            **batch, max_new_tokens=10, pad_token_id=0, **({"do_sample": False} | options), use_cache=cache
        )
        return found[:, batch["input_ids"].shape[1] :].tolist()

    together = answer(padded(rows), True)
    assert together == answer(padded(rows), False)
    assert len({tuple(row) for row in together}) > 1
    if not options:
        for row, expected in zip(rows, together, strict=True):
            alone = answer(padded([row]), True)[0]
            assert alone == expected[: len(alone)]


@pytest.mark.parametrize("style", ["rotary", "prefix"])
def test_streaming_ends_as_generate_does(make: Make, style: str) -> None:
    """What the vendors' `stream_chat` runs, with a mask in four dimensions where the tokenizer makes such."""
    options = {"max_length": 16, "do_sample": False, "eos_token_id": 299, "pad_token_id": 0}
    ids = torch.tensor([prompt(style)])
    mask = torch.ones_like(ids)
    if style == "prefix":
        column = torch.arange(ids.shape[1])
        seen = (column <= column[:, None]) | (column < ids[0].tolist().index(SOP))
        mask = ~seen[None, None]
    blind = load(make(style, without="streaming_asks_for_what_is_gone"))
    with pytest.raises(AttributeError, match=r"_get_logits_warper|_eos_token_tensor"), torch.no_grad():
        list(blind.stream_generate(ids, attention_mask=mask, **options))
    model = load(make(style))
    with torch.no_grad():
        streamed = list(model.stream_generate(ids, attention_mask=mask, **options))
        expected = model.generate(ids, attention_mask=mask, **options)
    assert [row.shape[1] for row in streamed] == list(range(ids.shape[1] + 1, 17))
    assert torch.equal(streamed[-1], expected)


@pytest.mark.parametrize("style", CAUSAL)
def test_without_the_bridge_a_cache_fails(make: Make, style: str) -> None:
    model = load(make(style, without="cache_is_a_tuple"))
    with pytest.raises((TypeError, AttributeError, RuntimeError, ValueError, IndexError, KeyError)):
        model.generate(**padded([prompt(style)]), max_new_tokens=4, do_sample=False, use_cache=True)


@pytest.mark.parametrize("style", CAUSAL)
def test_a_forward_goes_on_from_a_cache(make: Make, style: str) -> None:
    """Several tokens at a time, in a padded batch, without position_ids."""
    model = load(make(style))
    batch = padded([prompt(style, 12), prompt(style, 7, seed=1)])
    extra = torch.tensor([[9, 8, 7], [6, 5, 9]])
    mask = torch.cat([batch["attention_mask"], torch.ones_like(extra)], 1)
    with torch.no_grad():
        expected = model(input_ids=torch.cat([batch["input_ids"], extra], 1), attention_mask=mask).logits[:, -3:]
        past = model(**batch, use_cache=True).past_key_values
        past = type(past)([tuple(tensor.detach() for tensor in part) for part in past])  # as DeepSpeed's hooks do
        found = model(input_ids=extra, attention_mask=mask, past_key_values=past, use_cache=True).logits
    assert close(found, expected)


@pytest.mark.parametrize("style", CAUSAL)
def test_a_cache_that_outgrows_its_tokens(make: Make, style: str) -> None:
    """Under ZeRO 3 a process that has finished runs on with the others: its mask and cache grow, its tokens do not."""
    model = load(make(style))
    ids = torch.tensor([prompt(style)])
    state: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": True}
    with torch.no_grad():
        for _ in range(3):
            inputs = model.prepare_inputs_for_generation(ids, **state)
            state = model._update_model_kwargs_for_generation(model(**inputs, return_dict=True), state)
    assert state["past_key_values"].get_seq_length() == ids.shape[1] + 2


@pytest.mark.parametrize("style", CAUSAL)
def test_logits_at_chosen_positions(make: Make, style: str) -> None:
    model = load(make(style))
    batch = padded([prompt(style, 12), prompt(style, 7, seed=1)])
    kept = torch.tensor([5, 11])
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda m, a, out: rows.append(out.numel() // out.shape[-1]))
    with torch.no_grad():
        expected = model(**batch).logits[:, kept]
        assert close(model(**batch, logits_to_keep=kept).logits, expected)
        assert close(model(**batch, logits_to_keep=1).logits, expected[:, -1:])
        square = padded([prompt(style, 6, seed=i) for i in range(6)])
        assert close(model(**square, logits_to_keep=2).logits, model(**square).logits[:, -2:])
    assert rows[:3] == [24, 4, 2]
    without = load(make(style, without="logits_at_every_position"))
    with pytest.raises(TypeError) if style != "alibi" else pytest.raises(AssertionError):
        assert without(**batch, logits_to_keep=kept).logits.shape[1] == 2
