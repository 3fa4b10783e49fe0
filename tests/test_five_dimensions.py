"""eval/evaluate_model_from_five_dimensions: official formats with their traps, scores that measure, wrong input."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Messages, environment, teach

from eval import evaluate_model_from_five_dimensions as command
from eval.dimensions import cmrc2018
from eval.engine import Engine, Settings
from eval.report import draw_radar
from eval.samples import Loaded, Sample, add_examples, draw
from llmops.console import UserError
from llmops.machine.sharing import Processes

SCRIPT = ROOT / "eval" / "evaluate_model_from_five_dimensions.py"
ALL = list(command.DIMENSIONS)


def load(name: str, **options: Any) -> Loaded:
    """A dimension's shipped samples, whatever lies in mnt."""
    options = {"data_dir": str(command.SAMPLES)} | options
    return command.load_data(command.DIMENSIONS[name], command.Options(**options)).loaded


def call(
    capfd: pytest.CaptureFixture[str], model: Path | str, dimensions: Any = "", options: Any = ""
) -> tuple[int, Any, str]:
    """(exit code, the JSON or None, stderr) of a run in this process."""
    capfd.readouterr()
    texts = [text if isinstance(text, str) else json.dumps(text) for text in (dimensions, options)]
    code = command.main([str(model), *texts])
    captured = capfd.readouterr()
    return code, json.loads(captured.out) if captured.out else None, captured.err


