"""What a training saves, opened by the software of 2024 and of today: an adapter, a merged model, a whole model.

Small models with random weights, and the models that are named: each is trained for two steps with LoRA from files as
2024 wrote them, and whole from files as today's releases write them. tests/loads_elsewhere.sh compares the results.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from llmops import files
from llmops.console import UserError, log, run_main, stdout_to_stderr
from llmops.models import portable, tiny

DEMO = HERE.parent / "train" / "demo_data" / "train.jsonl"
CONVERSATIONS = 12
SMALL: dict[str, tuple[str, dict[str, Any]]] = {  # of which each would be another model if it were misread
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "qwen2-tied": (
        "qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "tie_word_embeddings": True},
    ),
}  # fmt: skip


def bases(work: Path, models: list[Path]) -> dict[str, Path]:
    """The small models, made here, and those that were named."""
    rows = [json.loads(line) for line in DEMO.read_text(encoding="utf-8").splitlines()]
    texts = [message["content"] for row in rows for message in row["messages"]]
    made = {
        name: tiny.write_checkpoint(
            work / "bases" / name, texts, kind, vocab_size=900, hidden=64, layers=2, heads=4, **settings
        )
        for name, (kind, settings) in SMALL.items()
    }
    return made | {model.name: model.absolute() for model in models}


def as_of_2024(folder: Path, target: Path) -> Path:
    """The same model in files that yesterday's releases read: an adapter's base has to load there, too."""
    shutil.copytree(folder, target)
    portable.make_portable(target, folder)
    return target


def train(base: Path, mount: Path, *flags: str) -> Path:
    """Two steps on a few conversations; where the result is."""
    rows = DEMO.read_text(encoding="utf-8").splitlines(keepends=True)[:CONVERSATIONS]
    files.make_folder(mount / "datasets", "the data's folder")
    files.write_text(mount / "datasets" / "train.jsonl", "".join(rows))
    command = [
        "bash", str(HERE.parent / "chat_main.sh"), "--mount_path", str(mount), "--model_name_or_path", str(base),
        "--max_steps", "2", "--max_seq_len", "256", "--per_device_train_batch_size", "4",
        "--gradient_accumulation_steps", "1", "--tensorboard", "false", *flags,
    ]  # fmt: skip
    log("+ " + " ".join(command))
    subprocess.run(command, check=True)
    return mount / "output_path"


def saved(name: str, base: Path, work: Path) -> list[Path]:
    """The folders that trainings of one model leave."""
    small = base.parent == work / "bases"  # random weights learn nothing at the usual rates
    for path in (work / "2024" / name, work / f"{name}-lora", work / f"{name}-all"):
        shutil.rmtree(path, ignore_errors=True)
    old = as_of_2024(base, work / "2024" / name)
    rates = (("--learning_rate", "0.01"), ("--learning_rate", "0.001")) if small else ((), ())
    adapter = train(old, work / f"{name}-lora", "--merge_lora", "true", *rates[0])
    whole = train(base, work / f"{name}-all", "--train_type", "all", *rates[1])
    return [adapter, adapter / "merged", whole]


def main() -> int:
    """Train, then print the folders, one a line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is made")
    parser.add_argument("models", nargs="*", type=Path, help="checkpoint folders beside the small ones")
    given = parser.parse_args()

    def body() -> int:
        work = given.work.absolute()
        for model in given.models:
            if not files.is_file(model / "config.json"):
                raise UserError(f"{model} has no config.json; expected a Hugging Face checkpoint folder")
        with stdout_to_stderr():
            found = [folder for name, base in bases(work, given.models).items() for folder in saved(name, base, work)]
        print(*found, sep="\n")
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
