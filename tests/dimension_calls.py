"""eval/evaluate_model_from_five_dimensions for its tests: its shipped samples, a run in this process."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval import evaluate_model_from_five_dimensions as command
from eval.samples import Loaded

ALL = list(command.DIMENSIONS)


def load(name: str, **options: Any) -> Loaded:
    """A dimension's shipped samples, whatever lies in mnt."""
    options = {"data_dir": str(command.SAMPLES)} | options
    return command.load_data(command.DIMENSIONS[name], command.Options(**options)).loaded


def call(
    capfd: pytest.CaptureFixture[str], model: Path | str, dimensions: Any = "", options: Any = ""
) -> tuple[int, Any, str]:
    """(exit code, the JSON or None, stderr) of a run in this process."""
    capfd.readouterr()
    texts = [text if isinstance(text, str) else json.dumps(text) for text in (dimensions, options)]
    code = command.main([str(model), *texts])
    captured = capfd.readouterr()
    return code, json.loads(captured.out) if captured.out else None, captured.err


def lines_of(path: Path) -> list[dict[str, Any]]:
    """A jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