def lines_of(path: Path) -> list[dict[str, Any]]:
    """A jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_gold_answers_score_one(name: str) -> None:
    """At least 40 shipped samples; a reference as prediction scores 1, nothing scores 0, the baselines less than 1."""
    dimension = command.DIMENSIONS[name]
    loaded = load(name)
    assert len(loaded.samples) >= 40
    for sample in loaded.samples:
        for reference in sample.references:
            scores = dimension.score(reference, sample)
            assert scores == pytest.approx(dict.fromkeys(scores, 1.0)), reference
        assert set(dimension.score("", sample).values()) == {0.0}
    baselines = dimension.baselines(loaded.samples, 0)
    assert all(0 <= value < 0.75 for value in baselines.values()), baselines


def test_both_formats_of_cmrc_are_the_same_samples() -> None:
    folder = command.SAMPLES / "cmrc2018"
    native, squad = (
        cmrc2018.read(folder / part) for part in ("cmrc2018_dev.json", "squad-style-data/cmrc2018_dev.json")
    )
    assert native.samples == squad.samples
    assert any("3.5" in sample.references for sample in native.samples)  # a JSON float in the native file
    passages = json.loads((folder / "squad-style-data" / "cmrc2018_dev.json").read_text(encoding="utf-8"))["data"]
    for article in passages:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                assert len(question["answers"]) == 3
                for answer in question["answers"]:
                    start = answer["answer_start"]
                    assert paragraph["context"][start : start + len(answer["text"])] == answer["text"]


def test_titles_without_keywords_are_left_out() -> None:
    loaded = load("chinese_language_skill")
    assert loaded.notes == ["2 titles without keywords are left out"]


def test_empty_options_are_not_offered(tmp_path: Path) -> None:
    folder = tmp_path / "m3ke" / "data" / "dev"
    folder.mkdir(parents=True)
    record = {"id": 1, "question": "1+1=?", "A": "1", "B": "2", "C": "", "D": "3", "answer": "B"}
    (folder / "Maths-Science-Primary.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    loaded = load("innovation_capacity", data_dir=str(tmp_path))
    assert loaded.samples[0].choices == ("A", "B", "D")
    assert "C." not in loaded.samples[0].after
    assert loaded.notes == ["1 questions have an empty option, which is not offered"]


def test_examples_are_of_the_same_subject_and_not_evaluated() -> None:
    loaded = load("innovation_capacity", num_fewshot=2)
    assert len(loaded.samples) == 40
    assert len({str(sample.history) for sample in loaded.samples}) == 4  # one set per subject: a shared prefix
    for sample in loaded.samples:
        assert len(sample.history) == 4
        assert sample.history[1]["content"] in "ABCD"
        assert sample.messages[0]["content"].split("\n")[0] == sample.before.strip()
    drawn = load("inference_ability", num_fewshot=3)
    assert len(drawn.samples) == 41
    assert drawn.notes == ["3 samples serve as few-shot examples and are not evaluated"]
    assert load("inference_ability", num_fewshot=3).samples == drawn.samples
    assert load("inference_ability", num_fewshot=3, seed=1).samples != drawn.samples
    few = add_examples(Loaded([Sample("a", ("x",)), Sample("b", ("y",))]), 5, 0)
    assert few.notes[-1] == "some prompts have 1 examples instead of the 5 asked for: the data has no more"


def test_limit_draws_with_the_seed() -> None:
    samples = load("inference_ability").samples
    assert draw(samples, 10, 0) == draw(samples, 10, 0) != draw(samples, 10, 1)
    assert draw(samples, 100, 0) == samples


# --- answers ---------------------------------------------------------------------------------------------------------


def sum_of_logs(engine: Engine, sample: Sample) -> list[float]:
    """Log-likelihoods of a sample's choices, one plain pass of transformers' model per choice."""
    import torch

    prompt = engine.renderer.prompt(sample)
    found = []
    for ids in engine.renderer.choices(sample, prompt):
        with torch.no_grad():
            logits = engine.generator.model(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
        found.append(sum(logits[len(prompt) + k - 1, token].item() for k, token in enumerate(ids)))
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_batch_size_and_prefixes_change_nothing(checkpoints: dict[str, Path], architecture: str) -> None:
    """Choices (few-shot, several tokens) within 1e-4, also of the plain definition; generated answers equal."""
    samples = [
        *draw(load("inference_ability", num_fewshot=2).samples, 5, 0),
        *draw(load("innovation_capacity").samples, 4, 0),
        *load("reading_comprehension").samples[:6],
    ]
    samples[0] = replace(samples[0], choices=("是", "否", "完全一样的意思"))
    answers = []
    for size, reuse in [(3, True), (1, True), (8, True), (1, False), (3, False), (8, False)]:
        settings = Settings(
            str(checkpoints[architecture]), batch_size=size, reuse_prefix=reuse, gpu_id=-1, max_seq_len=2048
        )
        engine = Engine(settings, Processes())
        answers.append(engine.answer(engine.prepare("x", samples, 5)))
        if len(answers) == 1:
            engine.generator.model.set_attn_implementation("eager")
            for sample, answer in zip(samples[:9], answers[0], strict=False):
                assert answer.loglikelihoods == pytest.approx(sum_of_logs(engine, sample), abs=1e-4)
    for found in answers[1:]:
        for one, other in zip(answers[0], found, strict=True):
            assert one.text == other.text
            assert one.loglikelihoods == pytest.approx(other.loglikelihoods, abs=1e-4)


def test_plain_text_scores_what_is_written(checkpoints: dict[str, Path]) -> None:
    """Without chat template: prompt and choice are encoded together, and no role tokens are in the prompt."""
    sample = load("inference_ability", num_fewshot=1).samples[0]
    engine = Engine(Settings(str(checkpoints["llama"]), chat_template=False, gpu_id=-1), Processes())
    prompt = engine.renderer.prompt(sample)
    (first, *_) = engine.renderer.choices(sample, prompt)
    text = engine.renderer.tokenizer.decode([*prompt, *first])
    assert "<|im_start|>" not in text
    assert text.endswith("答案：是")
    assert "答案：否\n\n下面" in text or "答案：是\n\n下面" in text
    (answer,) = engine.answer(engine.prepare("x", [sample], 1))
    assert answer.loglikelihoods == pytest.approx(sum_of_logs(engine, sample), abs=1e-4)


# --- scores that measure ---------------------------------------------------------------------------------------------

KNOWN = {"inference_ability": 12, "innovation_capacity": 12, "chinese_language_skill": 8}


@pytest.fixture(scope="module")
def scholar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that was taught some of the shipped samples (the first ones of three dimensions)."""
    conversations: list[Messages] = []
    for name, count in KNOWN.items():
        for sample in load(name).samples[:count]:
            conversations.append([*sample.messages, {"role": "assistant", "content": sample.references[0]}])
    return teach(tmp_path_factory.mktemp("scholar"), conversations, steps=170)


