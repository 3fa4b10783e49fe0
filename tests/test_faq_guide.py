"""Every command of faq/README.md, as it stands there, in a copy of the project with tiny checkpoints of these names."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, environment
from embedding_model import write_embedding_model

from llmops.intents.questions import read_faq
from llmops.models import tiny

BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
# the demo has a test of its own; Docker is not for a test suite
ELSEWHERE = ("--demo", "docker run")
# the commands are the guide's, the trainings short; quick settings reach chat_main.sh through the environment
QUICK = {
    "MAX_STEPS": "2",
    "TENSORBOARD": "false",
    "GRADIENT_CHECKPOINTING": "false",
    "PER_DEVICE_TRAIN_BATCH_SIZE": "4",
}


def commands(path: Path) -> list[str]:
    """The bash blocks of a guide."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git knows, with mnt/ as the guide describes it."""
    folder = tmp_path_factory.mktemp("project")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    data = read_faq(ROOT / "faq" / "demo_data" / "faq.jsonl")
    texts = [text for record in data.records for text in (*record.questions, record.intent)]
    checkpoint = tiny.write_checkpoint(
        folder / "mnt" / "Qwen1.5-7B-Chat", texts, "qwen2", vocab_size=1500, hidden=32, layers=2, heads=2
    )
    write_embedding_model(folder / "mnt" / "all-MiniLM-L6-v2", "mean")
    # the guide's example of a model without a chat template, of a family that has no file
    other = folder / "mnt" / "My-Mistral-Chat"
    shutil.copytree(checkpoint, other)
    (other / "chat_template.jinja").unlink()
    config = json.loads((other / "config.json").read_text())
    for key in ("layer_types", "use_sliding_window", "max_window_layers"):
        config.pop(key, None)
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    (other / "config.json").write_text(json.dumps(config))
    template = re.search(
        r"Save this as `(llmops/formats/templates/mistral\.json)`:\n\n```json\n(.*?)^```",
        (ROOT / "faq" / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL,
    )  # fmt: skip
    assert template
    (folder / template[1]).write_text(template[2], encoding="utf-8")
    return folder


def test_both_languages_have_the_same_commands() -> None:
    assert commands(ROOT / "faq" / "README.md") == commands(ROOT / "faq" / "README.zh-CN.md")


def test_every_command_of_the_guide(project: Path) -> None:
    ran = 0
    for block in commands(ROOT / "faq" / "README.md"):
        if any(mark in block for mark in ELSEWHERE):
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=project, env=environment() | QUICK, text=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr
        for line in done.stdout.splitlines():
            json.loads(line)
        ran += 1
    assert ran >= 12
    for name in ("predictions.jsonl", "predictions_unconstrained.jsonl", "predictions.png", "merged/config.json"):
        assert (project / "mnt" / "output_path" / name).is_file(), name
    assert (project / "mnt" / "mistral" / "output_path" / "intents.json").is_file()
