"""eval/evaluate_model_from_five_dimensions as a user runs it; wrong input is one sentence."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment
from dimension_calls import ALL, call

from eval import evaluate_model_from_five_dimensions as command
from llmops.console import UserError

SCRIPT = ROOT / "eval" / "evaluate_model_from_five_dimensions.py"


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
        ("", {"seed": -1}, "limit, num_fewshot and seed must be 0 or more"),
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
