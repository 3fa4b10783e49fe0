"""Every symptom of old remote-code checkpoints: there without its patch, gone with it. The modules are our own.

`tests/check_checkpoint.sh` runs the same and more on the vendors' real code.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece as spm
import torch
from conftest import ROOT, chat_main, read_log
from torch import nn
from transformers import GenerationMixin

from llmops.console import UserError
from llmops.generation.generator import Generator
from llmops.legacy import patches
from llmops.legacy.two_positions import read_prompt
from llmops.models.chat_model import ChatModel, load_tokenizer
from llmops.models.checkpoints import Checkpoint
from llmops.models.lora_layers import choose_lora_layers
from train.batches import PaddedCollator, target_losses

MODULES = ROOT / "tests" / "legacy_modules"
STYLES = {
    "rotary": ("modeling_rotary", "RotaryConfig", "OldForCausalLM", "tokenization_commands.CommandTokenizer"),
    "deaf": ("modeling_deaf", "RotaryConfig", "DeafForCausalLM", "tokenization_commands.CommandTokenizer"),
    "alibi": ("modeling_alibi", "AlibiConfig", "AlibiForCausalLM", "tokenization_late.LateTokenizer"),
    "prefix": ("modeling_prefix", "PrefixConfig", "PrefixForConditionalGeneration",
               "tokenization_commands.CommandTokenizer"),
}  # fmt: skip
PATCHES = {name: getattr(patches, name) for name in ("TOKENIZER_PATCHES", "CONFIG_PATCHES", "MODEL_PATCHES")}
MASK, GMASK, SOP, EOP = 296, 297, 298, 299
CAUSAL = ("rotary", "alibi", "prefix")
Make = Callable[..., Path]


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of 296 pieces: unk, bos, eos, the bytes, the letters and some words."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = "the quick brown fox jumps over the lazy dog\nhello and more of the same, hello and more\n"
    (folder / "texts.txt").write_text(text * 20, encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(folder / "texts.txt"), model_prefix=str(folder / "model"), vocab_size=MASK, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return folder / "model.model"


@pytest.fixture
def make(vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Writes a checkpoint in an old style. `without` takes a patch away; `lacking` leaves weights out of the file.

    Every folder gets a name of its own, and so classes of its own that nothing has patched.
    """

    def write(style: str, without: str = "", lacking: str = "", **settings: Any) -> Path:
        assert not without or without in {patch.__name__ for group in PATCHES.values() for patch in group}
        for name, group in PATCHES.items():
            monkeypatch.setattr(patches, name, tuple(p for p in group if p.__name__ != without))
        module, config_class, model_class, tokenizer_class = STYLES[style]
        folder = tmp_path / f"{tmp_path.name}-{style}-{without or 'patched'}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        streaming = module if style == "alibi" else "modeling_streaming"
        for name in {
            module,
            "modeling_rotary" if style == "deaf" else module,
            streaming,
            tokenizer_class.split(".")[0],
        }:
            shutil.copy(MODULES / f"{name}.py", folder)
        shutil.copy(vocabulary, folder / "tokenizer.model")
        auto = {"AutoConfig": f"{module}.{config_class}"}
        # the earliest checkpoints name no AutoModelForCausalLM
        auto["AutoModel" if style == "prefix" else "AutoModelForCausalLM"] = f"{module}.{model_class}"
        config = {"model_type": f"old_{style}", "auto_map": auto, "torch_dtype": "float32", **settings}
        tokenizer = {"auto_map": {"AutoTokenizer": [tokenizer_class, None]}, "tokenizer_class": tokenizer_class}
        if style == "alibi":
            tokenizer |= {"add_bos_token": False, "spare_ids": 0}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        generator = torch.Generator().manual_seed(0)
        weights = {
            name: torch.randn(shape, generator=generator) * (0.5 if len(shape) > 1 else 0.1)
            + (1.0 if "norm.weight" in name else 0.0)
            for name, shape in SHAPES["rotary" if style == "deaf" else style].items()
        }
        if style in ("rotary", "deaf"):
            weights["transformer.rotation.inv_freq"] = 1.0 / (10000 ** (torch.arange(0, 16, 2).float() / 16))
        if style == "prefix":
            weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].clone()
            for i in range(2):
                weights[f"transformer.layers.{i}.rotation.inv_freq"] = (
                    1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8))
                ).half()
        kept = {name: value for name, value in weights.items() if not (lacking and lacking in name)}
        torch.save(kept, folder / "pytorch_model.bin")
        return folder

    return write