def write_known(folder: Path, shuffled: bool) -> Path:
    """The samples that the model was taught, in the official formats; with shuffled labels nothing it could know."""
    draw = random.Random(7)
    afqmc = lines_of(command.SAMPLES / "afqmc" / "dev.json")[: KNOWN["inference_ability"]]
    name = sorted((command.SAMPLES / "m3ke" / "data" / "test").glob("*.jsonl"))[0].name
    m3ke = [
        row for path in sorted((command.SAMPLES / "m3ke" / "data" / "test").glob("*.jsonl")) for row in lines_of(path)
    ]
    tnews = lines_of(command.SAMPLES / "tnews" / "dev.json")[: KNOWN["chinese_language_skill"]]
    m3ke = m3ke[:10]  # of one file: the prompt names the subject
    if shuffled:
        for row in afqmc:
            row["label"] = draw.choice("01")
        for row in m3ke:
            row["answer"] = draw.choice("ABCD")
        words = [row["keywords"] for row in tnews]
        for row, other in zip(tnews, words[1:] + words[:1], strict=True):
            row["keywords"] = other
    for path, rows in [("afqmc/dev.json", afqmc), (f"m3ke/data/dev/{name}", m3ke), ("tnews/dev.json", tnews)]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / path).write_text(text, encoding="utf-8")
    return folder


def test_it_measures_what_it_says(capfd: pytest.CaptureFixture[str], scholar: Path, tmp_path: Path) -> None:
    """Near 1 on what the model was taught, near chance on the same questions with shuffled labels."""
    right = write_known(tmp_path / "right", False)
    output = tmp_path / "out"
    options = {"data_dir": str(right), "output_path": str(output), "gpu_id": -1, "max_seq_len": 1024}
    code, found, errors = call(capfd, scholar, list(KNOWN), options)
    assert code == 0, errors
    assert list(found) == ["evaluation_results", "diagnosis"]
    assert list(found["evaluation_results"]) == list(KNOWN)
    assert min(found["evaluation_results"].values()) > 0.9, found
    for name, notes in found["diagnosis"].items():  # the user's own data, everything read, nothing cut, but few samples
        (note,) = notes
        assert note.startswith(f"{KNOWN[name] if name != 'innovation_capacity' else 10} samples: "), note
        assert "95% interval 0." in note
    wrong = write_known(tmp_path / "wrong", True)
    code, shuffled, _ = call(capfd, scholar, list(KNOWN), options | {"data_dir": str(wrong), "output_path": ""})
    results = shuffled["evaluation_results"]
    assert 0.1 <= results["inference_ability"] <= 0.9
    assert results["innovation_capacity"] <= 0.6
    assert results["chinese_language_skill"] < 0.3
    report = json.loads((output / "eval_results.json").read_text(encoding="utf-8"))
    assert report["evaluation_results"] == found["evaluation_results"]
    inference = report["dimensions"]["inference_ability"]
    assert inference["baselines"]["majority"] >= 0.5
    assert inference["spread"]["references"] == inference["spread"]["predictions"]
    assert sum(group["samples"] for group in report["dimensions"]["innovation_capacity"]["by_group"].values()) == 10
    assert (output / "five_dimensions.png").stat().st_size > 10_000
    rows = lines_of(output / "samples" / "inference_ability.jsonl")
    assert [row["scores"]["accuracy"] for row in rows] == [
        float(row["prediction"] in row["references"]) for row in rows
    ]
    # started again: nothing is answered twice; beside another model's results in one chart
    again = options | {"compare_with": [str(output)]}
    code, found_again, errors = call(capfd, scholar, list(KNOWN), again)
    assert found_again == found
    assert errors.count("answers are in") == 3


