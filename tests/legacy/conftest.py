"""Checkpoints in the old styles."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
import torch

from legacy.styles import MASK, MODULES, PATCHES, SHAPES, STYLES, Make
from llmops.legacy import patches


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