def layer_shapes(prefix: str, fused: str, out: str, norm: bool, bias: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer of width 32."""
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.{fused}.weight": (96, 32), f"{prefix}.{out}.weight": (32, 32)}
    if bias:
        shapes |= {f"{prefix}.{fused}.bias": (96,), f"{prefix}.{out}.bias": (32,)}
    if norm:
        shapes |= {f"{prefix}.norm.weight": (32,), f"{prefix}.norm.bias": (32,)}
    return shapes


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "rotary": {"transformer.embedding.weight": (300, 32), "transformer.output_layer.weight": (300, 32)},
    "alibi": {"model.embed_tokens.weight": (300, 32), "lm_head.weight": (300, 32)},
    "prefix": {"transformer.word_embeddings.weight": (300, 32)},
}
for i in range(2):
    rotary_layer = layer_shapes(f"transformer.encoder.layers.{i}", "query_key_value", "dense_4h_to_h", True, True)
    SHAPES["rotary"] |= rotary_layer
    SHAPES["alibi"] |= layer_shapes(f"model.layers.{i}", "W_pack", "o_proj", False, False)
    SHAPES["prefix"] |= layer_shapes(f"transformer.layers.{i}", "query_key_value", "dense", True, True)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as our commands load it."""
    return ChatModel(Checkpoint(folder, trust_remote_code=True)).weights(dtype).eval()


def trusted_tokenizer(folder: Path) -> Any:
    """The tokenizer as our commands load it."""
    return load_tokenizer(Checkpoint(folder, trust_remote_code=True))


def prompt(style: str, length: int = 9, seed: int = 0) -> list[int]:
    """Token ids; those of the prefix style end with [gMASK] <sop> and an answer's first token."""
    ids = torch.randint(5, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [*ids[:-3], GMASK, SOP, ids[-1]] if style == "prefix" else ids


def logits_of(model: Any, ids: list[int], **inputs: Any) -> torch.Tensor:
    """Logits of one row."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **inputs).logits[0]


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Rows padded on the left, with their 2-D mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def close(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> bool:
    """Whether the largest difference, relative to the largest value, is within the bound."""
    return bool((found - expected).abs().max() <= bound * expected.abs().max())


def direct(folder: Path) -> Any:
    """The checkpoint's module built without from_pretrained, with what it lacks to run at all, and its weights."""
    config = patches.load_class(patches.auto_map(folder)["AutoConfig"], folder).from_pretrained(str(folder))
    names = patches.auto_map(folder)
    kind = patches.load_class(names.get("AutoModelForCausalLM") or names["AutoModel"], folder)
    config.max_length = 512
    model = kind(config).float()
    model.load_state_dict(torch.load(folder / "pytorch_model.bin", weights_only=True), strict=False)
    return model.eval()


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_special_tokens_get_the_vocabularys_ids(make: Make) -> None:
    with pytest.raises(UserError, match=r"AttributeError|TypeError"):
        trusted_tokenizer(make("alibi", without="special_tokens_before_vocabulary"))
    folder = make("alibi")
    tokenizer = trusted_tokenizer(folder)
    pieces = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer("hello 你好")["input_ids"] == pieces.encode("hello 你好")
    assert tokenizer.decode(pieces.encode("hello 你好")) == "hello 你好"


def test_old_pad_is_called_without_padding_side(make: Make) -> None:
    texts = ["hello", "hello and more 你好"]
    with pytest.raises(TypeError, match="padding_side"):
        trusted_tokenizer(make("rotary", without="padding_side_not_accepted"))(texts, padding=True)
    tokenizer = trusted_tokenizer(make("rotary"))
    batch = tokenizer(texts, padding=True)
    for text, row, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        ids = tokenizer(text)["input_ids"]
        assert row[-len(ids) :] == ids
        assert mask == [0] * (len(row) - len(ids)) + [1] * len(ids)


def test_an_added_token_gets_a_free_id(make: Make) -> None:
    def added(folder: Path) -> tuple[int, int]:
        tokenizer = trusted_tokenizer(folder)
        tokenizer.add_tokens(["<new>"])
        return tokenizer.convert_tokens_to_ids("<new>"), tokenizer.vocab_size

    index, size = added(make("rotary", without="ids_without_a_name"))
    assert index < size  # the id of another token
    index, size = added(make("rotary"))
    assert index == size


def test_an_id_beyond_the_vocabulary_is_no_text(make: Make) -> None:
    with pytest.raises(IndexError):
        trusted_tokenizer(make("alibi", without="ids_beyond_the_vocabulary")).decode([200, 299])
    tokenizer = trusted_tokenizer(make("alibi"))
    assert tokenizer.decode([200, 299]) == tokenizer.decode([200])


def saved_again(tokenizer: Any, tmp_path: Path) -> Any:
    """A tokenizer that was saved and loaded from there."""
    saved = tmp_path / f"saved-{len(list(tmp_path.iterdir()))}"
    tokenizer.save_pretrained(saved)
    return trusted_tokenizer(shutil.copytree(saved, config_beside(saved, tmp_path)))


def test_a_saved_tokenizer_keeps_its_settings(make: Make, tmp_path: Path) -> None:
    """add_bos_token is not saved by the library; spare_ids, which moves every id, was not handed to it."""
    lost = saved_again(trusted_tokenizer(make("alibi", without="settings_not_saved")), tmp_path)
    tokenizer = trusted_tokenizer(make("alibi"))
    expected = tokenizer("hello")["input_ids"]
    assert lost("hello")["input_ids"] == [1, *(200 + index for index in expected)]
    assert saved_again(tokenizer, tmp_path)("hello")["input_ids"] == expected
    tokenizer.add_bos_token = True  # changed after it was loaded
    assert saved_again(tokenizer, tmp_path)("hello")["input_ids"] == [1, *expected]


def test_a_prompt_is_ended_once(make: Make) -> None:
    """The library builds the inputs a second time, for their token types; the class lengthens the list it gets."""

    def ended(folder: Path) -> list[int]:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"add_eos_token": True}), encoding="utf-8")
        return trusted_tokenizer(folder)("hello")["input_ids"]

    plain = trusted_tokenizer(make("alibi"))("hello")["input_ids"]
    assert ended(make("alibi", without="prompt_ended_twice")) == [*plain, 2, 2]
    assert ended(make("alibi")) == [*plain, 2]


