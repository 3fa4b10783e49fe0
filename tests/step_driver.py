"""One process of a run whose optimizer steps are taken apart: `python tests/step_driver.py SETTINGS.json`.

SETTINGS holds `config` (of train.config.Config) and `splits` ([rows, tokens] each). Prints one JSON line: for every
split the loss and the gradient norm of the first step, with a learning rate of 0; and what was asked of a tensor's
value between two optimizer steps. RANK, WORLD_SIZE and the rest come from the environment.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmops.console import stdout_to_stderr
from train import session
from train import trainer as trainer_module
from train.config import Config
from train.steps import Split

WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim", "equal")


class Watch(TorchDispatchMode):
    """Notes every operation that waits for a device: reading a value, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        to_host = name in ("_to_copy", "copy_") and moves_to_host(args, out)
        if name in WAITING or to_host:
            self.found.append(name)
        return out


def moves_to_host(args: tuple[Any, ...], out: Any) -> bool:
    """Whether a copy goes from a device to the host; never on a CPU alone."""
    source = args[-1] if isinstance(args[-1], torch.Tensor) else args[0]
    return isinstance(out, torch.Tensor) and source.device.type != "cpu" and out.device.type == "cpu"


def first_step(trainer: Any, split: Split) -> dict[str, Any]:
    """The first step of the epoch with this split, as the loader makes it."""
    trainer.split = split
    return next(iter(trainer.get_train_dataloader()))


def watched(trainer: Any, model: torch.nn.Module, step: dict[str, Any]) -> list[str]:
    """What waits in a step up to where the optimizer steps; the look for NaN just before that is left out."""
    trainer._stop_if_broken = lambda total: None
    engine_step, model.step = model.step, lambda: None
    watch = Watch()
    with watch:
        trainer.training_step(model, step)
    del trainer._stop_if_broken
    model.step = engine_step
    model.optimizer.zero_grad()
    return watch.found


def spoiled(losses: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same losses, looked at."""

    def look(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        found = losses(model, batch)
        found.sum().item()
        return found

    return look


def main() -> None:
    """Build the trainer as a run does, take its first step in every way."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with stdout_to_stderr():
        config = Config(**settings["config"])
        trainer, _ = session.build_trainer(config, session.prepare_data(config, encodes=True))
        trainer.create_optimizer_and_scheduler(10)
        model, trainer.optimizer, trainer.lr_scheduler = trainer.accelerator.prepare(
            trainer.model, trainer.optimizer, trainer.lr_scheduler
        )
        trainer.model_wrapped = trainer.deepspeed = model
        results = []
        for rows, tokens in settings["splits"]:
            step = first_step(trainer, Split(rows, tokens))
            loss = trainer.training_step(model, step)
            total = session.dist.all_reduce(loss) or loss / session.dist.get_world_size()
            results.append([len(step["batches"]), float(total), float(model.get_global_grad_norm())])
        step = first_step(trainer, Split(2, 0))
        clean = watched(trainer, model, step)
        trainer_module.target_losses = spoiled(trainer_module.target_losses)
        dirty = watched(trainer, model, step)
    print(json.dumps({"steps": results, "clean": clean, "dirty": dirty}))


if __name__ == "__main__":
    main()
