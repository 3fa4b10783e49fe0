"""The data of eval/evaluate_model_from_five_dimensions: official formats with their traps, few-shot examples, draws."""

import json
from pathlib import Path

import pytest
from dimension_calls import ALL, load

from eval import evaluate_model_from_five_dimensions as command
from eval.dimensions import cmrc2018
from eval.samples import Loaded, Sample, add_examples, draw
from llmops.console import UserError


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


def test_answers_of_the_squad_style_may_be_texts(tmp_path: Path) -> None:
    answers = [{"text": "北京", "answer_start": 0}, "京"]
    question = {"id": "Q1", "question": "哪里？", "answers": answers}
    path = tmp_path / "dev.json"

    def read() -> tuple[str, ...]:
        article = {"paragraphs": [{"context": "北京", "qas": [question]}]}
        path.write_text(json.dumps({"data": [article]}), encoding="utf-8")
        return cmrc2018.read(path).samples[0].references

    assert read() == ("北京", "京")
    answers.append(["北"])
    with pytest.raises(UserError, match="article 1: 'text' is missing or no text"):
        read()


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