def test_an_end_token_that_has_an_id_and_no_name(make: Make) -> None:
    with pytest.raises(UserError, match="has no end token"):
        trusted_tokenizer(make("rotary", without="end_token_without_a_name"))
    tokenizer = trusted_tokenizer(make("rotary"))
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 2)
    assert None not in tokenizer(["hello", "a"], padding=True)["input_ids"]


def test_a_setting_that_is_given_twice(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple values for keyword argument 'clean_up_tokenization_spaces'"):
        saved_again(trusted_tokenizer(make("rotary", without="setting_given_twice")), tmp_path)
    tokenizer = trusted_tokenizer(make("rotary"))
    assert saved_again(tokenizer, tmp_path)("hello")["input_ids"] == tokenizer("hello")["input_ids"]


def config_beside(saved: Path, tmp_path: Path) -> Path:
    """Give a saved tokenizer the config.json of a model, as a whole checkpoint has; the folder to copy it to."""
    (saved / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {}}), encoding="utf-8")
    return tmp_path / f"{tmp_path.name}-{saved.name}-copy"


# --- configuration, building, loading --------------------------------------------------------------------------------


def test_a_vocabulary_file_that_was_not_kept_is_saved(make: Make, tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="vocab_file"):
        trusted_tokenizer(make("rotary", without="vocabulary_file_forgotten")).save_pretrained(tmp_path)
    folder = make("rotary")
    trusted_tokenizer(folder).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_batch_encode_plus_is_another_name(make: Make) -> None:
    """What the vendors' `model.chat` calls."""
    with pytest.raises(AttributeError, match="batch_encode_plus"):
        trusted_tokenizer(make("rotary", without="batches_only_by_calling")).batch_encode_plus(["hello"])
    tokenizer = trusted_tokenizer(make("rotary"))
    assert tokenizer.batch_encode_plus(["hello", "a"])["input_ids"] == tokenizer(["hello", "a"])["input_ids"]


