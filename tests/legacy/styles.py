"""The styles of old checkpoints, which our own modules in tests/legacy_modules have, and how one is opened."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT

from llmops.legacy import patches
from llmops.models.chat_model import ChatModel, load_tokenizer
from llmops.models.checkpoints import Checkpoint

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
