"""bench/gpu.sh works before a GPU is there: some of its parts at their smallest, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from llmops.console import UserError

sys.path.insert(0, str(ROOT / "bench"))
import gpu


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), "--output", str(tmp_path / "results"), "--tiny",
               "--parts", "inference", "--work", str(tmp_path / "work")]  # fmt: skip
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        command, env=environment() | variables, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(next((tmp_path / "results").glob("gpu-cpu-*-tiny.json")).read_text())
    rows = report["parts"]["inference"]["rows"]
    assert [row["what"] for row in rows] == ["adapter beside the base", "adapter merged"]
    assert all("failed" not in row for row in rows)
    assert "| adapter merged |" in done.stdout


def test_without_a_gpu_it_wants_to_be_told_tiny(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no GPU here"):
        gpu.main(["--work", str(tmp_path)])
    with pytest.raises(UserError, match="there is no speed"):
        gpu.main(["--work", str(tmp_path), "--tiny", "--parts", "speed"])


def test_a_part_that_fails_is_a_row_of_the_table() -> None:
    parts = {"runs": {"shows": "all", "failed": "exit code 1", "rows": [{"what": "a", "loss": 0.12345}]}}
    text = gpu.table({"device": "X", "python": "3", "date": "today", "parts": parts})
    assert "failed: exit code 1" in text
    assert "| a | 0.123 |" in text
    speeds = {"speed_lora_7b": {"rows": [{"tokens_per_second": 30.0}]},
              "peer_lora_7b": {"rows": [{"tokens_per_second": 10.0}, {"tokens_per_second": 20.0}]}}  # fmt: skip
    assert gpu.ratio(speeds) == 1.5
    assert gpu.ratio({}) is None