def test_adapters(capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """An adapter's folder as the model and the adapter put on its base answer alike, and not like the base."""
    import torch
    from peft import LoraConfig, get_peft_model

    from llmops.models.chat_model import ChatModel
    from llmops.models.checkpoints import Checkpoint

    model = ChatModel(Checkpoint(checkpoints["llama"])).weights(torch.float32)
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj"]))
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=5.0)
    adapted.save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (checkpoints["llama"] / name).is_file():
            (tmp_path / "adapter" / name).write_bytes((checkpoints["llama"] / name).read_bytes())
    options = {"data_dir": str(command.SAMPLES), "gpu_id": -1, "limit": 6}
    rows = []
    for i, (model, more) in enumerate([
        (tmp_path / "adapter", {}),
        (checkpoints["llama"], {"adapter": str(tmp_path / "adapter")}),
        (checkpoints["llama"], {}),
    ]):  # fmt: skip
        given = options | more | {"output_path": str(tmp_path / f"{i}")}
        code, _, errors = call(capfd, model, ["inference_ability"], given)
        assert code == 0, errors
        samples = lines_of(tmp_path / f"{i}" / "samples" / "inference_ability.jsonl")
        rows.append([row["loglikelihoods"] for row in samples])
    for one, other in zip(rows[0], rows[1], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert rows[0] != rows[2]


def test_what_a_reader_must_know_is_in_diagnosis(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path]
) -> None:
    """An untrained model on shipped samples with little room: samples, cuts and baselines are named."""
    options = {"additional_parameters": {"max_seq_len": 200, "limit": 12, "gpu_id": -1, "chat_template": "on"}}
    code, found, errors = call(capfd, checkpoints["llama"], ["reading_comprehension", "inference_ability"], options)
    assert code == 0, errors
    reading = " ".join(found["diagnosis"]["reading_comprehension"])
    assert "scored on 12 samples that ship with the toolkit, which is no CMRC2018 score" in reading
    assert "prompts were longer than max_seq_len allows and were cut" in reading
    assert "is not above the baseline 'first sentence'" in reading
    assert "scored on 12 samples" in found["diagnosis"]["inference_ability"][0]


def test_radar_of_several_models(tmp_path: Path) -> None:
    models = [("one", dict(zip(ALL, (0.9, 0.5, 0.3, 0.2, 0.6), strict=True))), ("另一个", {ALL[0]: 0.4, ALL[3]: 0.8})]
    for count in (5, 2):
        draw_radar(models, ALL[:count], tmp_path / f"{count}.png", dict.fromkeys(ALL, (0.25, 0.9)))
        assert (tmp_path / f"{count}.png").read_bytes().startswith(b"\x89PNG")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_as_written(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """All five dimensions as subprocess from another directory; stdout is the JSON with exactly the documented keys."""
    options = {"additional_parameters": {"max_seq_len": 512, "limit": 4}}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(checkpoints["llama"]), json.dumps(ALL), json.dumps(options)],
        env=environment(), capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert list(found) == ["evaluation_results", "diagnosis"]
    assert list(found["evaluation_results"]) == ALL
    assert all(0 <= score <= 1 for score in found["evaluation_results"].values())
    assert not list(tmp_path.iterdir())


def test_the_shell_script_forwards(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT.with_suffix(".sh")), "--model_name_or_path", str(checkpoints["qwen2"]), "--mount_path",
         str(tmp_path), "--additional_parameters", '{"limit": 3}'],
        env=environment() | {"DIMENSIONS": '["inference_ability"]'}, capture_output=True, text=True, timeout=120,
        check=False, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(json.loads(done.stdout)["evaluation_results"]) == ["inference_ability"]
    assert (tmp_path / "eval_output" / "five_dimensions" / "eval_results.json").is_file()


