"""eval/analyze_similar_questions_and_intents for its tests: data that it reads, a run in this process."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval import analyze_similar_questions_and_intents as command

Row = dict[str, Any]


def call(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, Row, str]:
    """(exit code, the JSON, stderr) of a run in this process; stdout holds nothing but the JSON."""
    capfd.readouterr()
    code = command.main([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    assert captured.out.endswith("\n")
    assert "\n" not in captured.out[:-1]
    return code, json.loads(captured.out), captured.err


def write(path: Path, rows: list[Row]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
