"""Kills at random moments of a quick job; tests/job_kills.sh does the same to trainings."""

from pathlib import Path

import job_kills
import pytest


@pytest.mark.parametrize("seed", [1, 2])
def test_the_platform_knows_what_is_true(tmp_path: Path, seed: int) -> None:
    work = job_kills.scoring()
    longest = job_kills.seconds_of(work, tmp_path / "undisturbed")
    assert [both for both in job_kills.trials(work, tmp_path, 4, seed, longest) if both[1]] == []
