"""Which file is harmed, which command reads it, and what that command may print and write."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz.material import run_flags, similar_flags

Main = Callable[[Sequence[str]], int]
MODEL_FILES = {
    "config.json": "json", "generation_config.json": "json", "tokenizer_config.json": "json", "tokenizer.json": "json",
    "special_tokens_map.json": "json", "chat_template.jinja": "text", "model.safetensors": "safetensors",
}  # fmt: skip
EMBEDDER_FILES = {
    "config.json": "json", "modules.json": "json", "1_Pooling/config.json": "json", "2_Dense/config.json": "json",
    "2_Dense/model.safetensors": "safetensors", "sentence_bert_config.json": "json", "tokenizer.json": "json",
    "config_sentence_transformers.json": "json", "tokenizer_config.json": "json", "model.safetensors": "safetensors",
}  # fmt: skip
ASKED = ["--question", "怎么办"]
PREPARED = (
    "out", "out/train.jsonl", "out/test.jsonl", "out/intents.json", "out/.prepare.json", "out/.prepare.lock",
)  # fmt: skip
SCORED = ("predictions.png", "predictions_coverage.png", "predictions_coverage.json")
KEPT = ("out", "out/.prepare.lock")
CPU_OPTIONS = {"gpu_id": -1, "batch_size": 2, "max_seq_len": 600, "data_dir": "benchmarks", "output_path": "out"}


@dataclass(frozen=True)
class Subject:
    """One file and one command.

    `speaks`: what stdout holds: `nothing`, `one` or `lines` of JSON after success, or one JSON `always`, whose code is
    the exit code. `same`: what is printed does not change by the harm. `writes`: patterns of what may be there
    afterwards; `keeps`: of what may be there after a failure, too. `argument`: not a file but this argument is harmed;
    `flags`: one of the command's settings. `heavy`: a model is loaded.
    """

    name: str
    command: str
    argv: tuple[str, ...]
    file: str = ""
    form: str = "json"
    needs: tuple[str, ...] = ()
    speaks: str = "one"
    writes: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    heavy: bool = False
    argument: int = -1
    flags: bool = False
    same: bool = False


# --- commands


def commands() -> dict[str, Main]:
    """The `main` of every command, and two readers that only run within a training."""
    from eval import analyze_similar_questions_and_intents as similar
    from eval import diagnosis_monitoring, evaluate_model_from_five_dimensions, model_performance_evaluation
    from faq import predict, prepare, score
    from train import finetune

    return {
        "finetune": finetune.main, "prepare": prepare.main, "predict": predict.main, "score": score.main,
        "diagnosis": diagnosis_monitoring.main, "five": evaluate_model_from_five_dimensions.main,
        "performance": model_performance_evaluation.main, "similar": similar.main, "resume": resume,
        "tokens": tokens, "encode": encode, "templates": prepare_with_templates,
    }  # fmt: skip


def parser_of(command: str) -> argparse.ArgumentParser:
    """The argument parser of a command."""
    module = "train.flags" if command == "finetune" else commands()[command].__module__
    return sys.modules[module].build_parser()


def resume(argv: Sequence[str]) -> int:
    """What a training does first in a folder with checkpoints: choose one, and see whether it can go on from it."""
    from llmops.console import log, run_main
    from train import checkpointing

    def body() -> int:
        newest = checkpointing.newest_whole(Path(argv[0]))
        if newest:
            log(f"{newest}: {checkpointing.read_manifest(newest)}")
        checkpointing.rotate(Path(argv[0]), 9, None, checkpointing.damage)
        return 0

    return run_main(body)


def tokens(argv: Sequence[str]) -> int:
    """Tokenise, or take the tokens that are in the cache, and read all of them as training does."""
    from llmops.console import print_json, run_main
    from llmops.models.chat_model import ChatModel
    from llmops.models.checkpoints import Checkpoint
    from train.encoding import describe
    from train.source import Source
    from train.token_cache import load_or_encode

    def body() -> int:
        chat = ChatModel(Checkpoint(Path("model"))).chat
        source = Source((Path("train.jsonl"),), Path("model"), "auto", 256, False)
        kept = Path(argv[0])
        (kept / "tokens").rename(kept / f"train-{source.key()}")
        data = load_or_encode(source, chat, kept)
        rows = [[data[i]["ids"].tolist(), data[i]["learned"].tolist()] for i in range(len(data))]
        print_json([describe(data.meta), data.learned_tokens(), data.lengths.tolist(), rows])
        (kept / f"train-{source.key()}").rename(kept / "tokens")
        return 0

    return run_main(body)


def encode(argv: Sequence[str]) -> int:
    """Read and tokenise conversations of any kind of file, as the start of a training does."""
    from llmops.console import print_json, run_main
    from llmops.conversations.data_files import list_files
    from llmops.models.chat_model import ChatModel
    from llmops.models.checkpoints import Checkpoint
    from train.encoding import describe
    from train.source import Source
    from train.token_cache import load_or_encode

    def body() -> int:
        source = Source(tuple(list_files(argv[0])), Path("model"), "auto", 256, False)
        data = load_or_encode(source, ChatModel(Checkpoint(Path("model"))).chat, Path("kept"))
        print_json([describe(data.meta), data.learned_tokens()])
        return 0

    return run_main(body)


def prepare_with_templates(argv: Sequence[str]) -> int:
    """faq/prepare with a folder of templates of one's own."""
    from faq import prepare
    from llmops.console import run_main
    from llmops.formats import families

    def body() -> int:
        families.TEMPLATES = Path("templates")
        return prepare.main(argv)

    return run_main(body)


