"""Similar questions: data and models that cannot be used are one sentence."""

import json
import shutil
from pathlib import Path

import pytest
from embedding_model import SAMPLE, write_embedding_model
from similar_calls import call, write

from llmops.embedding import ngrams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in sentence-transformers' layout."""
    return write_embedding_model(tmp_path_factory.mktemp("models") / "tiny", "mean")


def save_dense(path: Path, inputs: int, outputs: int) -> None:
    """The weights of a dense layer."""
    import torch
    from safetensors.torch import save_file

    save_file({"linear.weight": torch.ones(outputs, inputs), "linear.bias": torch.ones(outputs)}, path)


def add_module(kind: str, path: Path) -> None:
    """A module that is code of the folder's, or whose width does not fit."""
    modules = json.loads((path / "modules.json").read_text())
    if kind == "CODE":
        modules[1]["type"] = "modeling.Pooling"
        (path / "modeling.py").write_text("raise SystemExit('this code was run')")
    else:
        (path / "3_Dense").mkdir()
        (path / "3_Dense" / "config.json").write_text('{"in_features": 9, "out_features": 4}')
        save_dense(path / "3_Dense" / "model.safetensors", 9, 4)
        more = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
        modules.append(more)
    (path / "modules.json").write_text(json.dumps(modules))


def make_wrong(kind: str, model: Path, folder: Path) -> Path:
    """A file or a model folder that cannot be used."""
    good = SAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)
    files = {
        "EMPTY": "", "TEXT": "hello\n", "DEEP": "[" * 100_000, "ONE": '{"question": "退款", "intent": "退款"}\n',
        "NO_INTENT": '{"question": "退款", "output": "好"}\n', "BROKEN": good[0] + good[1][:30] + "\n" + good[2],
        "NUMBER": "[1, 2]", "ARRAY": "[" + good[0] + ", {", "OBJECT": "{}",
    }  # fmt: skip
    path = folder / kind.lower()
    if kind in files:
        path.write_text(files[kind], encoding="utf-8")
    elif kind == "GBK":
        path.write_bytes("退款".encode("gbk"))
    elif kind == "FOLDER":
        path.mkdir()
    else:
        shutil.copytree(model, path)
        (path / "modules.json").unlink() if kind == "CAUSAL" else None
        config = json.loads((path / "config.json").read_text())
        if kind == "CAUSAL":
            (path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
        elif kind == "T5":
            (path / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))
        elif kind == "STATIC":
            (path / "modules.json").write_text('[{"path": "", "type": "sentence_transformers.models.StaticEmbedding"}]')
        elif kind == "NO_WEIGHTS":
            (path / "model.safetensors").unlink()
        elif kind == "CUT":
            whole = (path / "model.safetensors").read_bytes()
            (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        elif kind == "LAYERS":
            (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
        elif kind == "POOLING":
            (path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "sum"}')
        elif kind in ("CODE", "WIDTH"):
            add_module(kind, path)
    return path


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["--data_file_path", "/no/data.json"], "the data file /no/data.json does not exist"),
        (["--data_file_path", "FOLDER"], "is a folder"),
        (["--data_file_path", "EMPTY"], "has no usable record"),
        (["--data_file_path", "TEXT"], "text:1: broken JSON"),
        (["--data_file_path", "DEEP"], "nested too deeply"),
        (["--data_file_path", "BROKEN"], "broken:2: broken JSON"),
        (["--data_file_path", "ARRAY"], "broken JSON"),
        (["--data_file_path", "NUMBER"], "found a JSON int, expected an object"),
        (["--data_file_path", "OBJECT"], "no question (keys found: none)"),
        (["--data_file_path", "GBK"], "not UTF-8"),
        (["--data_file_path", "NO_INTENT"], "no intent (keys found: 'question', 'output')"),
        (["--data_file_path", "ONE"], "one question only"),
        (["--similarity_threshold", "1.2"], "--similarity_threshold is 1.2, expected a number from 0 to 1"),
        (["--intent_similarity_threshold", "-1"], "--intent_similarity_threshold is -1.0"),
        (["--similarity_threshold", "nan"], "--similarity_threshold is nan"),
        (["--similarity_threshold", "high"], "invalid float value: 'high'"),
        (["--model_path", "/no/model"], "the model folder /no/model does not exist"),
        (["--model_path", "FOLDER"], "holds no model"),
        (["--model_path", "CAUSAL"], "a model that generates text (LlamaForCausalLM)"),
        (["--model_path", "T5"], "encoder-decoder"),
        (["--model_path", "STATIC"], "consists of StaticEmbedding"),
        (["--model_path", "POOLING"], "the pooling is"),
        (["--model_path", "CODE"], "code of its own (modeling.Pooling), which is not run"),
        (["--model_path", "WIDTH"], "cannot be multiplied (1x32 and 9x4)"),
        (["--model_path", "NO_WEIGHTS"], "holds no weights"),
        (["--model_path", "CUT"], "the embedding model"),
        (["--model_path", "LAYERS"], "its weights lack"),
        (["--model_path", "builtin:magic"], "expected a folder or builtin:ngram"),
        (["--gpu_id", "-2"], "--gpu_id is -2"),
        (["--max_pairs", "0"], "--max_pairs is 0"),
        (["--report", "/no/folder/page.html"], "--report /no/folder/page.html cannot be written"),
        (["--cache_dir", "ONE/below"], "the cache folder"),
        (["--nonsense", "1"], "unrecognized arguments: --nonsense"),
        (
            ["--model_path", "builtin:ngram", "--similarity_threshold", "0.1", "--max_pairs", "5"],
            "more than --max_pairs",
        ),
    ],
)
def test_wrong_input_is_one_sentence(
    capfd: pytest.CaptureFixture[str], model: Path, tmp_path: Path, arguments: list[str], phrase: str
) -> None:
    given = []
    for argument in arguments:
        name, _, below = argument.partition("/")
        made = make_wrong(name, model, tmp_path) if name.replace("5", "").replace("_", "").isupper() else None
        given.append(argument if made is None else str(made / below))
    code, found, errors = call(
        capfd, "--data_file_path", SAMPLE, "--model_path", model, "--cache_dir", tmp_path / "cache", *given
    )
    assert code == 2
    assert found == {"code": 2, "msg": found["msg"], "data": {"mismatched_intents": [], "similar_intents": []}}
    assert phrase in found["msg"]
    assert f"error: {found['msg']}" in errors
    assert "Traceback" not in errors


def test_repeated_questions_are_counted_before_they_are_listed(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [{"question": "退款", "intent": intent} for intent in ("甲", "乙") for _ in range(3000)]
    data = write(tmp_path / "d.jsonl", rows)
    code, found, _ = call(capfd, "--data_file_path", data, "--model_path", ngrams.NAME, "--max_pairs", "1000000")
    assert code == 2
    assert "9000000 pairs of questions" in found["msg"]


def test_bad_lines_can_be_passed_over(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [{"question": "退款", "intent": "甲"}, {"question": ""}, {"question": "退款", "intent": "乙"}]
    data = write(tmp_path / "d.jsonl", rows)
    arguments = ("--data_file_path", data, "--model_path", ngrams.NAME, "--skip_bad_lines", "true")
    _, found, errors = call(capfd, *arguments)
    assert [entry["lineNumbers"] for entry in found["data"]["mismatched_intents"]] == [[0, 2]]
    assert "1 bad lines" in errors
