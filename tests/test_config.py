"""Settings: one place of defaults, all problems at once; chat_main.sh and config.py say the same."""

import os
import re
import time
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT, chat_main

from llmops.console import UserError
from train.config import FAQ_DEFAULTS, Config
from train.flags import parse
from train.problems import find_problems

SCRIPT = (ROOT / "chat_main.sh").read_text(encoding="utf-8")
VARIABLES = dict(re.findall(r'^([A-Z_]+)="\$\{\1:-(.*)\}" ', SCRIPT, re.MULTILINE))
PATHS = {"mount_path", "model_name_or_path", "train_file", "output_path"}  # MOUNT_PATH, and what is derived from it


def test_two_dashes_are_no_value() -> None:
    with pytest.raises(UserError, match="argument --test_file: found --, expected a value"):
        parse(["--test_file=--"])


def test_chat_main_has_every_setting_with_the_same_default() -> None:
    for item in fields(Config):
        assert item.name.upper() in VARIABLES, item.name
        if item.name in PATHS:
            continue
        text = VARIABLES[item.name.upper()]
        value = item.default
        if item.name in FAQ_DEFAULTS:  # left to the scenario; the comment says what that gives
            assert text == ""
            comment = re.search(rf"^{item.name.upper()}=.*; empty: (\S+), faq (\S+)$", SCRIPT, re.MULTILINE)
            assert comment, item.name
            assert [float(number) for number in comment.groups()] == [value, FAQ_DEFAULTS[item.name]]
            continue
        assert text == str(value).lower() if isinstance(value, (bool, str)) else float(text) == value, item.name


def test_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse(
            [
                "--model_name_or_path",
                str(tmp_path / "no"),
                "--train_file",
                str(tmp_path / "none"),
                "--lora_dim",
                "0",
                "--warmup_ratio",
                "2",
            ]
        )
    for phrase in (
        "model folder",
        "does not exist",
        "--lora_dim is 0, expected at least 1",
        "--warmup_ratio is 2.0",
        "training data",
    ):
        assert phrase in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["--train_type", "full"], "invalid choice: 'full'"),
        (["--packing", "maybe"], "expected true or false"),
        (["--learning_rate", "fast"], "invalid float value"),
        (["--report_to", "tensorboard,graphana"], "--report_to graphana is no tracker; expected some of swanlab"),
        (["--report_to", "trackio"], "--report_to trackio needs the package trackio, which is not here: pip install"),
        (["--learning_rate", "nan"], "--learning_rate is nan"),
        (["--no_such_flag", "1"], "unrecognized arguments"),
        (["--test_file", "/no/such/test.jsonl"], "the test data /no/such/test.jsonl does not exist"),
        (["--ds_file", "/no/such.json"], "DeepSpeed file /no/such.json does not exist"),
        (["--max_steps", "0"], "nothing to train"),
        (["--mode", "vicuna"], "invalid choice: 'vicuna'"),
        (["--mode", "glm3"], "--mode glm3 is for model_type chatglm, the checkpoint is 'llama'"),
    ],
)
def test_wrong_settings_are_one_sentence(
    small_data: Path, checkpoints: dict[str, Path], arguments: list[str], phrase: str
) -> None:
    good = [
        "--model_name_or_path",
        str(checkpoints["llama"]),
        "--train_file",
        str(small_data / "datasets" / "train.jsonl"),
    ]
    assert not find_problems(parse([*good, "--output_path", str(small_data / "out")])[0])
    with pytest.raises(UserError, match=re.escape(phrase)):
        parse([*good, "--output_path", str(small_data / "out"), *arguments])


def test_what_is_learned_tests_nothing(small_data: Path, checkpoints: dict[str, Path]) -> None:
    """A pattern that takes in the test file, by whichever name it is asked for."""
    data = small_data / "datasets"
    (small_data / "linked.jsonl").symlink_to(data / "test.jsonl")
    good = ["--model_name_or_path", str(checkpoints["llama"]), "--output_path", str(small_data / "out")]
    for name in (data / "test.jsonl", small_data / "linked.jsonl"):
        with pytest.raises(UserError, match=re.escape(f"{name} is learned (--train_file) and tests what was learned")):
            parse([*good, "--train_file", str(data / "*.jsonl"), "--test_file", str(name)])
    parse([*good, "--train_file", str(data / "*.jsonl")])
    parse([*good, "--train_file", str(data / "train.jsonl"), "--test_file", str(data / "test.jsonl")])


@pytest.mark.parametrize(
    ("arguments", "code", "phrase"),
    [
        (["--help"], 0, "--lora_module_name"),
        (["--trian_type", "all"], 2, "unknown argument --trian_type"),
        (["stray"], 2, "unknown argument stray"),
        (["--train_type"], 2, "--train_type needs a value"),
        (["--scenario", "chat"], 2, "expected general or faq"),
        (["--model_name_or_path", "/no/model"], 2, "the model folder /no/model does not exist"),
        (["--train_file", "/no/data.jsonl"], 2, "the training data /no/data.jsonl does not exist"),
    ],
)
def test_chat_main_answers(arguments: list[str], code: int, phrase: str) -> None:
    started = time.monotonic()
    done = chat_main(*arguments)
    assert done.returncode == code
    assert phrase in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    print(f"{arguments}: {time.monotonic() - started:.2f} s")


def test_the_flag_wins_over_the_environment() -> None:
    done = chat_main("--train_type=whole", TRAIN_TYPE="other")
    assert "'whole'" in done.stderr
    assert "'other'" in chat_main(TRAIN_TYPE="other").stderr


def test_bad_data_is_told_before_anything_is_loaded(small_data: Path, checkpoints: dict[str, Path]) -> None:
    train = small_data / "datasets" / "train.jsonl"
    train.write_bytes(train.read_bytes() + b"{broken\n")
    done = chat_main("--mount_path", str(small_data), "--model_name_or_path", str(checkpoints["llama"]))
    assert done.returncode == 2
    assert f"{train}:25: broken JSON" in done.stderr
    assert not (small_data / "output_path").exists()


def test_the_faq_scenario_has_its_own_defaults(small_data: Path, checkpoints: dict[str, Path]) -> None:
    given = [
        "--model_name_or_path", str(checkpoints["llama"]), "--output_path", str(small_data / "out"),
        "--train_file", str(small_data / "datasets" / "train.jsonl"),
    ]  # fmt: skip
    general, _ = parse(given)
    faq, _ = parse([*given, "--scenario", "faq"])
    flagged, _ = parse([*given, "--scenario", "faq", "--lora_dim", "64"])
    for name, value in FAQ_DEFAULTS.items():
        assert getattr(faq, name) == value != getattr(general, name)
    assert faq.peak_learning_rate == 2 * general.peak_learning_rate
    assert (flagged.lora_dim, flagged.max_seq_len) == (64, FAQ_DEFAULTS["max_seq_len"])


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """A folder of a Windows archive, in GBK: it once ended in a cache that could not be read."""
    folder = os.fsdecode(os.fsencode(tmp_path) + "/测试".encode("gbk"))
    problems = find_problems(Config(train_file=f"{folder}/train.jsonl", output_path=str(tmp_path / "测试")))
    assert len(problems) == 1
    assert "/\\udcb2\\udce2\\udcca\\udcd4/train.jsonl', which is not UTF-8; rename" in problems[0]
