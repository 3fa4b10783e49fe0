"""bench/gpu.sh works before a GPU is there: some of its parts at their smallest, in processes of their own."""

import json
import subprocess
from pathlib import Path

from conftest import ROOT, environment


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "bench" / "gpu.sh"), "--output", str(tmp_path / "results"), *arguments]
        variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
        return subprocess.run(
            command, env=environment() | variables, capture_output=True, text=True, timeout=280, check=False
        )

    work = ("--work", str(tmp_path / "work"))
    done = start("--tiny", "--parts", "kernels,inference", *work)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(next((tmp_path / "results").glob("gpu-cpu-*-tiny.json")).read_text())
    assert [row["what"] for row in report["parts"]["inference"]["rows"]] == [
        "adapter beside the base", "adapter merged"
    ]  # fmt: skip
    assert all("failed" not in row for part in report["parts"].values() for row in part["rows"])
    assert "| attention in flex, 256 tokens |" in done.stdout
    refused = start(*work)
    assert refused.returncode == 2
    assert "there is no GPU here" in refused.stderr