@pytest.mark.parametrize(
    ("dimensions", "options", "phrase"),
    [
        (["charm"], "", "found 'charm', expected some of inference_ability"),
        ("[", "", "'[' is not JSON"),
        ([], "", "found an empty list"),
        ('{"a": 1}', "", "found a JSON dict"),
        ("", "{max_seq_len: 5}", "is not JSON"),
        ("", {"additional_parameters": {"max_len": 5}}, "unknown key 'max_len'"),
        ("", {"additional_parameters": 5}, "additional_parameters is no object"),
        ("", {"max_seq_len": "many"}, "max_seq_len is 'many', expected a value like 512"),
        ("", {"trust_remote_code": 1}, "trust_remote_code is 1, expected a value like false"),
        ("", {"gpu_id": 99}, "gpu_id 99 does not exist"),
        ("", {"output_path": "FILE/below"}, "cannot be written"),
        ("", {"data_dir": "/no/data"}, "/no/data has no AFQMC; put there AFQMC of the CLUE benchmark"),
        ("", {"compare_with": "/no/results.json"}, "of compare_with /no/results.json does not exist"),
        (["inference_ability"], {"data_dir": "BAD", "limit": 1}, "afqmc/dev.json:2: no 'label'; this is the test file"),
        (["innovation_capacity"], {"data_dir": "BAD"}, "S-C-L.jsonl:1: the answer is blank"),
        (["chinese_language_skill"], {"data_dir": "BAD"}, "tnews/dev.json:1: broken JSON"),
        (["reading_comprehension"], {"data_dir": "BAD"}, "expected CMRC2018's list of passages"),
        (["command_compliance"], {"data_dir": "BAD"}, "example 1: 'target' is missing or no text"),
    ],
)
def test_wrong_input_is_one_sentence(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path, dimensions: Any, options: Any,
    phrase: str,
) -> None:  # fmt: skip
    files = {
        "afqmc/dev.json": '{"sentence1": "a", "sentence2": "b", "label": "0"}\n{"id": 1, "sentence1": "a"}\n',
        "m3ke/data/test/S-C-L.jsonl": '{"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": ""}',
        "tnews/dev.json": '{"label": "102",\n',
        "cmrc2018/dev.json": "{}",
        "bigbench/subtask001_quoref_question_generation/task.json": '{"examples": [{"input": "Passage: a"}]}',
        "file": "",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    if isinstance(options, dict):
        options = json.loads(json.dumps(options).replace("FILE", f"{tmp_path}/file").replace("BAD", str(tmp_path)))
    code, found, errors = call(capfd, checkpoints["llama"], dimensions, options)
    assert (code, found) == (2, None)
    assert phrase in errors
    assert errors.startswith("error: ")
    assert "Traceback" not in errors


def test_a_missing_model_is_named(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, found, errors = call(capfd, tmp_path / "none", ["inference_ability"])
    assert (code, found) == (2, None)
    assert "holds no model" in errors
    with pytest.raises(UserError, match="is not JSON"):
        command.read_options("{")


def test_help_is_quick() -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], env=os.environ, capture_output=True, text=True, check=True
    )
    assert time.monotonic() - started < 1
    assert "num_fewshot" in done.stdout


def test_a_mount_that_moved(capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """An adapter finds its base model beside itself when the named folder is gone; without both, one sentence."""
    import torch
    from peft import LoraConfig, get_peft_model

    from llmops.models.chat_model import ChatModel
    from llmops.models.checkpoints import Checkpoint

    base, moved = tmp_path / "mnt" / "base", tmp_path / "moved"
    shutil.copytree(checkpoints["qwen2"], base)
    model = ChatModel(Checkpoint(base)).weights(torch.float32)
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj"]))
    adapted.save_pretrained(tmp_path / "mnt" / "output_path")
    for path in base.glob("*token*"):
        shutil.copy(path, tmp_path / "mnt" / "output_path")
    (tmp_path / "mnt").rename(moved)
    options = {"data_dir": str(command.SAMPLES), "gpu_id": -1, "limit": 2}
    code, _, errors = call(capfd, moved / "output_path", ["inference_ability"], options)
    assert code == 0, errors
    assert f"goes on {moved / 'base'}" in errors
    (moved / "base").rename(moved / "other")
    code, _, errors = call(capfd, moved / "output_path", ["inference_ability"], options)
    assert code == 2
    assert f"was trained on {base}, which is not there, nor is {moved / 'base'}" in errors