# --- subjects


def light_subjects() -> list[Subject]:
    """What is read without torch."""
    check = (*run_flags("out"), "--check")
    data = ("model", "train.jsonl", "test.jsonl", "retention.jsonl", "ds.json")
    quiet: dict[str, Any] = {"command": "finetune", "needs": data, "speaks": "nothing"}
    found = [Subject(f, argv=check, file=f, form="jsonl", **quiet) for f in ("train.jsonl", "test.jsonl")]
    for f, form in (("sharegpt.json", "json"), ("alpaca.jsonl", "jsonl"), ("talks.csv", "text")):
        given = {"command": "finetune", "needs": (*data, f), "speaks": "nothing"}
        found.append(Subject(f"{f} (--check)", argv=(*check, "--train_file", f), file=f, form=form, **given))
    found += [Subject("retention file", argv=check, file="retention.jsonl", form="jsonl", **quiet)]
    found += [Subject("DeepSpeed file", argv=check, file="ds.json", **quiet)]
    for name in ("config.json", "tokenizer_config.json"):
        found.append(Subject(f"{name} (--check)", argv=check, file=f"model/{name}", **quiet))
    run = quiet | {"needs": (*data, "run")}
    for name in ("finetune_config.json", "train_results.json", "run_manifest.json"):
        found.append(Subject(name, argv=(*run_flags(), "--check"), file=f"run/{name}", **run))
    found.append(
        Subject("checkpoint-N/manifest.json", "resume", ("run",), "run/checkpoint-8/manifest.json", needs=("run",),
                speaks="nothing")
    )  # fmt: skip
    for file, form in (("faq.jsonl", "jsonl"), ("faq.json", "json"), ("faq.csv", "text")):
        argv = ("--data_file", file, "--output_dir", "out", "--test_ratio", "0.3")
        found.append(Subject(file, "prepare", argv, file, form, (file,), writes=PREPARED, keeps=KEPT))
        argv = ("--data_file_path", file, "--model_path", "builtin:ngram", "--report", "page.html")
        found.append(
            Subject(f"{file} (similar)", "similar", argv, file, form, (file,), "always", ("page.html",))
        )  # fmt: skip
    for name in ("auto", "glm3", "llama2"):
        argv = ("--data_file", "faq.jsonl", "--output_dir", "out", "--mode", name)
        needs = ("templates", "faq.jsonl")
        found.append(
            Subject("formats/templates", "templates", argv, f"templates/{name}.json", needs=needs, writes=PREPARED,
                    keeps=KEPT)
        )  # fmt: skip
    argv = ("predictions.jsonl", "--intents_file", "prepared/intents.json", "--train_file", "prepared/train.jsonl")
    needs = ("predictions.jsonl", "prepared")
    for name, file, form in (
        ("predictions", argv[0], "jsonl"), ("intents.json (score)", argv[2], "json"),
        ("train.jsonl (score)", argv[4], "jsonl"),
    ):  # fmt: skip
        found.append(Subject(name, "score", argv, file, form, needs, writes=SCORED))
    logs = (Path(__file__).resolve().parent.parent / "logs").glob("[!R]*.*")
    for path in sorted(path for path in logs if path.stem != "deepspeed_steps_only"):  # has no loss
        form = {".txt": "text", ".jsonl": "jsonl", ".json": "json"}[path.suffix]
        argv = (f"logs/{path.name}", "--explain")
        found.append(Subject("training logs", "diagnosis", argv, argv[0], form, ("logs",), "always"))
    found.append(Subject("training logs", "diagnosis", ("log.txt",), "log.txt", "jsonl", ("log.txt",), "always"))
    for file in ("keys", "vectors"):
        found.append(
            Subject(f"embedding cache ({file})", "similar", tuple(similar_flags("kept")), f"kept/*/*.{file}.npy", "npy",
                    ("faq.jsonl", "embedder", "kept"), "always", writes=("kept/*",), keeps=("kept/*",), heavy=True,
                    same=True)
        )  # fmt: skip
    return found + flag_subjects(check, data)


