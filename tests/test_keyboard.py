"""Marks of a Chinese keyboard in flags and values: the sentence says which stands where, and what to type instead."""

import subprocess
import sys

import pytest
from conftest import ROOT, chat_main, environment

from llmops.keyboard import instead, mistyped_flag

FLAGS = ("--train_type", "--mode")
DASHED = [
    ("–-train_type", "found – as character 1 of –-train_type; write --train_type"),
    ("—train_type", "found — as character 1 of —train_type; write --train_type"),
    ("－－mode=auto", "found － as character 1 of －－mode=auto; write --mode=auto"),
    ("--train_type＝all", "found ＝ as character 13 of --train_type＝all; write --train_type=all"),
]


@pytest.mark.parametrize(("argument", "sentence"), DASHED)
def test_a_flag_of_another_keyboard(argument: str, sentence: str) -> None:
    """Python and the shell say the same."""
    assert mistyped_flag(argument, FLAGS) == sentence
    done = chat_main(argument, "all")
    assert (done.stderr, done.returncode) == (f"error: {sentence}\n", 2)
    done = chat_main(argument, "all", LANG="C", LC_ALL="C")  # where bash counts bytes
    assert (done.stderr, done.returncode) == (f"error: {sentence}\n", 2)
    done = subprocess.run(
        [sys.executable, "train/finetune.py", argument, "all"], cwd=ROOT, env=environment(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (done.stderr, done.returncode) == (f"error: {sentence}; --help lists every setting\n", 2)


@pytest.mark.parametrize(
    "argument", ["--train_type", "--train_type=a＝b", "—你好", "–5", "--other＝1", "a＝b", "mode：x"]
)
def test_values_may_have_any_mark(argument: str) -> None:
    """A question may begin with a dash and hold an equals sign: only a flag that there is can be mistyped."""
    assert mistyped_flag(argument, FLAGS) == ""


def test_a_value_names_its_mark() -> None:
    """The first full-width mark, its place from 1, and what to type; nothing for a text without one."""
    assert instead("gate_proj，up_proj") == "; write , and not the full-width ， (character 10 of gate_proj，up_proj)"
    assert instead("a,b: 你好") == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--report_to", "swanlab，mlflow"], "; write , and not the full-width ， (character 8 of swanlab，mlflow)"),
        (
            ["--train_file", "/a.jsonl，b.jsonl"],
            "; write , and not the full-width ， (character 9 of /a.jsonl，b.jsonl)",
        ),
        (["--learning_rate", "1e－4"], "; write - and not the full-width － (character 3 of 1e－4)"),
        (["--cuda_visible_devices", "0，1"], "; write , and not the full-width ， (character 2 of 0，1)"),
    ],
)
def test_settings_that_cannot_be_name_the_mark(arguments: list[str], sentence: str) -> None:
    """Where a list, a path or a number is wrong and has such a mark."""
    done = chat_main(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
