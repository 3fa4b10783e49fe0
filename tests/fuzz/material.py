"""The sound files that are harmed: small real checkpoints, data, runs and caches, made once by the toolkit itself."""

import csv
import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
CONVERSATIONS = 6


def write(path: Path, text: str) -> None:
    """A text file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_lines(path: Path, rows: list[Any]) -> None:
    """JSON lines."""
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def conversations() -> list[Any]:
    """The first rows of the demo's data."""
    lines = (ROOT / "train" / "demo_data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:CONVERSATIONS]]


def make_data(folder: Path) -> None:
    """Conversations, FAQ data in its three forms, predictions, a DeepSpeed file, templates, logs, benchmarks."""
    rows = conversations()
    for name in ("train", "test", "retention"):
        write_lines(folder / f"{name}.jsonl", rows)
    make_shapes(folder, rows)
    shutil.copy(ROOT / "train" / "ds_zero2.json", folder / "ds.json")
    faq = [
        {"instruction": "i", "question": f"问题{k}怎么办{n}", "intent": f"意图{n}", "output": f"答案{n}"}
        for n in range(6)
        for k in range(3)
    ]
    faq.append({"instruction": "i", "input": "['怎么了？', '出什么事了']", "intent": "意图1", "output": "答案1"})
    write_lines(folder / "faq.jsonl", faq)
    write(folder / "faq.json", json.dumps(faq, ensure_ascii=False, indent=1))
    header = ["question", "intent", "output"]
    table = [header, *([row[key] for key in header] for row in faq[:-1])]
    write(folder / "faq.csv", "".join(",".join(row) + "\n" for row in table))
    shutil.copytree(ROOT / "llmops" / "formats" / "templates", folder / "templates")
    shutil.copytree(ROOT / "tests" / "logs", folder / "logs")
    losses = [{"step": k, "epoch": k / 4, "loss": 3 / k, "eval_loss": 3 / k, "retention_loss": 2} for k in range(1, 9)]
    write_lines(folder / "log.txt", losses)
    scores = {"evaluation_results": {"inference_ability": 0.5, "innovation_capacity": 0.25}, "model": "mnt/other"}
    write(folder / "compared" / "eval_results.json", json.dumps(scores, indent=2))
    make_benchmarks(folder / "benchmarks")


def make_shapes(folder: Path, rows: list[Any]) -> None:
    """The conversations in other shapes and kinds of file: ShareGPT, Alpaca, csv, parquet, a saved dataset."""
    import datasets

    pairs = [(row["messages"][0]["content"], row["messages"][-1]["content"]) for row in rows]
    talks = [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in pairs]
    write(folder / "sharegpt.json", json.dumps(talks, ensure_ascii=False))
    write_lines(folder / "alpaca.jsonl", [{"instruction": a, "input": "", "output": b} for a, b in pairs])
    with (folder / "talks.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("query", "response"), *pairs])
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(folder / "talks.parquet")
    table.save_to_disk(folder / "saved")


def make_benchmarks(folder: Path) -> None:
    """The first samples of the benchmark files that ship with the toolkit, in their layout."""
    shipped = ROOT / "eval" / "eval_datasets"
    for name in ("afqmc/dev.json", "tnews/dev.json", "m3ke/data/dev/Everyday_Law-Social_Sciences-Other.jsonl"):
        write(folder / name, "".join((shipped / name).read_text(encoding="utf-8").splitlines(keepends=True)[:3]))
    passages = json.loads((shipped / "cmrc2018" / "cmrc2018_dev.json").read_text(encoding="utf-8"))[:1]
    passages[0] |= {"context_text": passages[0]["context_text"][:150], "qas": passages[0]["qas"][:2]}
    write(folder / "cmrc2018" / "cmrc2018_dev.json", json.dumps(passages, ensure_ascii=False))
    task = "bigbench/subtask001_quoref_question_generation/task.json"
    found = json.loads((shipped / task).read_text(encoding="utf-8"))
    found["examples"] = [e | {"input": e["input"][:150]} for e in found["examples"][:2]]
    write(folder / task, json.dumps(found, ensure_ascii=False))


def make_models(folder: Path) -> None:
    """A tiny Llama (safetensors, and once more as .bin), an adapter on it, and an embedding model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmops.models import tiny

    texts = [message["content"] for row in conversations() for message in row["messages"]]
    model = tiny.write_checkpoint(folder / "model", texts, vocab_size=400, hidden=16, layers=1)
    write(model / "special_tokens_map.json", json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}))
    if not (model / "chat_template.jinja").exists():
        write(model / "chat_template.jinja", tiny.TEMPLATE)
    binary = folder / "binary_model"
    shutil.copytree(model, binary)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (binary / "model.safetensors").unlink()
    torch.save(loaded.state_dict(), binary / "pytorch_model.bin")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(loaded, lora).save_pretrained(folder / "adapter")
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = "/nowhere/model"  # found beside the adapter, wherever the copy is
    write(folder / "adapter" / "adapter_config.json", json.dumps(settings, indent=2))
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "adapter")
    make_embedder(folder / "embedder", texts)


def make_embedder(folder: Path, texts: list[str]) -> None:
    """A random BERT in sentence-transformers' layout, with a dense layer."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(texts, vocab_size=300, show_progress=False)
    BertTokenizerFast(tokenizer_object=trained._tokenizer, model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=trained.get_vocab_size(), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    modules = [
        {"idx": k, "name": str(k), "path": f"{k}_{kind}" if k else "", "type": f"sentence_transformers.models.{kind}"}
        for k, kind in enumerate(kinds)
    ]
    write(folder / "modules.json", json.dumps(modules, indent=1))
    write(folder / "sentence_bert_config.json", json.dumps({"max_seq_length": 32, "do_lower_case": False}))
    general = {"prompts": {"query": ""}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write(folder / "config_sentence_transformers.json", json.dumps(general))
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    write(folder / "1_Pooling" / "config.json", json.dumps(pooling))
    dense = {"in_features": 16, "out_features": 8, "activation_function": "torch.nn.modules.activation.Tanh"}
    write(folder / "2_Dense" / "config.json", json.dumps(dense))
    weights = {"linear.weight": torch.randn(8, 16), "linear.bias": torch.randn(8)}
    save_file(weights, folder / "2_Dense" / "model.safetensors")


def make_prepared(folder: Path) -> None:
    """What faq/prepare writes, and predictions as faq/predict writes them."""
    from faq import prepare

    with redirect_stdout(StringIO()):
        assert prepare.main(["--data_file", str(folder / "faq.jsonl"), "--output_dir", str(folder / "prepared")]) == 0
    rows = [
        {"question": f"q{k}", "intent": f"意图{k % 3}", "known": True, "reply": "r", "probability": 0.5,
         "runner_up": {"intent": "意图1", "probability": 0.25}, "constrained": True, "reference": f"意图{k % 2}"}
        for k in range(24)
    ]  # fmt: skip
    write_lines(folder / "predictions.jsonl", rows)


def make_run(folder: Path) -> None:
    """A finished run's folder as training leaves it, and tokenised data in its cache."""
    from llmops.models.chat_model import ChatModel
    from llmops.models.checkpoints import Checkpoint
    from train import checkpointing, ownership
    from train.flags import parse
    from train.run_folder import data_digest
    from train.source import Source
    from train.token_cache import load_or_encode

    output = folder / "run"
    output.mkdir()
    config, _ = parse(run_flags())
    folders = ["checkpoint-4", "checkpoint-8", "cache", ".saving"]
    ownership.adopt(output, ["finetune_config.json", "train_results.json", "log.txt", *folders])
    write(output / "finetune_config.json", json.dumps(config.to_json() | {"train_sha256": data_digest(config)}))
    results = {"steps": 8, "best_step": 8, "eval_loss_before": 3.0, "eval_loss": 2.0, "seconds": 1.0}
    write(output / "train_results.json", json.dumps(results))
    shutil.copy(folder / "log.txt", output / "log.txt")
    for step in (4, 8):
        staged = output / ".saving" / f"checkpoint-{step}"
        write(staged / "trainer_state.json", json.dumps({"global_step": step, "log_history": []}))
        checkpointing.publish(staged, output / f"checkpoint-{step}", 1)
    chat = ChatModel(Checkpoint(folder / "model")).chat
    data = load_or_encode(
        Source((folder / "train.jsonl",), folder / "model", "auto", 256, False), chat, output / "cache"
    )
    data.folder.rename(output / "cache" / "tokens")


def run_flags(output: str = "run") -> list[str]:
    """The flags of a training on the material."""
    paths = {
        "--model_name_or_path": "model", "--train_file": "train.jsonl", "--test_file": "test.jsonl",
        "--retention_file": "retention.jsonl", "--ds_file": "ds.json", "--output_path": output,
    }  # fmt: skip
    return [text for pair in paths.items() for text in pair]


def make_vectors(folder: Path) -> None:
    """The cache of vectors that comparing questions leaves: `kept/IDENTITY/NAME.keys.npy` and `.vectors.npy`."""
    from eval import analyze_similar_questions_and_intents as similar

    with redirect_stdout(StringIO()):
        assert similar.main(similar_flags("kept")) == 0
    assert len(np.load(next((folder / "kept").glob("*/*.keys.npy")))) > 1


def similar_flags(kept: str, model: str = "embedder") -> list[str]:
    """The flags of comparing the FAQ data with the embedding model."""
    return [
        "--data_file_path", "faq.jsonl", "--model_path", model, "--gpu_id", "-1", "--cache_dir", kept,
        "--similarity_threshold", "0.5",
    ]  # fmt: skip


def make_answers() -> None:
    """What an evaluation leaves."""
    from eval import evaluate_model_from_five_dimensions as five

    options = {"gpu_id": -1, "batch_size": 2, "data_dir": "benchmarks", "limit": 1, "output_path": "answered"}
    with redirect_stdout(StringIO()):
        assert five.main(["model", '["inference_ability"]', json.dumps(options)]) == 0


def make() -> None:
    """All of it, in the working directory: every path in it is relative, so that a copy is as good."""
    here = Path()
    make_data(here)
    make_models(here)
    make_prepared(here)
    make_run(here)
    make_vectors(here)
    make_answers()
