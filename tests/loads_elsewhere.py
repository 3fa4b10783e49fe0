"""Answers of saved folders as plain transformers and PEFT give them, and their comparison (tests/loads_elsewhere.sh).

Nothing of this project is imported: it runs with other people's releases.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

QUESTIONS = ("What is the capital of France?", "图书馆几点开门？", " two  spaces\tand\n\nlines 123456", "1 + 1 = ?")
NEW_TOKENS = 20


def load(folder: Path) -> Any:
    """The model of a folder, or the adapter on its base, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = folder / "adapter_config.json"
    if not settings.is_file():
        return AutoModelForCausalLM.from_pretrained(str(folder), torch_dtype=torch.float32).eval()
    from peft import PeftModel

    base = json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(folder)).eval()


def answer(folder: Path) -> list[list[list[int]]]:
    """[prompt's ids, the greedy tokens after it] for every question, without a cache: the model's arithmetic alone."""
    import torch
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(str(folder)), load(folder)
    found = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        row = list(ids)
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        found.append([ids, row[len(ids) :]])
    return found


def main() -> int:
    """`answer FILE FOLDER...` or `compare FILE FILE`; exits 1 when a folder's answers differ."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("answer", "compare"))
    parser.add_argument("paths", nargs="+", type=Path)
    given = parser.parse_args()
    if given.what == "answer":
        target, *folders = given.paths
        target.write_text(json.dumps({str(folder): answer(folder) for folder in folders}), encoding="utf-8")
        return 0
    one, other = (json.loads(path.read_text(encoding="utf-8")) for path in given.paths)
    for folder, expected in one.items():
        ids, tokens = (sum(a[k] == b[k] for a, b in zip(expected, other[folder], strict=True)) for k in (0, 1))
        print(f"{folder}: ids of {ids} of {len(expected)} prompts equal, {NEW_TOKENS} greedy tokens of {tokens}")
    return int(one != other)


if __name__ == "__main__":
    sys.exit(main())
