"""The layers of a model that LoRA may adapt, and those that it does."""

from collections.abc import Sequence
from typing import Any

import torch

from llmops.console import UserError
from llmops.keyboard import instead


def linear_layers(model: torch.nn.Module) -> list[str]:
    """Short names of the linear layers, without the output head; each once, in order of appearance."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    names = [
        name.rpartition(".")[2] for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]  # fmt: skip
    return list(dict.fromkeys(names))


def choose_lora_layers(model: torch.nn.Module, wanted: str, defaults: Sequence[str] | None) -> list[str]:
    """The LoRA layers: those asked for, else the family's, else every linear layer.

    Raises UserError for a name that fits no layer; it lists the names that exist.
    """
    existing = linear_layers(model)
    names = [name.strip() for name in wanted.split(",") if name.strip()] or list(defaults or existing)
    missing = [name for name in names if name not in existing]
    if missing:
        raise UserError(
            f"--lora_module_name: no layer is called {', '.join(missing)}; "
            f"this model's layers are {', '.join(existing)}{instead(wanted)}"
        )
    return names
