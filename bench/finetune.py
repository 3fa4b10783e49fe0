"""The same fine-tuning work by ours, LLaMA-Factory and TRL, each in its own process; prints a table and JSON lines.

(a) conversations of alpaca_zh; (b) banking77 questions, prepared and trained as the FAQ scenario does: their prompts
begin with the same list of 77 labels.
LoRA rank 8 on all linear layers, fp32, AdamW, batch 8, rows in the file's order, a Llama of about 40M weights or
--model. A row's share of the machine's product rate counts the FLOPs of its conversations when nothing is shared.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from llmops.console import log
from llmops.models import tiny

COUNTS = {"train": 2, "test": 1}  # questions of each of the 77 labels in (b)
FAQ = ["--scenario", "faq"]
INSTRUCTION = "Which intent does the customer's question have? Answer with one of these:"


def make_inputs(work: Path, data: Path) -> tuple[Path, Path, Path]:
    """The model folder and the two data files; the second one is made by the FAQ scenario's own faq/prepare.sh."""
    model, alpaca, banking = work / "llama-40m", work / "alpaca.jsonl", work / "banking" / "train.jsonl"
    if not banking.exists():
        work.mkdir(parents=True, exist_ok=True)
        lines = (data / "alpaca_zh" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        alpaca.write_text("\n".join(lines[:256]) + "\n", encoding="utf-8")
        chosen = {name: first_of_each(data / "banking77" / f"{name}.csv", count) for name, count in COUNTS.items()}
        for name, rows in chosen.items():
            with open(work / f"banking_{name}.csv", "w", encoding="utf-8", newline="") as stream:
                writer = csv.DictWriter(stream, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
        prepare = [
            "bash", str(HERE.parent / "faq" / "prepare.sh"), "--output_dir", str(banking.parent),
            "--data_file", str(work / "banking_train.csv"), "--test_data_file", str(work / "banking_test.csv"),
            "--out_of_scope_ratio", "0", "--instruction", INSTRUCTION,
        ]  # fmt: skip
        subprocess.run(prepare, check=True)
        everything = [line for path in (alpaca, banking) for line in path.read_text(encoding="utf-8").splitlines()]
        texts = [m["content"] for line in everything for m in json.loads(line)["messages"]]
        tiny.write_checkpoint(model, texts, "llama", 16000, hidden=512, layers=8, heads=8)
    return model, alpaca, banking


def plain_chatml(model: Path, folder: Path) -> Path:
    """A folder with the model's files and ChatML without a default system message, which the peers' templates lack."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        link = folder / path.name
        if path.suffix != ".jinja" and not link.exists():
            link.symlink_to(path.resolve())
    (folder / "chat_template.jinja").write_text(tiny.TEMPLATE, encoding="utf-8")
    return folder


def first_of_each(path: Path, count: int) -> list[dict[str, str]]:
    """`count` questions of every label, the labels taking turns."""
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    with open(path, encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            if len(found[row["category"]]) < count:
                found[row["category"]].append(row)
    return [rows[i] for i in range(count) for rows in found.values()]


def run(python: Path, driver: Path, flags: list[str]) -> dict[str, Any]:
    """One driver in a process of its own; its report."""
    done = subprocess.run([str(python), str(driver), *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        log(done.stderr[-2000:])
        return {"failed": done.returncode}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    """Run both parts and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("work", "peers", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each setting; the fastest counts")
    parser.add_argument("--steps_a", type=int, default=32, help="steps of 8 conversations in (a); 32 is all of them")
    parser.add_argument("--steps_b", type=int, default=4, help="steps of 8 questions in (b) for the peers; 20 is all")
    parser.add_argument("--parts", default="ab")
    parser.add_argument("--model", type=Path, help="a real ChatML model instead of the 40M one of random weights")
    args = parser.parse_args()
    model, alpaca, banking = make_inputs(args.work, args.data)
    model = plain_chatml(args.model, args.work / args.model.name) if args.model else model
    ours = (Path(sys.executable), HERE / "ours_sft.py")
    trl = (args.peers / "trl" / "bin" / "python", HERE / "peers" / "trl_sft.py")
    factory = (args.peers / "llamafactory" / "bin" / "python", HERE / "peers" / "llamafactory_sft.py")
    report: dict[str, Any] = {}
    if "a" in args.parts:
        flags = ["--model", str(model), "--data", str(alpaca), "--max_steps", str(args.steps_a)]
        packed = [
            "--max_steps",
            str(max(1, args.steps_a // 8)),
        ]  # a packed row of 1,024 tokens holds about 8 conversations
        settings = [(packing, micro) for packing in ("off", "on") for micro in ("8", "1")]
        cases = [("ours", ours, ["--packing", "on"]), ("ours, padded", ours, ["--packing", "off"])]
        cases += [
            (
                f"{name}, packing {p}, micro-batch {m}", tool,
                ["--packing", p, "--micro_batch_size", m, *(packed if p == "on" else [])],
            )
            for name, tool in (("LLaMA-Factory", factory), ("TRL", trl)) for p, m in settings
        ]  # fmt: skip
        report["a"] = compare("(a) alpaca_zh", cases, flags, args.rounds)
    if "b" in args.parts:
        flags = ["--model", str(model), "--data", str(banking)]
        few = ["--max_steps", str(args.steps_b)]
        cases = [
            ("ours", ours, ["--packing", "on", *FAQ]),
            ("ours, batch 32", ours, ["--packing", "on", "--batch_size", "32", *FAQ]),
            ("ours, batch 128", ours, ["--packing", "on", "--batch_size", "128", *FAQ]),
            *((f"{name}, micro-batch {m}", tool, ["--packing", "off", "--micro_batch_size", m, *few])
              for name, tool in (("LLaMA-Factory", factory), ("TRL", trl)) for m in ("8", "1")),
        ]  # fmt: skip
        report["b"] = compare("(b) banking77, 77 labels in every prompt", cases, flags, args.rounds)
    print(json.dumps(report))
    return 0


def compare(title: str, cases: list[Any], flags: list[str], rounds: int) -> dict[str, Any]:
    """Run all cases in turn, `rounds` times; print a table with the ratio of ours to each."""
    best: dict[str, Any] = {}
    for _ in range(rounds):
        for name, (python, driver), extra in cases:
            found = run(python, driver, [*flags, *extra])
            log(f"{title}, {name}: {found}")
            if name not in best or found.get("samples_per_second", 0) > best[name].get("samples_per_second", 0):
                best[name] = found
    reference = best["ours"]
    best_rate, work = reference["best_flops_per_second"], reference["flops_per_sample"]
    print(f"\n{title}; this machine multiplies {best_rate / 1e9:,.0f} GFLOP/s at best\n")
    print("| | samples/s | ours is | share of that rate | peak memory, MiB | loss of the first step |")
    print("|---|---|---|---|---|---|")
    for name, found in best.items():
        if "failed" in found:
            print(f"| {name} | failed | | | | |")
            continue
        speed = found["samples_per_second"]
        print(
            f"| {name} | {speed:.2f} | {reference['samples_per_second'] / speed:.2f}x | {speed * work / best_rate:.0%} "
            f"| {found['peak_rss_mib']:.0f} | {found['first_loss']:.6f} |"
        )
        same = found["supervised_tokens_first_batch"] == reference["supervised_tokens_first_batch"]
        if same and abs(found["first_loss"] / reference["first_loss"] - 1) > 1e-4:
            print(f"WARNING: {name} has the same first batch and another loss")
    return best


if __name__ == "__main__":
    sys.exit(main())
