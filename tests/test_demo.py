"""The README's first command, from nothing to a result."""

import json
from pathlib import Path

from conftest import chat_main


def test_the_demo_learns(tmp_path: Path) -> None:
    """Whatever settings for runs of one's own are in the environment; nothing of these is touched."""
    mount, own = tmp_path / "mnt", tmp_path / "own"
    own.mkdir()
    (own / "log.txt").write_text("")
    mine = {
        "TRAIN_FILE": "/no/such.jsonl", "TEST_FILE": "/no/such.jsonl", "OUTPUT_PATH": str(own), "MAX_STEPS": "1",
        "OVERWRITE_OUTPUT_PATH": "true", "DRY_RUN": "true", "SEED": "7",
    }  # fmt: skip
    done = chat_main("--demo", "--mount_path", str(mount), timeout=600, **mine)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in own.iterdir()] == ["log.txt"]
    output = mount / "demo" / "output_path"
    results = json.loads((output / "train_results.json").read_text())
    assert results["eval_loss"] <= results["eval_loss_before"] / 2
    after, reference = (
        next(line.split(None, 1)[1] for line in done.stderr.splitlines() if line.strip().startswith(word))
        for word in ("after", "reference")
    )
    assert after == reference  # a question that was held out, answered word for word
    assert (output / "training_loss.png").is_file()
    again = chat_main("--demo", "--mount_path", str(mount), **mine)
    assert again.returncode == 0
    assert "this run is finished" in again.stderr


def test_the_demo_needs_a_writable_mount(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = chat_main("--demo", "--mount_path", str(blocked))
    assert done.returncode == 2
    assert "which is a file" in done.stderr
    assert "Traceback" not in done.stderr
