"""The checkpoint under test, what is made of it, and how differences are judged."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmops.conversations import data_files
from llmops.formats.chat_format import ChatFormat
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from train.batches import PaddedCollator, to_device

ROOT = Path(__file__).resolve().parent.parent.parent
ENTRY = ROOT / "tests" / "check_checkpoint.py"
DEMO = ROOT / "train" / "demo_data"
TEXTS = ("hello", "你好，世界！ABC and more words", "How many days are in a week? 7, 七天。", "一二三 四五六")
QUESTIONS = ("你好", "What is the capital of France, and of Spain?", "请介绍一下你自己，用一句话。")
SMALL = 1_000_000_000  # weights; up to here every weight is trained as well, above only adapters
UNEQUAL = (4, 11, 7)  # new tokens of the processes that generate together


@dataclass
class Subject:
    """The checkpoint under test and what is made of it, each once."""

    folder: Path
    mode: str
    dtype: torch.dtype
    processes: int
    work: Path
    device: torch.device
    outputs: dict[str, Path] = field(default_factory=dict)

    def open(self) -> None:
        """Open all that every row needs. Raises UserError for what would fail them all alike: mode, package, file."""
        self.opened.checkpoint.family()
        _ = self.chat, self.model

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.opened.checkpoint.config

    @cached_property
    def ships_code(self) -> bool:
        """Whether the model's classes come with the checkpoint."""
        return "auto_map" in self.config

    @cached_property
    def opened(self) -> ChatModel:
        """The checkpoint as every command opens it."""
        return ChatModel(Checkpoint(self.folder, self.mode, trust_remote_code=True))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.opened.tokenizer

    @property
    def chat(self) -> ChatFormat:
        """How conversations are written."""
        return self.opened.chat

    @cached_property
    def model(self) -> Any:
        """The model, in evaluation mode, with every weight as loaded."""
        return self.load(self.folder)

    def load(self, folder: Path) -> Any:
        """A model of this or another folder on the device."""
        return ChatModel(Checkpoint(folder, trust_remote_code=True)).weights(self.dtype).to(self.device).eval()

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Prompts of different lengths."""
        return [self.chat.prompt([{"role": "user", "content": text}]) for text in QUESTIONS]

    @property
    def bound(self) -> float:
        """The largest relative difference that is rounding."""
        return {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}[self.dtype]

    @cached_property
    def small(self) -> bool:
        """Whether all weights can be trained here."""
        return sum(p.numel() for p in self.model.parameters()) <= SMALL

    def tensor(self, ids: list[int]) -> torch.Tensor:
        """One row of ids on the device."""
        return torch.tensor([ids], device=self.device)

    def batch(self, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts as one padded batch: ids and 2-D attention mask."""
        width = max(map(len, self.prompts))
        ids = torch.full((len(self.prompts), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(self.prompts):
            span = slice(width - len(prompt), width) if left else slice(0, len(prompt))
            ids[i, span], mask[i, span] = torch.tensor(prompt), 1
        return ids.to(self.device), mask.to(self.device)

    @cached_property
    def samples(self) -> list[dict[str, np.ndarray]]:
        """Training samples of the demo's first conversations."""
        found = data_files.read_conversations(DEMO / "train.jsonl")
        rows = (read.conversation.messages for read in found if isinstance(read, data_files.Read))
        rendered = [
            one for _, messages in zip(range(4), rows, strict=False) for one in self.chat.conversation(messages)
        ]
        return [{"ids": np.array(r.ids, np.int32), "learned": np.array(r.learned)} for r in rendered]

    def training_batch(self) -> dict[str, Any]:
        """The first samples as a padded batch on the device, as training makes it."""
        tokenizer = self.tokenizer
        left = tokenizer.padding_side == "left" and not tokenizer.is_fast
        batch = PaddedCollator(tokenizer.pad_token_id, left)(self.samples[:3])
        return to_device(batch, self.device)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value; in half precision that of the whole (L2)."""
    half = found.dtype != torch.float32
    found, expected = found.float().cpu(), expected.float().cpu()
    assert found.isfinite().all(), "not all values are finite"
    if half:
        return float((found - expected).norm() / expected.norm())
    return float((found - expected).abs().max() / expected.abs().max())


def within(value: float, bound: float, what: str) -> str:
    """`what` with its difference, which must not pass the bound."""
    assert value <= bound, f"{what} differ by {value:.1e} (bound {bound:.0e})"
    return f"{what} differ by {value:.1e}"
