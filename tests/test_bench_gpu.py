"""bench/gpu.sh works before a GPU is there: its parts at their smallest, and how it holds them to their time."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import ROOT, environment

from llmops.console import RunStopped, UserError

sys.path.insert(0, str(ROOT / "bench"))
import gpu
import gpu_bench
from gpu_speed import covered

ON_CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}


def rows_of(work: Path, *parts: str) -> list[dict[str, Any]]:
    """The rows of some parts at their smallest, in one process; none may fail."""
    command = [sys.executable, str(ROOT / "bench" / "gpu_parts.py"), *parts, "--work", str(work), "--tiny"]
    done = subprocess.run(
        command, env=environment() | ON_CPU, capture_output=True, text=True, timeout=280, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_and_speeds_run_on_a_cpu(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "numerics", "kernels", "speed_lora_7b", "peer_lora_7b", "speed_full_7b")
    assert len(rows) == 13 + 4 + 3 + 2 + 1
    errors = [row[name] for row in rows[:13] for name in ("forward", "backward", "dq", "dk", "dv") if name in row]
    assert len(errors) == 12 * 4 + 2
    assert max(errors) < 1e-5
    assert all(row["tokens_per_second"] > 0 for row in rows[17:])


def test_whole_runs_and_a_killed_one_on_a_cpu(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "runs", "bare_path")
    assert [row.get("saved_dtype") for row in rows] == ["bfloat16", "bfloat16", None, None]
    assert rows[2]["loss_after"] == pytest.approx(rows[2]["loss_alone"], rel=1e-2)
    assert (rows[3]["loss"], rows[3]["tracebacks"]) == ("some rows at a time", 0)


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), "--output", str(tmp_path / "results"), "--tiny",
               "--parts", "inference", "--work", str(tmp_path / "work")]  # fmt: skip
    done = subprocess.run(command, env=environment() | ON_CPU, capture_output=True, text=True, timeout=280, check=False)
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


GRANDCHILD = """
import pathlib, subprocess, sys
child = subprocess.Popen(["sleep", "300"])
pathlib.Path(sys.argv[3], "child").write_text(str(child.pid))
child.wait()
"""


def test_a_part_that_is_out_of_time_ends_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpu_parts.py").write_text(GRANDCHILD)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    done = gpu.run_part(gpu.Part("slow", "", 1), False, tmp_path, 3)
    assert done["failed"] == "not done after 3 s"
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_every_part_has_time() -> None:
    """The default total is less than the parts' own limits together; what one leaves goes to the later ones."""
    left, limits = 25 * 60.0, []
    for number, part in enumerate(gpu.PARTS):
        limits.append(gpu.limit_of(part, gpu.PARTS[number + 1 :], left, False))
        left -= limits[-1]
    assert min(limits) > 60
    assert left == pytest.approx(0)
    assert all(limit < part.seconds for limit, part in zip(limits, gpu.PARTS, strict=True))
    assert gpu.limit_of(gpu.PARTS[-1], (), 1000, False) == gpu.PARTS[-1].seconds
    assert gpu.limit_of(gpu.PARTS[-1], (), -5, False) == 0


def test_a_row_that_fails_is_followed_by_the_next(tmp_path: Path) -> None:
    out = io.StringIO()
    bench = gpu_bench.Bench(tmp_path, True, out)

    def fail(error: Exception) -> dict[str, Any]:
        raise error

    bench.each("a", lambda: fail(torch.OutOfMemoryError("too much")))
    assert bench.failures == 0
    for error in (UserError("no"), RunStopped("no"), AssertionError("the wrong dtype")):
        bench.each("b", lambda one=error: fail(one))
    bench.each("c", lambda: {"seconds": 1.0})
    assert bench.failures == 3
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert rows[0]["failed"] == "OutOfMemoryError: too much"
    assert rows[3]["failed"] == "AssertionError: the wrong dtype"
    assert rows[4] == {"what": "c", "seconds": 1.0}


def test_the_time_of_kernels_that_overlap_counts_once() -> None:
    assert covered([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 5.0
    assert covered([]) == 0
