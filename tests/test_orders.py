"""faq/predict --orders: candidates at other places, joined; kept by faq/score, held to by prediction and server."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_inside import ask
from test_retrieval import INTENTS, prepared, records

from faq import predict, score
from faq.queries import Query
from llmops.intents.catalog import load_catalog
from llmops.intents.prediction import agreed
from llmops.intents.retrieval import candidates_of, retriever_of

RANDOM = ("--candidates", "3", "--candidate_examples", "1", "--candidate_order", "random", "--test_ratio", "0.17")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of predictions."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_geometric_means_by_hand() -> None:
    """sqrt(0.8 * 0.2) = 0.4 and sqrt(0.2 * 0.8) = 0.4; sqrt(0.9 * 0.5) = 0.671 and sqrt(0.1 * 0.5) = 0.224, 3 to 1."""
    assert agreed([{"a": 0.8, "b": 0.2}, {"a": 0.2, "b": 0.8}]) == [
        ("a", pytest.approx(0.5)),
        ("b", pytest.approx(0.5)),
    ]
    found = agreed([{"a": 0.1, "b": 0.9}, {"a": 0.5, "b": 0.5}])
    assert found == [("b", pytest.approx(0.75)), ("a", pytest.approx(0.25))]


def louder(checkpoint: Path, folder: Path) -> Path:
    """A copy of a model with random weights, made large: to it the order of a prompt says something."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    large = {name: tensor * (8 if tensor.ndim == 2 else 1) for name, tensor in weights.items()}
    save_file(large, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def checkpoints(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model to which the order of a prompt says something."""
    return {"llama": louder(checkpoints["llama"], tmp_path_factory.mktemp("models") / "loud")}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """A folder with the data of `prepare` in `out`, and its test asked in three orders, joined.jsonl."""
    folder = tmp_path_factory.mktemp("orders")
    prepared(folder, records(INTENTS[:20]), *RANDOM, "--out_of_scope_ratio", "0.2")
    flags = ["--input_file", str(folder / "out" / "test.jsonl"), "--output_file", str(folder / "joined.jsonl")]
    assert predict.main([*model(checkpoints, folder / "out" / "intents.json"), *flags, "--orders", "3"]) == 0
    return folder


def model(checkpoints: dict[str, Path], intents: Path) -> list[str]:
    """The flags of a model that learned nothing, with these intents."""
    return ["--model_name_or_path", str(checkpoints["llama"]), "--intents_file", str(intents)]


def test_every_candidate_is_asked_at_every_place(tmp_path: Path, asked: Path, checkpoints: dict[str, Path]) -> None:
    """Against asking the turned prompts one by one, and multiplying here."""
    test, rows = read(asked / "out" / "test.jsonl"), read(asked / "joined.jsonl")
    assert len(rows) == len(test) >= 20
    catalog = load_catalog(asked / "out" / "intents.json")
    lists = candidates_of(catalog, [row["question"] for row in test], retriever_of(catalog))
    turned = []
    for row, (found, shown) in zip(test, lists, strict=True):
        names, beside = catalog.candidates(row["variant"]), dict(zip(catalog.candidates(found), shown, strict=True))
        if set(names) - set(beside):  # a row that lacks its intent lists others than are found
            continue
        for k in range(3):
            order = [*names[k:], *names[:k]]
            variant = catalog.variant_of(order)
            prompt = catalog.prompt(row["question"], variant, [beside[name] for name in order])
            answer = {"role": "assistant", "content": row["intent"]}
            turned.append(row | {"messages": [*prompt, answer], "variant": variant})
    assert len(turned) >= 30
    by_hand, single, every = (tmp_path / name for name in ("by_hand.jsonl", "single.jsonl", "all.json"))
    by_hand.write_text("".join(json.dumps(row) + "\n" for row in turned), encoding="utf-8")
    every.write_text(catalog.to_json(), encoding="utf-8")
    flags = ["--input_file", str(by_hand), "--output_file", str(single)]
    assert predict.main([*model(checkpoints, every), *flags]) == 0
    alone, told = read(single), {row["question"]: row for row in rows if row["reference"] != "不符合"}
    differ = 0.0
    for place in range(0, len(alone), 3):
        three = alone[place : place + 3]
        names = list(three[0]["probabilities"])
        raised = np.exp(np.mean([np.log([row["probabilities"][name] for name in names]) for row in three], axis=0))
        found = told[three[0]["question"]]
        expected = dict(zip(names, raised / raised.sum(), strict=True))
        assert found["probabilities"] == pytest.approx(expected, abs=1e-4)
        assert found["probability"] == pytest.approx(max(expected.values()), abs=1e-4)
        assert (found["orders"], found["variant"]) == (3, three[0]["variant"])
        differ = max(differ, *(abs(row["probabilities"][name] - expected[name]) for row in three for name in names))
    assert differ > 0.01  # the order says something to this model


def test_what_score_keeps_is_held_to(
    tmp_path: Path, asked: Path, capsys: pytest.CaptureFixture[str], checkpoints: dict[str, Path]
) -> None:
    """Prediction without a flag, and the server."""
    from serve.model.service import open_service
    from serve.settings import Limits, Model

    rows, intents = read(asked / "joined.jsonl"), tmp_path / "intents.json"
    intents.write_bytes((asked / "out" / "intents.json").read_bytes())
    common = model(checkpoints, intents)
    kept = ["--intents_file", str(intents), "--train_file", "", "--keep_threshold", "true", "--automate", "0.9"]
    assert score.main([str(asked / "joined.jsonl"), *kept]) == 0
    assert load_catalog(intents).decision["orders"] == 3
    mixed = tmp_path / "mixed.jsonl"
    for number, wrong, phrase in (
        (2, 1, "'orders' is 1, and 3 on line 1"),
        (1, 0, "'orders' is 0, expected a whole number from 1"),
    ):
        changed = [row | {"orders": wrong} if k == number else row for k, row in enumerate(rows, 1)]
        mixed.write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
        assert score.main([str(mixed), *kept]) == 2
        assert f"mixed.jsonl:{number}: {phrase}" in " ".join(capsys.readouterr().err.split())
    capsys.readouterr()
    bare = ["--question", rows[0]["question"], "--question", rows[1]["question"]]
    assert predict.main([*common, *bare]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, before in zip(again, rows, strict=False):
        assert row["orders"] == 3
        assert row["proposed"] == before["intent"]
        assert row["probabilities"] == pytest.approx(before["probabilities"], abs=1e-4)
    assert predict.main([*common, *bare, "--orders", "2"]) == 2
    assert "--orders is 2 and the intents file keeps a threshold for 3" in capsys.readouterr().err
    assert predict.main([*common, *bare, "--orders", "2", "--use_threshold", "false"]) == 0
    server = open_service(Model(checkpoints["llama"], intents_file=intents), Limits(), tmp_path / "f.jsonl")
    try:
        answers = ask(server, ("/v1/intents", {"questions": bare[1::2]}))[0][1]["data"]
        assert [row["proposed"] for row in answers] == [row["proposed"] for row in again]
        for row, other_row in zip(answers, again, strict=True):
            assert row["probability"] == pytest.approx(other_row["probability"], abs=1e-4)
    finally:
        assert server.close()


def test_new_questions_are_scored(
    tmp_path: Path, asked: Path, capsys: pytest.CaptureFixture[str], checkpoints: dict[str, Path]
) -> None:
    """A file of labelled questions: their candidate lists are in no intents file."""
    intents, raw, found = (tmp_path / name for name in ("intents.json", "raw.jsonl", "found.jsonl"))
    intents.write_bytes((asked / "out" / "intents.json").read_bytes())
    known = [row for row in read(asked / "out" / "test.jsonl") if row["intent"] != "不符合"]
    rows = [{"question": f"{row['question']} please now", "intent": row["intent"]} for row in known]
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    inputs = ["--input_file", str(raw), "--output_file", str(found)]
    assert predict.main([*model(checkpoints, intents), *inputs, "--orders", "3"]) == 0
    catalog, predicted = load_catalog(intents), read(found)
    assert any("candidates" in row for row in predicted)
    for row in predicted:
        listed = row["candidates"] if "candidates" in row else catalog.candidates(row["variant"])
        assert set(row["probabilities"]) - {"不符合"} == set(listed)
    command = [str(found), "--intents_file", str(intents), "--train_file", str(asked / "out" / "train.jsonl")]
    assert score.main([*command, "--keep_threshold", "true", "--join", "true", "--automate", "0.9"]) == 0
    again = load_catalog(intents)
    assert ([*again.lists], again.decision["orders"]) == ([*catalog.lists], 3)
    found.write_text(json.dumps(predicted[0] | {"candidates": ["other"]}) + "\n", encoding="utf-8")
    capsys.readouterr()
    assert score.main(command) == 2
    assert "found.jsonl:1: 'candidates' is [\"other\"]" in " ".join(capsys.readouterr().err.split())


def test_orders_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoints: dict[str, Path]
) -> None:
    prepared(tmp_path, records(INTENTS[:20]), *RANDOM)
    intents, test = tmp_path / "out" / "intents.json", tmp_path / "out" / "test.jsonl"
    common = ["--model_name_or_path", str(checkpoints["llama"]), "--input_file", str(test)]

    def refused(*arguments: str, file: Path = intents) -> str:
        capsys.readouterr()
        assert predict.main([*common, "--intents_file", str(file), *arguments]) == 2
        return capsys.readouterr().err

    assert "--orders is -1" in refused("--orders", "-1")
    assert "--orders is 4 and a question has 3 candidates" in refused("--orders", "4")
    assert "--orders goes with --constrain true" in refused("--orders", "2", "--constrain", "false")
    edited = tmp_path / "edited.jsonl"
    lines = test.read_text(encoding="utf-8").replace("Which intent", "What intent").replace("你是", "您是")
    edited.write_text(lines, encoding="utf-8")
    said = refused("--orders", "2", "--input_file", str(edited))
    assert "was not made from these intents" in said
    similar = tmp_path / "similar"
    similar.mkdir()
    prepared(similar, records(INTENTS[:20]), "--candidates", "3", "--candidate_examples", "1")
    inputs = ("--input_file", str(similar / "out" / "test.jsonl"))
    said = refused("--orders", "2", *inputs, file=similar / "out" / "intents.json")
    assert "--orders goes with candidates in random order" in said
    catalog = load_catalog(intents)
    assert predict.in_orders(catalog, [Query("q", ())], 0, "") == ([Query("q", ())], 1)