def flag_subjects(check: tuple[str, ...], data: tuple[str, ...]) -> list[Subject]:
    """Settings of the commands that say what is wrong before anything heavy; what they write is their own affair."""
    similar = ("--data_file_path", "faq.jsonl", "--model_path", "builtin:ngram")
    score = ("predictions.jsonl", "--intents_file", "prepared/intents.json")
    five = ("nowhere", '["inference_ability"]', json.dumps({"additional_parameters": CPU_OPTIONS}))
    shared: dict[str, Any] = {"flags": True, "writes": ("*",)}
    performance = ("--model_name_or_path", "nowhere", "--dataset_path", "train.jsonl")
    return [
        Subject("settings of finetune", "finetune", check, needs=data, speaks="nothing", **shared),
        Subject("settings of prepare", "prepare", ("--data_file", "faq.jsonl", "--output_dir", "out"),
                needs=("faq.jsonl",), keeps=("*",), **shared),
        Subject("settings of similar", "similar", similar, needs=("faq.jsonl",), speaks="always", **shared),
        Subject("settings of score", "score", score, needs=("predictions.jsonl", "prepared"), **shared),
        Subject("settings of diagnosis", "diagnosis", ("log.txt",), needs=("log.txt",), speaks="always", **shared),
        Subject("settings of performance", "performance", performance, needs=("train.jsonl",), speaks="always",
                **shared),
        Subject("settings of predict", "predict", ("--model_name_or_path", "nowhere", *ASKED), speaks="lines",
                **shared),
        Subject("dimensions argument", "five", five, argument=1),
        Subject("options argument", "five", five, argument=2, keeps=("out",)),
    ]  # fmt: skip


def heavy_subjects() -> list[Subject]:
    """What is read together with a model."""
    model: dict[str, Any] = {"heavy": True}
    predict = ("--intents_file", "prepared/intents.json", "--batch_size", "4", *ASKED)
    performance = ("--dataset_path", "test.jsonl", "--limit", "2", "--max_new_tokens", "2", "--gpu_id", "-1")
    found = []
    for file, form in MODEL_FILES.items():
        name = f"{file} of a model"
        argv = ("--model_name_or_path", "model", *predict)
        found.append(Subject(name, "predict", argv, f"model/{file}", form, ("model", "prepared"), "lines", **model))
        argv = ("--model_name_or_path", "model", *performance)
        needs = ("model", "test.jsonl")
        found.append(Subject(name, "performance", argv, f"model/{file}", form, needs, "always", **model))
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        argv = ("--data_file", "faq.jsonl", "--output_dir", "out", "--model_name_or_path", "model")
        found.append(
            Subject(f"{file} of a model", "prepare", argv, f"model/{file}", MODEL_FILES[file], ("model", "faq.jsonl"),
                    writes=PREPARED, keeps=KEPT, **model)
        )  # fmt: skip
        argv = (*run_flags("out"), "--dry_run", "true")
        needs = ("model", "train.jsonl", "test.jsonl", "retention.jsonl", "ds.json")
        cache = ("out", "out/cache", "out/cache/*")
        found.append(
            Subject(f"{file} (--dry_run)", "finetune", argv, f"model/{file}", MODEL_FILES[file], needs, "nothing",
                    cache, cache, **model)
        )  # fmt: skip
    argv = ("--model_name_or_path", "binary_model", *performance)
    needs = ("binary_model", "test.jsonl")
    for _ in range(2):
        found.append(
            Subject("pytorch_model.bin", "performance", argv, "binary_model/pytorch_model.bin", "pickle", needs,
                    "always", **model)
        )  # fmt: skip
    argv = ("--model_name_or_path", "adapter", *performance)
    for file, form in (("adapter_config.json", "json"), ("adapter_model.safetensors", "safetensors")):
        needs = ("model", "adapter", "test.jsonl")
        found.append(Subject(file, "performance", argv, f"adapter/{file}", form, needs, "always", **model))
    on_model = ("--model_name_or_path", "model", "--adapter", "adapter", *performance)
    found.append(
        Subject("adapter_config.json", "performance", on_model, "adapter/adapter_config.json", "json", needs, "always",
                **model)
    )  # fmt: skip
    argv = ("--model_name_or_path", "model", *performance)
    found.append(
        Subject("model_performance data", "performance", argv, "test.jsonl", "jsonl", ("model", "test.jsonl"), "always",
                **model)
    )  # fmt: skip
    argv = ("--model_name_or_path", "model", *predict[:2], "--input_file", "prepared/test.jsonl")
    for name, form in (("intents.json", "json"), ("test.jsonl", "jsonl")):
        found.append(
            Subject(f"{name} (predict)", "predict", argv, f"prepared/{name}", form, ("model", "prepared"), "lines",
                    **model)
        )  # fmt: skip
    flags: dict[str, Any] = {"heavy": True, "flags": True, "writes": ("*",), "keeps": ("*",)}
    argv = ("--model_name_or_path", "model", *performance)
    needs = ("model", "test.jsonl")
    found.append(Subject("settings of performance", "performance", argv, needs=needs, speaks="always", **flags))
    argv = ("--model_name_or_path", "model", *predict)
    found.append(Subject("settings of predict", "predict", argv, needs=("model", "prepared"), speaks="lines", **flags))
    tables = {"talks.parquet": "talks.parquet", "saved": "saved/*.arrow", "saved ": "saved/*.json"}
    for name, file in tables.items():
        form = "json" if file.endswith(".json") else "binary"
        needs = ("model", name.strip())
        found.append(
            Subject(f"{file} (tokenised)", "encode", needs[1:], file, form, needs, writes=("kept", "kept/*"),
                    keeps=("kept", "kept/*"), **model)
        )  # fmt: skip
    return found + embedder_subjects() + cache_subjects() + dimension_subjects()


