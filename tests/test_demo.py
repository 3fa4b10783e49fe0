"""The README's first command, from nothing to a result."""

import json
from pathlib import Path

from conftest import chat_main


def test_the_demo_learns(tmp_path: Path) -> None:
    mount = tmp_path / "mnt"
    done = chat_main("--demo", "--mount_path", str(mount), timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    output = mount / "demo" / "output_path"
    results = json.loads((output / "train_results.json").read_text())
    assert results["eval_loss"] <= results["eval_loss_before"] / 2
    after, reference = (
        next(line.split(None, 1)[1] for line in done.stderr.splitlines() if line.strip().startswith(word))
        for word in ("after", "reference")
    )
    assert after == reference  # a question that was held out, answered word for word
    assert (output / "training_loss.png").is_file()
    again = chat_main("--demo", "--mount_path", str(mount))
    assert again.returncode == 0
    assert "this run is finished" in again.stderr


def test_the_demo_needs_a_writable_mount(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = chat_main("--demo", "--mount_path", str(blocked))
    assert done.returncode == 2
    assert "which is a file" in done.stderr
    assert "Traceback" not in done.stderr