def test_names_that_the_library_expects(make: Make) -> None:
    folder = make("rotary", without="names_of_today_missing")
    with pytest.raises(AttributeError, match="use_cache"):
        logits_of(load(folder), prompt("rotary"))
    model = load(make("rotary"))
    assert model.config.num_hidden_layers == 2
    assert logits_of(model, prompt("rotary")).isfinite().all()


def test_settings_wrapped_in_a_tuple(make: Make) -> None:
    """(False,) is true: gradient checkpointing would be on whatever was asked for."""
    assert load(make("alibi", without="settings_wrapped_in_a_tuple")).model.gradient_checkpointing
    model = load(make("alibi"))
    assert model.model.gradient_checkpointing is False
    assert model.config.gradient_checkpointing is False


@pytest.mark.parametrize("style", ["rotary", "prefix"])
def test_a_model_without_post_init_loads(make: Make, style: str) -> None:
    with pytest.raises(UserError, match=r"AttributeError.*all_tied_weights_keys"):
        load(make(style, without="post_init_never_called"))
    assert load(make(style)).all_tied_weights_keys is not None


def test_max_length_is_there_while_building_only(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"AttributeError.*max_length"):
        load(make("rotary", without="max_length_read_while_building"))
    model = load(make("rotary"))
    assert model.max_sequence_length == 512
    model.save_pretrained(tmp_path / "saved")  # refused with a lasting max_length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("style", CAUSAL)
def test_every_weight_has_the_dtype_asked_for(make: Make, style: str, dtype: torch.dtype) -> None:
    model = load(make(style), dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits_of(model, prompt(style)).isfinite().all()


def test_half_precision_in_the_code_is_recast(make: Make) -> None:
    names = patches.auto_map(folder := make("prefix", without="half_precision_hard_coded"))
    patches.prepare_model(folder)
    kind = patches.load_class(names["AutoModel"], folder)
    config = patches.load_class(names["AutoConfig"], folder).from_pretrained(str(folder))
    assert kind(config).dtype == torch.float16
    patches.prepare_model(folder := make("prefix"))
    assert patches.load_class(names["AutoModel"], folder)(config).dtype == torch.float32


@pytest.mark.parametrize("style", CAUSAL)
def test_logits_and_loss_equal_the_module_built_directly(make: Make, style: str) -> None:
    folder = make(style)
    ids = prompt(style, 40)
    expected = direct(folder)(input_ids=torch.tensor([ids]), labels=torch.tensor([ids]), use_cache=False)
    found = load(folder)(input_ids=torch.tensor([ids]), labels=torch.tensor([ids]))
    assert close(found.logits, expected.logits)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)


