"""Answers of saved folders as plain transformers and PEFT give them, in two environments (tests/loads_elsewhere.sh).

Nothing of this project is imported: it runs with other people's releases. Each folder is opened in its own process.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

QUESTIONS = ("What is the capital of France?", "图书馆几点开门？", " two  spaces\tand\n\nlines 123456", "1 + 1 = ?")
NEW_TOKENS = 20
PACKAGES = ("transformers", "peft", "torch")
ADAPTER = "adapter_config.json"


def load(folder: Path) -> Any:
    """The model of a folder, or the adapter on its base, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = folder / ADAPTER
    if not settings.is_file():
        return AutoModelForCausalLM.from_pretrained(str(folder), torch_dtype=torch.float32).eval()
    from peft import PeftModel

    base = json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(folder)).eval()


def answer(folder: Path) -> dict[str, Any]:
    """For every question its prompt's ids, the greedy tokens after it and their log probabilities (nats).

    Without a cache: the model's arithmetic alone.
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(str(folder)), load(folder)
    packages = {name: version(name) for name in PACKAGES}
    found: dict[str, Any] = {"packages": packages, "ids": [], "tokens": [], "logs": []}
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        row, logs = list(ids), []
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                best = model(torch.tensor([row])).logits[0, -1].log_softmax(-1).max(-1)
                row.append(int(best.indices))
                logs.append(float(best.values))
        found["ids"].append(ids)
        found["tokens"].append(row[len(ids) :])
        found["logs"].append(logs)
    return found


def answer_of(python: str, folder: Path) -> dict[str, Any] | str:
    """A folder's answers in another environment, or the last line of why there are none."""
    command = [python, __file__, "--answer", str(folder)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1][:120]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(today: dict[str, Any], then: dict[str, Any]) -> tuple[list[str], bool]:
    """(cells of a row, whether ids and tokens are the same). Log probabilities are compared where the tokens agree."""
    ids, tokens = (sum(a == b for a, b in zip(today[key], then[key], strict=True)) for key in ("ids", "tokens"))
    differences = [
        abs(a - b)
        for k, row in enumerate(today["tokens"]) if row == then["tokens"][k]
        for a, b in zip(today["logs"][k], then["logs"][k], strict=True)
    ]  # fmt: skip
    worst = f"{max(differences):.1e}" if differences else "-"
    return [f"{ids} of {len(QUESTIONS)}", f"{tokens} of {len(QUESTIONS)}", worst], ids + tokens == 2 * len(QUESTIONS)


def table(folders: list[Path], pythons: list[str]) -> bool:
    """Print the comparison of two environments; whether all is the same."""
    top = os.path.commonpath([folder.parent for folder in folders])
    answers = [[answer_of(python, folder) for python in pythons] for folder in folders]
    known = [next((a[k]["packages"] for a in answers if isinstance(a[k], dict)), {}) for k in (0, 1)]
    names = [", ".join(f"{name} {found.get(name, '?')}" for name in PACKAGES) for found in known]
    heads = ["folder", "holds", *names, "ids equal", f"{NEW_TOKENS} greedy tokens equal", "log p differs by at most"]
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    good = True
    for folder, found in zip(folders, answers, strict=True):
        cells = ["-"] * 3
        if isinstance(found[0], dict) and isinstance(found[1], dict):
            cells, same = compared(found[0], found[1])
        else:
            same = False
        good = good and same
        holds = "an adapter" if (folder / ADAPTER).is_file() else "a model"
        loads = ["loads" if isinstance(one, dict) else one.replace("|", "/") for one in found]
        print("| " + " | ".join([f"`{os.path.relpath(folder, top)}`", holds, *loads, *cells]) + " |")
    return good


def main() -> int:
    """`TODAYS_PYTHON OTHER_PYTHON FOLDER...`; exits 1 when a folder does not load in both or its answers differ."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--answer", type=Path, help="print the answers of one folder in this environment")
    parser.add_argument("pythons", nargs="*")
    given = parser.parse_args()
    if given.answer:
        print(json.dumps(answer(given.answer)))
        return 0
    today, then, *folders = given.pythons
    return int(not table([Path(folder).absolute() for folder in folders], [today, then]))


if __name__ == "__main__":
    sys.exit(main())