def embedder_subjects() -> list[Subject]:
    """The embedding model's folder."""
    argv = (*similar_flags("kept"), "--report", "page.html")
    shared: dict[str, Any] = {
        "needs": ("faq.jsonl", "embedder"), "speaks": "always", "writes": ("kept", "kept/*", "page.html"),
        "keeps": ("kept", "kept/*"), "heavy": True,
    }  # fmt: skip
    return [
        Subject(f"{file} of an embedder", "similar", argv, f"embedder/{file}", form, **shared)
        for file, form in EMBEDDER_FILES.items()
    ]


def cache_subjects() -> list[Subject]:
    """Tokenised data."""
    shared: dict[str, Any] = {
        "needs": ("model", "train.jsonl", "run"), "writes": ("run/cache/*",), "keeps": ("run/cache/*",), "heavy": True,
        "same": True,
    }  # fmt: skip
    forms = {"meta.json": "json", "index.npy": "npy", "ids.bin": "binary", "learned.bin": "binary"}
    return [
        Subject(f"tokenised data ({file})", "tokens", ("run/cache",), f"run/cache/tokens/{file}", form, **shared)
        for file, form in forms.items()
    ]


def dimension_subjects() -> list[Subject]:
    """The five dimensions' data, options, kept answers, and results to compare with."""
    files = {
        "inference_ability": ("afqmc/dev.json", "jsonl"), "chinese_language_skill": ("tnews/dev.json", "jsonl"),
        "reading_comprehension": ("cmrc2018/cmrc2018_dev.json", "json"),
        "command_compliance": ("bigbench/subtask001_quoref_question_generation/task.json", "json"),
        "innovation_capacity": ("m3ke/data/dev/Everyday_Law-Social_Sciences-Other.jsonl", "jsonl"),
    }  # fmt: skip
    kept = ("out", "out/samples", "out/samples/*.process0.jsonl")
    shared: dict[str, Any] = {"writes": ("out", "out/*"), "keeps": kept, "heavy": True}
    found = []
    for dimension, (file, form) in files.items():
        argv = ("model", json.dumps([dimension]), json.dumps(CPU_OPTIONS | {"limit": 1}))
        found.append(
            Subject(f"data of {dimension}", "five", argv, f"benchmarks/{file}", form, ("model", "benchmarks"), **shared)
        )
    every = {"seed": 0, "num_fewshot": 1, "mode": "auto", "dtype": "auto", "chat_template": True, "reuse_prefix": True}
    options = CPU_OPTIONS | every | {"limit": 1, "compare_with": ["compared"]}
    argv = ("model", '["inference_ability"]', json.dumps(options))
    needs = ("model", "benchmarks", "compared")
    found.append(Subject("compare_with", "five", argv, "compared/eval_results.json", "json", needs, **shared))
    found.append(answered_subject(needs))
    found.append(Subject("options argument", "five", argv, argument=2, needs=needs, **shared))
    return found


def answered_subject(needs: tuple[str, ...]) -> Subject:
    """The answers that an evaluation kept."""
    options = json.dumps(CPU_OPTIONS | {"limit": 1, "output_path": "answered"})
    samples = "answered/samples/inference_ability.jsonl"
    return Subject(
        "samples/*.jsonl", "five", ("model", '["inference_ability"]', options), samples, "jsonl", (*needs, "answered"),
        writes=("answered/*",), keeps=("answered/samples/*",), heavy=True,
    )  # fmt: skip


SUBJECTS = (light_subjects, heavy_subjects)