@pytest.mark.parametrize("style", ["rotary", "prefix"])
def test_weight_files_without_inv_freq(make: Make, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not loaded starts as garbage; empty memory is made visibly so."""
    expected = logits_of(load(make(style)), prompt(style))
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(7.0))
    broken = logits_of(load(make(style, without="buffers_left_uninitialised", lacking="inv_freq")), prompt(style))
    assert not close(broken, expected)
    assert close(logits_of(load(make(style, lacking="inv_freq")), prompt(style)), expected)


def test_buffers_that_are_never_saved(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(7.0))
    assert load(make("rotary", without="buffers_left_uninitialised")).transformer.rotation.sign.tolist() == [7.0, 7.0]
    assert load(make("rotary")).transformer.rotation.sign.tolist() == [-1.0, 1.0]


def test_tables_that_are_no_buffers(make: Make) -> None:
    """Baichuan2-7B's frequencies are an attribute of their module."""

    def attribute(folder: Path) -> Path:
        path = folder / "modeling_rotary.py"
        text = path.read_text(encoding="utf-8").replace("self.sign[1].to(kind)", "1")
        lines = [line for line in text.splitlines() if 'register_buffer("sign"' not in line]
        (place,) = (i for i, line in enumerate(lines) if 'register_buffer("inv_freq", ' in line)
        lines[place] = lines[place].replace('self.register_buffer("inv_freq", ', "self.inv_freq = ")[:-1]
        path.write_text("\n".join(lines), encoding="utf-8")
        return folder

    expected = logits_of(load(make("rotary")), prompt("rotary"))
    left = load(attribute(make("rotary", without="tables_that_are_no_buffers", lacking="inv_freq")))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        logits_of(left, prompt("rotary"))
    assert close(logits_of(load(attribute(make("rotary", lacking="inv_freq"))), prompt("rotary")), expected)


def test_a_file_without_lm_head(make: Make) -> None:
    expected = logits_of(load(make("prefix")), prompt("prefix"))
    with pytest.raises(UserError, match=r"lack 1 of the tensors .* lm_head.weight"):
        load(make("prefix", without="head_no_longer_tied", lacking="lm_head"))
    assert close(logits_of(load(make("prefix", lacking="lm_head")), prompt("prefix")), expected)


def test_skip_init_stays_on_the_meta_device(make: Make) -> None:
    def device(folder: Path) -> str:
        patches.prepare_model(folder)
        names = patches.auto_map(folder)
        config = patches.load_class(names["AutoConfig"], folder).from_pretrained(str(folder))
        with torch.device("meta"):
            model = patches.load_class(names["AutoModelForCausalLM"], folder)(config)
        return model.transformer.embedding.weight.device.type

    assert device(make("rotary", without="weights_built_twice")) == "cpu"
    assert device(make("rotary")) == "meta"


@pytest.mark.parametrize("style", ["rotary", "prefix"])
def test_bf16_positions_beyond_256(make: Make, style: str) -> None:
    """bf16 has 8 bits of mantissa: position 400 is rounded, and so are its angles."""
    ids = prompt(style, 400)
    expected = logits_of(load(make(style)), ids)[-1]

    def error(folder: Path) -> float:
        found = logits_of(load(folder, torch.bfloat16), ids)[-1].float()
        return float((found - expected).norm() / expected.norm())

    assert error(make(style, without="rotary_angles_in_bfloat16")) > 2 * error(make(style))
    assert error(make(style)) < 0.2


# --- masks, cache, generation ----------------------------------------------------------------------------------------


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


# --- training --------------------------------------------------------------------------------------------------------


def training_batch(style: str) -> dict[str, Any]:
    """Four samples of different lengths, padded."""
    samples = []
    for i in range(4):
        ids = [*prompt(style, 8 + i, seed=i), 9, 8, 7]
        samples.append(
            {"ids": torch.tensor(ids).numpy(), "learned": torch.tensor([0] * (6 + i) + [1] * 5).bool().numpy()}
        )
    return PaddedCollator(0, left=True)(samples)


def step(model: Any, style: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a step."""
    model.train()
    model.zero_grad()
    loss = target_losses(model, training_batch(style)).mean()
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("style", ["rotary", "deaf", "alibi", "prefix"])
def test_gradient_checkpointing_recomputes(make: Make, style: str) -> None:
    def passes(model: Any) -> int:
        counts: list[int] = []
        linear = next(m for n, m in model.named_modules() if n.endswith(("query_key_value", "W_pack")))
        linear.register_forward_pre_hook(lambda *_: counts.append(1))
        step(model, style)
        return len(counts)

    plain = load(make(style))
    loss, expected = step(plain, style)
    model = load(make(style))
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = True
    again, found = step(model, style)
    assert again == pytest.approx(loss, rel=1e-6)
    assert all(close(found[name], grad) for name, grad in expected.items() if grad.any())
    assert passes(plain) == 1
    assert passes(model) == 2
    model.activation_checkpointing_disable()
    assert passes(model) == 1
    blind = load(make(style, without="nothing_is_recomputed"))
    if style == "deaf":  # the switch is overridden by one that takes less, and does nothing
        with pytest.raises(TypeError, match="gradient_checkpointing_enable"):
            blind.activation_checkpointing_enable({"use_reentrant": False})
    elif style == "prefix":  # the flag that the old protocol sets is read nowhere
        blind.activation_checkpointing_enable({"use_reentrant": False})
        assert passes(blind) == 1


def test_evaluation_leaves_the_weights_alone(make: Make) -> None:
    def changed(model: Any) -> tuple[bool, float]:
        before = model.lm_head.weight.clone()
        loss = step(model, "alibi")[0]
        model.eval()
        logits_of(model, prompt("alibi"))
        after = step(model, "alibi")[0]
        return not torch.equal(before, model.lm_head.weight), abs(after - loss)

    assert changed(load(make("alibi", without="weight_changed_by_evaluating")))[0]
    assert changed(load(make("alibi"))) == (False, 0.0)


def test_no_mask_for_every_position(make: Make) -> None:
    model = load(make("alibi", without="alibi_buffer_of_every_position"))
    expected = logits_of(model, prompt("alibi", 30))
    assert model.model.future_mask.shape == (2, 256, 256)
    model = load(make("alibi"))
    assert close(logits_of(model, prompt("alibi", 30)), expected)
    assert not dict(model.named_buffers())


def test_the_loss_is_divided_at_accumulation(make: Make, tmp_path: Path) -> None:
    """The Trainer's own loss over the same 4 rows, as 1 batch of 4 and as 4 of 1."""
    from transformers import Trainer, TrainingArguments

    ids = torch.tensor([prompt("alibi", 10, seed=i) for i in range(4)])
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def loss(folder: Path, size: int) -> float:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "trainer"), per_device_train_batch_size=size, max_steps=1, logging_steps=1,
            gradient_accumulation_steps=4 // size, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(load(folder), arguments, train_dataset=rows)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    one = loss(make("alibi"), 4)
    assert loss(make("alibi"), 1) == pytest.approx(one, rel=1e-3)
    assert loss(make("alibi", without="loss_not_divided"), 1) == pytest.approx(4 * one, rel=1e-3)


@pytest.mark.parametrize("style", CAUSAL)
def test_lora_merges(make: Make, style: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = make(style)
    layers = choose_lora_layers(load(folder), "", None)
    assert not {"lm_head", "output_layer"} & set(layers)
    torch.manual_seed(0)
    model = get_peft_model(load(folder), LoraConfig(r=2, target_modules=layers, task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    assert step(model, style)[0] > 0
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "adapter")
    trusted_tokenizer(folder).save_pretrained(tmp_path / "adapter")
    ids = [prompt(style)]
    target = tmp_path / f"{tmp_path.name}-merged"
    with pytest.raises(UserError, match="trust_remote_code"):
        ChatModel(Checkpoint(tmp_path / "adapter")).save_merged(target, torch.float32, ids)
    trusted = ChatModel(Checkpoint(tmp_path / "adapter", trust_remote_code=True))
    assert trusted.save_merged(target, torch.float32, ids) < 1e-5
    assert {path.name for path in target.glob("*.py")} == {path.name for path in folder.glob("*.py")}


def test_the_output_layer_is_known(make: Make) -> None:
    assert load(make("rotary", without="output_layer_not_found")).get_output_embeddings() is None
    model = load(make("rotary"))
    assert model.get_output_embeddings() is model.transformer.output_layer


@pytest.mark.parametrize("style", ["rotary", "alibi", "prefix"])
def test_a_saved_folder_loads_again(make: Make, style: str, tmp_path: Path) -> None:
    folder = make(style)
    model = load(folder)
    saved = tmp_path / f"{tmp_path.name}-saved"
    model.save_pretrained(saved)
    trusted_tokenizer(folder).save_pretrained(saved)
    assert {path.name for path in saved.glob("*.py")} == {path.name for path in folder.glob("*.py")}
    assert all((saved / path.name).read_text() == path.read_text() for path in folder.glob("*.py"))
    assert json.loads((saved / "config.json").read_text())["torch_dtype"] == "float32"
    assert close(logits_of(load(saved), prompt(style)), logits_of(model, prompt(style)))


@pytest.mark.parametrize("style", CAUSAL)
def test_the_generator_answers_and_ranks(make: Make, style: str) -> None:
    """As evaluation and prediction ask: batched, padded, with a cache. Compared with single passes without one."""
    model = load(make(style))
    prompts = [prompt(style, 12), prompt(style, 7, seed=1)]
    generator = Generator(model, 0, 2)
    assert generator.plain_because
    answers = dict(generator.generate(prompts, [6, 4], [EOP]))
    scores = dict(generator.loglikelihoods(prompts, [[[5], [6, 7]]] * 2))

    def distribution(ids: list[int]) -> torch.Tensor:
        return logits_of(model, ids, use_cache=False)[-1].double().log_softmax(-1)

    for i, limit in enumerate((6, 4)):
        expected: list[int] = []
        while len(expected) < limit and (token := distribution([*prompts[i], *expected]).argmax().item()) != EOP:
            expected.append(int(token))
        assert answers[i].ids == expected
        long = distribution(prompts[i])[6] + distribution([*prompts[i], 6])[7]
        assert scores[i] == pytest.approx([distribution(prompts[i])[5].item(), long.item()], abs=1e-4)


@pytest.mark.parametrize("style", CAUSAL)
def test_the_server_answers(make: Make, style: str) -> None:
    """Rows with limits of their own, as the generator answers them."""
    from llmops.generation.passes import Passes
    from serve.metrics import Metrics
    from serve.model.asked import Sampling
    from serve.model.lanes import Answer, Event, Outbox
    from serve.model.plain import PlainLane
    from serve.model.sampling import Sampler
    from serve.model.text import Detokenizer
    from serve.settings import Limits

    model = load(make(style))
    prompts = [prompt(style, 12), prompt(style, 7, seed=1)]
    expected = dict(Generator(model, 0, 2).generate(prompts, [6, 4], [EOP]))
    metrics = Metrics()
    for name in ("llmops_prompt_tokens_total", "llmops_completion_tokens_total"):
        metrics.counter(name, name)
    lane = PlainLane(Passes(model, 0, True), [EOP], limits=Limits(), budget=1000, metrics=metrics)
    found: list[Event] = []
    for ids, limit in zip(prompts, (6, 4), strict=True):
        written = Detokenizer(lambda tokens: "".join(map(chr, tokens)))
        sampler = Sampler(Sampling(temperature=0))
        lane.waiting.append(Answer(0, ids, limit, sampler=sampler, detokenizer=written, tell=found.append))
    rows = list(lane.waiting)
    out = Outbox()
    out.post = lambda function, events: function(events)
    assert lane.turn(out)
    out.send()
    assert [row.ids for row in rows] == [expected[0].ids, expected[1].ids]
    assert {event.text for event in found} == {"".join(map(chr, row.ids)) for row in rows}


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chat_main_trains_an_old_checkpoint(make: Make, small_data: Path) -> None:
    """LoRA under ZeRO 3 with two processes and a merge; the refusal without trust says why."""
    folder = make("prefix", position_encoding_2d=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "chatglm"}))
    code = (folder / "modeling_prefix.py").read_text().replace('model_type = "old_prefix"', 'model_type = "chatglm"')
    (folder / "modeling_prefix.py").write_text(code)
    arguments = (
        "--mount_path", str(small_data), "--model_name_or_path", str(folder), "--mode", "glm", "--lora_dropout", "0",
        "--num_train_epochs", "1", "--max_steps", "2", "--max_seq_len", "256", "--tensorboard", "false",
        "--zero_stage", "3", "--num_processes", "2", "--merge_lora", "true", "--per_device_train_batch_size", "2",
        "--learning_rate", "1e-2", "--lora_module_name", "query_key_value,dense",
        "--retention_file", str(small_data / "datasets" / "test.jsonl"),
    )  # fmt: skip
    refused = chat_main(*arguments)
    assert refused.returncode == 2
    assert "--trust_remote_code true" in refused.stderr
    done = chat_main(*arguments, "--trust_remote_code", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    output = small_data / "output_path"
    assert read_log(output)
    assert (output / "adapter_config.json").is_file()
    assert (
        load(output / "merged").generate(**padded([prompt("prefix")]), max_new_tokens=2, do_sample=False).shape[1] == 11
    )


def test_native_checkpoints_are_not_touched(checkpoints_native: dict[str, Path]) -> None:
    for folder in checkpoints_native.values():
        assert patches.prepare_tokenizer(folder) == patches.prepare_model(folder) == ()
        model = ChatModel(Checkpoint(folder, trust_remote_code=True)).weights(torch.float32)
        assert not any(patches.CURED in c.__dict__ for c in type(model).__mro__)


@pytest.fixture
def checkpoints_native(request: pytest.FixtureRequest) -> dict[str, Path]:
    """The native tiny checkpoints of conftest, under a name that is not that of the module."""
    return request.getfixturevalue("checkpoints")
