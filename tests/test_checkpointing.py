"""Checkpoints: whole or not there, damage is found, the best one outlives the rotation."""

from pathlib import Path

import pytest

from train import checkpointing


def make(output: Path, step: int, content: bytes = b"weights") -> Path:
    staged = output / checkpointing.STAGING / f"checkpoint-{step}"
    (staged / "global_step").mkdir(parents=True)
    (staged / "global_step" / "state.pt").write_bytes(content)
    (staged / "model.safetensors").write_bytes(content * 2)
    final = output / staged.name
    checkpointing.publish(staged, final, world_size=2)
    return final


@pytest.mark.parametrize("harm", ["cut", "flip", "delete", "no manifest", "bad manifest"])
def test_damage_is_found_and_the_one_before_is_used(
    tmp_path: Path, harm: str, capfd: pytest.CaptureFixture[str]
) -> None:
    older, newer = make(tmp_path, 9), make(tmp_path, 10)
    assert checkpointing.newest_whole(tmp_path) == newer
    victim = newer / "global_step" / "state.pt"
    if harm == "cut":
        victim.write_bytes(b"weight")
    elif harm == "flip":
        victim.write_bytes(b"weightz")
    elif harm == "delete":
        victim.unlink()
    elif harm == "no manifest":
        (newer / checkpointing.MANIFEST).unlink()
    else:
        (newer / checkpointing.MANIFEST).write_text('{"files": ')
    assert checkpointing.newest_whole(tmp_path) == older
    assert f"{newer} is damaged" in capfd.readouterr().err


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 10, 30, 100):
        make(tmp_path, step)
    checkpointing.rotate(tmp_path, keep=2, best_step=4, judge=checkpointing.damage)
    assert [checkpointing.step_of(path) for path in checkpointing.list_checkpoints(tmp_path)] == [4, 30, 100]


def test_large_files_are_checked_at_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(65 * checkpointing.EDGE))
    before = checkpointing.fingerprint(path)
    with open(path, "r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")
    assert checkpointing.fingerprint(path) != before


def test_linked_files_replace_old_ones(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 1)
    (tmp_path / "model.safetensors").write_bytes(b"old")
    checkpointing.link_files(checkpoint, tmp_path, checkpointing.model_files(checkpoint))
    assert (tmp_path / "model.safetensors").read_bytes() == b"weightsweights"
    assert checkpointing.model_files(checkpoint) == ["model.safetensors"]
