"""Files that a model, an adapter or a cache is read from, with code in them: none of it runs, and it is said."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from embedding_model import write_embedding_model
from peft import LoraConfig, get_peft_model

from llmops.console import UserError
from llmops.embedding.encoder import Encoder
from llmops.embedding.folder import read_folder
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from train.dataset import TokenDataset


class Hostile:
    """Pickles as a call of os.system that makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What the hostile code would make."""
    return tmp_path / "mark"


def test_torch_is_held_to_weights_whatever_is_asked_for(tmp_path: Path, mark: Path) -> None:
    torch.save(Hostile(mark), tmp_path / "state.pt")
    with pytest.raises(Exception, match=r"posix\.system"):
        torch.load(tmp_path / "state.pt", weights_only=False)
    assert not mark.exists()


def test_weights_of_a_model(tmp_path: Path, mark: Path, checkpoints: dict[str, Path]) -> None:
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Hostile(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"asks for posix\.system, which weights do not need"):
        ChatModel(Checkpoint(folder)).weights(torch.float32)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and no weights")
    with pytest.raises(UserError, match="cannot be loaded"):
        ChatModel(Checkpoint(folder)).weights(torch.float32)
    assert not mark.exists()


def test_weights_of_an_adapter(tmp_path: Path, mark: Path, checkpoints: dict[str, Path]) -> None:
    model = ChatModel(Checkpoint(checkpoints["llama"])).weights(torch.float32)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(checkpoints["llama"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        ChatModel(Checkpoint(tmp_path)).load(torch.float32)
    torch.save({"weight": Hostile(mark)}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"asks for posix\.system"):
        ChatModel(Checkpoint(tmp_path)).load(torch.float32)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(settings | {"megatron_config": {"a": 1}, "megatron_core": "antigravity"})
    )
    with pytest.raises(UserError, match="is one for Megatron"):
        ChatModel(Checkpoint(tmp_path)).load(torch.float32)
    assert "antigravity" not in sys.modules
    assert not mark.exists()


def test_weights_of_an_embedding_model(tmp_path: Path, mark: Path) -> None:
    """Of its transformer and of a module after it."""
    whole = write_embedding_model(tmp_path / "model", "mean", "Tanh")
    for module in ("", "2_Dense"):
        folder = shutil.copytree(whole, tmp_path / f"harmed{module}")
        (folder / module / "model.safetensors").unlink()
        hostile = {"linear.weight": Hostile(mark), "more": torch.zeros(2000)}
        torch.save(hostile, folder / module / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"asks for posix\.system"):
            Encoder(read_folder(folder), "cpu", "fp32", False)
    assert not mark.exists()


def test_caches(tmp_path: Path, mark: Path) -> None:
    """Tokenised data and embeddings are plain arrays; an array of objects is a pickle."""
    objects = np.array([Hostile(mark)], dtype=object)
    for name in ("ids.bin", "learned.bin"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "meta.json").write_text("{}")
    np.save(tmp_path / "index.npy", objects, allow_pickle=True)
    with pytest.raises(UserError, match="is damaged"):
        TokenDataset(tmp_path)
    np.save(tmp_path / "index.npy", np.array([[5, 1]]))
    with pytest.raises(UserError, match="do not fit each other"):
        TokenDataset(tmp_path)
    assert not mark.exists()
