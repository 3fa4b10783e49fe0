"""banking77 through the FAQ scenario: prepare, train from scratch, predict, score; then answers per second.

The peer is transformers' generate with prefix_allowed_tokens_fn: the usual way to constrain, with its key/value cache,
at the batch size that is fastest for it, on the same questions; both must choose the same intents.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from llmops.console import log
from llmops.generation.choice_search import Tree
from llmops.generation.generator import Generator
from llmops.intents.catalog import INTENTS_NAME, load_catalog
from llmops.intents.prediction import candidate_tokens
from llmops.models import tiny
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint

WORDS = r" ?\w+| ?[^\w\s]+|\s+"  # underscores belong to words
PEER_BATCH_SIZES = (4, 16, 64)


def command(*parts: str) -> str:
    """Run one of the project's commands; its stdout."""
    log("+ " + " ".join(parts))
    return subprocess.run(["bash", *parts], check=True, stdout=subprocess.PIPE, text=True).stdout


def make_base(folder: Path, datasets: Path) -> None:
    """An untrained Llama of about 10M weights; its tokenizer is trained on the questions, an intent is one token."""
    rows = [json.loads(line) for line in (datasets / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    intents = list(load_catalog(datasets / INTENTS_NAME).intents)
    texts = [row["question"] for row in rows] + intents * 20 + [rows[0]["messages"][0]["content"]] * 50
    tiny.write_checkpoint(
        folder, texts, "llama", vocab_size=5000, hidden=448, layers=3, heads=7, num_key_value_heads=7,
        tie_word_embeddings=True, initializer_range=0.04, attention_dropout=0.1, words=WORDS, lowercase=True,
    )  # fmt: skip


def timed(work: Callable[[], Sequence[int]]) -> tuple[float, list[int]]:
    """(seconds, result) of one call."""
    started = time.perf_counter()
    result = list(work())
    return time.perf_counter() - started, result


def generate_constrained(model: Any, tokenizer: Any, prompts: Sequence[list[int]], tree: Tree, size: int) -> list[int]:
    """The chosen candidates by transformers' generate, `size` prompts at a time, longest first."""
    chosen: dict[int, int] = {}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in rows]}, padding_side="left", return_tensors="pt")
        width = batch["input_ids"].shape[1]

        def allowed(_: int, ids: Any, width: int = width) -> list[int]:
            return tree.children.get(tuple(ids[width:].tolist()), [tokenizer.pad_token_id])

        out = model.generate(
            **batch, max_new_tokens=max(map(len, tree.candidates)), do_sample=False, prefix_allowed_tokens_fn=allowed,
            eos_token_id=tree.candidates[0][-1], pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for i, ids in zip(rows, out[:, width:].tolist(), strict=True):
            end = ids.index(tree.candidates[0][-1]) + 1
            chosen[i] = tree.index[tuple(ids[:end])]
    return [chosen[i] for i in range(len(prompts))]


def compare(output: Path, datasets: Path, count: int) -> dict[str, Any]:
    """Questions per second of ours and of the peer on the first `count` test questions."""
    import torch

    catalog = load_catalog(datasets / INTENTS_NAME)
    opened = ChatModel(Checkpoint(output))
    chat = opened.chat
    rows = [json.loads(line) for line in (datasets / "test.jsonl").read_text(encoding="utf-8").splitlines()][:count]
    prompts = [chat.prompt(row["messages"][:-1]) for row in rows]
    tree = Tree(candidate_tokens(chat, rows[0]["messages"][:-1], catalog.answers()))

    def load() -> Any:
        return opened.load(torch.float32).eval()

    ours = Generator(load(), chat.tokenizer.pad_token_id, batch_size=64)
    seconds, chosen = timed(
        lambda: [c.ranked[0][0] for _, c in sorted(ours.choose(prompts, [tree] * len(prompts)), key=lambda p: p[0])]
    )
    report: dict[str, Any] = {"questions": len(rows), "ours_per_second": round(len(rows) / seconds, 1)}
    model = load()
    best = 0.0
    for size in PEER_BATCH_SIZES:
        few = prompts[: max(64, size)]
        with torch.inference_mode():
            seconds, same = timed(lambda n=size, p=few: generate_constrained(model, chat.tokenizer, p, tree, n))
        report[f"generate_batch_{size}_per_second"] = round(len(few) / seconds, 2)
        report[f"generate_batch_{size}_same_choice"] = sum(
            a == b for a, b in zip(same, chosen, strict=False)
        ) / len(few)  # fmt: skip
        best = max(best, len(few) / seconds)
    report["ratio"] = round(report["ours_per_second"] / best, 1)
    return report


def main() -> int:
    """Run all of it and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.csv and test.csv")
    parser.add_argument("--epochs", default="10")
    parser.add_argument("--speed_questions", type=int, default=512)
    args = parser.parse_args()
    faq, datasets, output = HERE.parent / "faq", args.work / "datasets", args.work / "output_path"
    command(
        str(faq / "prepare.sh"), "--data_file", str(args.data / "train.csv"), "--output_dir", str(datasets),
        "--test_data_file", str(args.data / "test.csv"), "--out_of_scope_ratio", "0",
    )  # fmt: skip
    base = args.work / "base"
    if not (base / "config.json").is_file():
        make_base(base, datasets)
    started = time.monotonic()
    command(
        str(HERE.parent / "chat_main.sh"), "--scenario", "faq", "--mount_path", str(args.work), "--train_type", "all",
        "--model_name_or_path", str(base), "--per_device_train_batch_size", "64", "--learning_rate", "1e-3",
        "--num_train_epochs", args.epochs, "--weight_decay", "0.3", "--gradient_checkpointing", "false",
        "--tensorboard", "false",
    )  # fmt: skip
    minutes = (time.monotonic() - started) / 60
    predictions = output / "predictions.jsonl"
    command(
        str(faq / "predict.sh"), "--mount_path", str(args.work), "--input_file", str(datasets / "test.jsonl"),
        "--output_file", str(predictions),
    )  # fmt: skip
    (scores,) = json.loads(command(str(faq / "score.sh"), "--predictions", str(predictions)))["results"]
    report = {"training_minutes": round(minutes, 1), "weights": count_weights(base)}
    report |= {key: scores[key] for key in ("questions", "accuracy", "accuracy_standard_error", "macro_f1")}
    print(json.dumps(report | {"speed": compare(output, datasets, args.speed_questions)}))
    return 0


def count_weights(folder: Path) -> int:
    """Weights of a checkpoint."""
    import torch

    return sum(p.numel() for p in ChatModel(Checkpoint(folder)).weights(torch.float32).parameters())


if __name__ == "__main__":
    sys.exit(main())
