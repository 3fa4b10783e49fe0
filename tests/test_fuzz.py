"""Some hundred harmed files through every command; `bash tests/fuzz.sh` runs thousands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from fuzz import mutations

COUNT, HEAVY_EVERY = 320, 7


@pytest.mark.slow
def test_what_is_harmed_is_refused_or_read_and_nothing_else(tmp_path: Path) -> None:
    """No traceback, no hang, no half output; both ends are reached; every kind of input takes part."""
    flags = ["--heavy_every", str(HEAVY_EVERY), "--json", str(tmp_path / "outcomes.jsonl")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fuzz" / "run.py"), str(COUNT), "1", *flags],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    outcomes = [json.loads(line) for line in (tmp_path / "outcomes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(outcomes) == COUNT
    kinds = [outcome["kind"] for outcome in outcomes]
    assert kinds.count("error") > COUNT / 3
    assert kinds.count("accepted") > COUNT / 20
    assert len({outcome["subject"] for outcome in outcomes}) > 50
    assert {outcome["command"] for outcome in outcomes} >= {"finetune", "prepare", "predict", "score", "similar"}


def test_a_case_is_the_same_each_time(tmp_path: Path) -> None:
    import random

    raw = json.dumps([{"a": [1, "b"], "c": None}], indent=1).encode()
    for seed in range(300):
        made = []
        for name in ("one", "two"):
            path = tmp_path / name
            mutations.clear(path)
            path.write_bytes(raw)
            mutation = mutations.mutate_file(path, "json", random.Random(seed))
            regular = path.is_file() and path.stat().st_size < 1 << 24
            made.append((mutation, path.read_bytes() if regular else None))
        assert made[0] == made[1]
