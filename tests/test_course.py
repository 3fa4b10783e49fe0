"""The course of a training where nobody says: enough steps to learn small data; kept when the run goes on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from conftest import read_log

from llmops.console import UserError
from serve.console.runs import epochs_of
from train import ownership
from train.config import Config
from train.course import ENOUGH_STEPS, EPOCHS, EVALUATIONS, HIGHEST_RATES, Course, choose, course_words, judges
from train.run_folder import data_digest, earlier_run

CONFIG = Config()


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12, 13, 14, 20, 1000])
@pytest.mark.parametrize("scenario", ["general", "faq"])
@pytest.mark.parametrize("train_type", ["lora", "all"])
def test_small_data_gets_steps_enough_and_few_evaluations(steps: int, scenario: str, train_type: str) -> None:
    config = replace(CONFIG, scenario=scenario, train_type=train_type)
    found = choose(config, steps, {})
    assert found.all_steps >= ENOUGH_STEPS
    assert found.epochs >= EPOCHS
    assert found.epochs == EPOCHS or (found.epochs - 1) * steps < ENOUGH_STEPS
    assert config.peak_learning_rate <= found.rate <= HIGHEST_RATES[train_type]
    said = course_words(config, found)
    if found.epochs == EPOCHS:
        assert (said, found.rate, found.between) == ("", config.peak_learning_rate, 1)
    else:
        assert found.rate > config.peak_learning_rate
        assert found.evaluations <= EVALUATIONS
        assert f"so there are {found.epochs} (--num_train_epochs)" in said
    assert choose(replace(config, learning_rate=2e-5), steps, {}).rate == 2e-5


def test_what_was_asked_for_stays_and_few_steps_are_warned_about() -> None:
    asked = replace(CONFIG, num_train_epochs=2.5)
    found = choose(asked, 4, {"num_train_epochs": 9, "learning_rate": 1.0})
    assert found == Course(2.5, 4, CONFIG.peak_learning_rate)
    assert course_words(asked, found).startswith("warning: 10 optimizer steps will hardly change")
    assert course_words(asked, Course(2.5, 40, 1e-4)) == ""
    steps = replace(CONFIG, max_steps=5)
    assert choose(steps, 4, {}) == Course(EPOCHS, 4, CONFIG.peak_learning_rate)
    assert course_words(steps, Course(EPOCHS, 4, 1e-4)) == ""


def test_a_handful_of_held_out_conversations_chooses_no_weights(small_data: Path) -> None:
    train = small_data / "datasets" / "train.jsonl"
    config = Config(train_file=str(train))
    assert judges(config, 1)  # the test.jsonl beside it
    train.with_name("test.jsonl").unlink()
    assert not judges(config, 4)
    assert judges(config, 5)


def test_a_run_that_goes_on_keeps_its_course() -> None:
    written = json.loads(json.dumps(choose(CONFIG, 3, {}).to_json()))
    assert choose(CONFIG, 3, written) == choose(CONFIG, 3, {})
    other = {"num_train_epochs": 7, "epochs_between_evaluations": 2, "learning_rate": 3e-4}
    assert choose(CONFIG, 3, other) == Course(7, 3, 3e-4, 2)
    assert choose(CONFIG, 3, {"num_train_epochs": 3.0}) == Course(3, 3, CONFIG.peak_learning_rate)


def test_a_run_from_when_the_default_was_three(tmp_path: Path, small_data: Path, checkpoints: dict[str, Path]) -> None:
    """Its settings say 3 and nothing was chosen: it goes on as it was begun."""
    train = str(small_data / "datasets" / "train.jsonl")
    config = Config(train_file=train, model_name_or_path=str(checkpoints["llama"]), output_path=str(tmp_path))
    ownership.claim(tmp_path, ["finetune_config.json"])
    saved = config.to_json() | {"train_sha256": data_digest(config), "num_train_epochs": 3.0, "resolved": {}}
    (tmp_path / "finetune_config.json").write_text(json.dumps(saved), encoding="utf-8")
    assert earlier_run(config) is None
    with pytest.raises(UserError, match=r"num_train_epochs was 3\.0, is 4"):
        earlier_run(replace(config, num_train_epochs=4))
    saved["resolved"] = {"num_train_epochs": 3.0}  # this one was asked for 3
    (tmp_path / "finetune_config.json").write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(UserError, match=r"num_train_epochs was 3\.0, is 0"):
        earlier_run(config)


def test_a_run_says_and_writes_down_what_it_chose(
    train_run: Callable[..., CompletedProcess[str]], small_data: Path
) -> None:
    done = train_run("--num_train_epochs", "0", "--per_device_train_batch_size", "8", "--learning_rate", "0")
    assert done.returncode == 0, done.stderr[-2000:]
    said = "small data: an epoch has 3 steps, so there are 14 (--num_train_epochs) with a peak learning rate of 0.00047"
    assert said in done.stderr
    output = small_data / "output_path"
    lines = read_log(output)
    chosen = lines[0]["chosen"]
    assert (chosen["num_train_epochs"], chosen["learning_rate"]) == (14, pytest.approx(1e-4 * 14 / 3))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 9, 18, 27, 36, 42]
    assert max(line.get("learning_rate", 0) for line in lines) == pytest.approx(1e-4 * 14 / 3)
    settings = json.loads((output / "finetune_config.json").read_text(encoding="utf-8"))
    assert (settings["num_train_epochs"], epochs_of(settings)) == (0, 14)
    results = json.loads((output / "train_results.json").read_text(encoding="utf-8"))
    assert results["steps"] == 42
