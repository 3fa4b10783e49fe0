"""Runs of the five dimensions that do not go smoothly: prompts that do not fit, signals, full disks, foreign files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import environment

from eval import evaluate_model_from_five_dimensions as command
from eval import model_performance_evaluation
from eval.answers import FIVE, PERFORMANCE
from eval.engine import Engine
from eval.report import read_scores
from eval.samples import Answer
from llmops.console import RunStopped
from llmops.machine.kept import appending
from llmops.machine.locks import EVALUATION, lock

SCRIPT = Path(command.__file__)
Call = tuple[int, Any, str]


def call(capfd: pytest.CaptureFixture[str], model: Path, dimensions: list[str], *flags: str, **options: Any) -> Call:
    """(exit code, the JSON or None, stderr) of a run on the CPU in this process."""
    capfd.readouterr()
    code = command.main([str(model), json.dumps(dimensions), json.dumps({"gpu_id": -1} | options), *flags])
    captured = capfd.readouterr()
    return code, json.loads(captured.out) if captured.out else None, captured.err


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A jsonl file's objects."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_report(folder: Path) -> dict[str, Any]:
    """eval_results.json."""
    return json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))


def pair(number: int, **more: str) -> dict[str, str]:
    """A row of AFQMC."""
    return {"sentence1": f"花呗怎么还款{number}", "sentence2": f"借呗如何提前还{number}"} | more


def question(number: int, answer: str, option: str = "对") -> dict[str, Any]:
    """A row of M3KE."""
    return {"id": number, "question": f"第{number}题", "A": option, "B": "二", "C": "三", "D": "四", "answer": answer}


def write_afqmc(folder: Path, count: int) -> None:
    """AFQMC's dev file with both labels."""
    write_lines(folder / "afqmc_public" / "dev.json", [pair(i, label=str(i % 2)) for i in range(count)])


# --- prompts that do not fit -----------------------------------------------------------------------------------------


def test_a_question_that_does_not_fit_is_left_out_and_named(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Its dimension is scored on the others; a dimension without any prompt that fits has no score, the rest has."""
    write_afqmc(tmp_path, 4)
    rows = [question(0, "A"), question(1, "B"), question(2, "C", option="很长的选项" * 120)]
    write_lines(tmp_path / "M3KE" / "data" / "dev" / "Maths-Natural Sciences-College.jsonl", rows)
    prefix = {"task_prefix": "Ask about the passage. " * 150, "examples": [{"input": "Passage: a b", "target": "Why?"}]}
    task = tmp_path / "BIG-bench" / "tasks" / command.quoref.TASK / "task.json"
    task.parent.mkdir(parents=True)
    task.write_text(json.dumps(prefix), encoding="utf-8")
    names = ["inference_ability", "command_compliance", "innovation_capacity"]
    out = tmp_path / "out"
    code, found, errors = call(
        capfd, checkpoints["llama"], names, data_dir=str(tmp_path), max_seq_len=300, output_path=str(out)
    )
    assert code == 0, errors
    assert list(found["evaluation_results"]) == ["inference_ability", "innovation_capacity"]
    (note,) = found["diagnosis"]["command_compliance"]
    assert note.startswith("no score: none of its 1 prompts fits into 300 tokens; give a max_seq_len of ")
    note = next(note for note in found["diagnosis"]["innovation_capacity"] if "do not fit" in note)
    assert note.startswith("1 of 3 prompts do not fit into 300 tokens even without their passage")
    counts = read_report(out)["dimensions"]["innovation_capacity"]["counts"]
    assert (counts["samples"], counts["left_out"], counts["data"]) == (2, 1, 3)
    needed = int(note.split("with max_seq_len ")[1].split()[0])
    code, found, _ = call(capfd, checkpoints["llama"], names[2:], data_dir=str(tmp_path), max_seq_len=needed)
    assert not any("do not fit" in note for note in found["diagnosis"]["innovation_capacity"])
    code, found, _ = call(capfd, checkpoints["llama"], names, data_dir=str(tmp_path))
    assert list(found["evaluation_results"]) == names  # without a length: what the data needs


def test_no_length_is_advised_that_the_model_does_not_have(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """A prompt that is longer than the model: the sentence says so, of all prompts and of some."""
    model = tmp_path / "model"
    shutil.copytree(checkpoints["llama"], model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}), encoding="utf-8")
    path = tmp_path / "M3KE" / "data" / "dev" / "Maths-Natural Sciences-College.jsonl"
    rows = [question(i, "A", option="很长的选项" * 120) for i in range(2)]
    write_lines(path, rows)
    names = ["innovation_capacity"]
    code, found, errors = call(capfd, model, names, data_dir=str(tmp_path))
    assert (code, found) == (2, None)
    assert "too small for every prompt; the model was made for 256 tokens, " in errors
    assert errors.strip().endswith(" are needed; take a model that is longer")
    code, found, errors = call(capfd, checkpoints["llama"], names, data_dir=str(tmp_path), max_seq_len=256)
    assert code == 2
    assert "too small for every prompt; give " in errors
    write_lines(path, [*rows, question(2, "B")])
    code, found, errors = call(capfd, model, names, data_dir=str(tmp_path))
    assert code == 0, errors
    note = next(note for note in found["diagnosis"]["innovation_capacity"] if "do not fit" in note)
    assert "left out of the score (the model was made for 256 tokens, " in note


def test_everything_is_checked_before_the_weights_load(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_load(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("llmops.models.chat_model.ChatModel.load", no_load)
    code, found, errors = call(capfd, checkpoints["llama"], ["inference_ability"], max_seq_len=9)
    assert (code, found) == (2, None)
    assert "max_seq_len 9 is too small for every prompt; give " in errors
    write_afqmc(tmp_path, 2)
    write_lines(tmp_path / "afqmc_public" / "test.json", [{"id": 0, "sentence1": "a"}])
    options = {"data_dir": str(tmp_path), "output_path": str(tmp_path / "out")}
    code, found, errors = call(capfd, checkpoints["llama"], ["inference_ability"], "--export_official", **options)
    assert (code, found) == (2, None)
    assert "test.json:1: 'sentence2' is missing" in errors


def test_a_cut_passage_says_when_it_lost_its_answer(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Counted exactly; the ceiling falls by it; without a length nothing is cut."""
    passage = "开头有甲。" + "中间没有什么。" * 80 + "结尾有乙。"
    qas = [
        {"id": f"TRIAL_0_QUERY_{i}", "question": "有什么？", "answers": [{"text": text, "answer_start": 0}]}
        for i, text in enumerate("甲乙乙")
    ]
    data = {"version": "v1.0", "data": [{"paragraphs": [{"id": "TRIAL_0", "context": passage, "qas": qas}]}]}
    (tmp_path / "cmrc2018").mkdir()
    (tmp_path / "cmrc2018" / "cmrc2018_trial.json").write_text(json.dumps(data), encoding="utf-8")
    out = tmp_path / "out"
    options = {"data_dir": str(tmp_path), "output_path": str(out)}
    code, found, errors = call(capfd, checkpoints["llama"], ["reading_comprehension"], max_seq_len=200, **options)
    assert code == 0, errors
    notes = found["diagnosis"]["reading_comprehension"]
    assert "3 of 3 prompts were longer than max_seq_len allows and were cut; 2 of them lost their answer by it" in notes
    report = read_report(out)["dimensions"]["reading_comprehension"]
    assert report["ceiling"]["score"] == pytest.approx(1 / 3, abs=1e-4)
    rows = read_lines(out / "samples" / "reading_comprehension.jsonl")
    assert [row["answer_cut_off"] for row in rows] == [False, True, True]
    assert all(row["prompt_tokens"] + row["new_tokens"] <= 200 for row in rows)
    code, found, _ = call(capfd, checkpoints["llama"], ["reading_comprehension"], **options)
    assert not any("cut" in note for note in found["diagnosis"]["reading_comprehension"])
    report = read_report(out)["dimensions"]["reading_comprehension"]
    assert report["ceiling"]["score"] == 1
    rows = read_lines(out / "samples" / "reading_comprehension.jsonl")
    assert report["max_seq_len"] == max(row["prompt_tokens"] for row in rows) + 64


# --- runs that end early ---------------------------------------------------------------------------------------------


def test_a_signal_leaves_what_is_finished(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """stdout has the finished dimension and says how far the other was; started again, it ends as if undisturbed."""
    names = ["inference_ability", "reading_comprehension"]
    options: dict[str, Any] = {"limit": 40, "data_dir": str(command.SAMPLES), "output_path": str(tmp_path / "out")}
    slow = {"gpu_id": -1, "batch_size": 1}  # the others run at once: the answers are the same
    arguments = [str(checkpoints["llama"]), json.dumps(names), json.dumps(options | slow)]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], env=environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    part = tmp_path / "out" / "samples" / "reading_comprehension.process0.jsonl"
    deadline = time.monotonic() + 90
    while (not part.is_file() or part.read_bytes().count(b"\n") < 1) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors[-1500:]
    assert "Traceback" not in errors
    found = json.loads(output)
    assert list(found["evaluation_results"]) == ["inference_ability"]
    (note,) = found["diagnosis"]["reading_comprehension"]
    kept = len({row["key"] for row in read_lines(part)})
    told = f"not finished, ended by SIGTERM: {kept} of 40 answers are in {tmp_path / 'out' / 'samples'}"
    assert note == f"{told}; the same command goes on there"
    report = read_report(tmp_path / "out")
    assert report["finished"] is False
    assert report["evaluation_results"] == found["evaluation_results"]
    code, again, errors = call(capfd, checkpoints["llama"], names, **options)
    assert code == 0
    assert f"reading_comprehension: {kept} of 40 answers are in" in errors
    _, straight, _ = call(capfd, checkpoints["llama"], names, **options | {"output_path": ""})
    assert again == straight
    assert read_report(tmp_path / "out")["finished"] is True


def test_a_stop_on_the_way_leaves_what_is_finished(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in the second dimension; a full disk when the reports are written: stdout has the scores."""
    answer = Engine.answer

    def failing(self: Engine, prepared: Any) -> list[Answer]:
        if prepared.name == "chinese_language_skill":
            raise RunStopped("no memory")
        return answer(self, prepared)

    monkeypatch.setattr(Engine, "answer", failing)
    names = ["inference_ability", "chinese_language_skill"]
    options = {"data_dir": str(command.SAMPLES), "limit": 3, "output_path": str(tmp_path / "out")}
    code, found, errors = call(capfd, checkpoints["llama"], names, **options)
    assert code == 1
    assert "stopped: no memory" in errors
    assert list(found["evaluation_results"]) == ["inference_ability"]
    assert found["diagnosis"]["chinese_language_skill"][0].startswith("not finished, stopped (RunStopped: no memory)")
    monkeypatch.undo()

    def full(*_: Any) -> None:
        raise RunStopped("the disk is full")

    monkeypatch.setattr("llmops.files.write_json", full)
    code, found, errors = call(capfd, checkpoints["llama"], names, **options)
    assert code == 1
    assert "stopped: the disk is full" in errors
    assert list(found["evaluation_results"]) == names


def test_a_signal_before_the_first_answer_is_told(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM while the weights load: the documented JSON with nothing finished."""

    def slow(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr("llmops.models.chat_model.ChatModel.load", slow)
    options = {"data_dir": str(command.SAMPLES), "limit": 3}
    code, found, errors = call(capfd, checkpoints["llama"], ["inference_ability"], **options)
    assert (code, found["evaluation_results"]) == (143, {})
    assert found["diagnosis"]["inference_ability"] == [
        "not finished, ended by SIGTERM: its answers are lost, because no output_path was given"
    ]
    assert "Traceback" not in errors


def test_a_full_disk_is_a_sentence() -> None:
    with pytest.raises(RunStopped, match="the disk of /dev/full is full"), appending(Path("/dev/full")) as append:
        append(b"x" * 10)


# --- other people's files --------------------------------------------------------------------------------------------


def test_two_at_once_and_foreign_files_are_refused(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Before anything is computed, and nothing of it is touched."""

    def refused(folder: Path, phrase: str) -> None:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        options = {"data_dir": str(command.SAMPLES), "limit": 2, "output_path": str(folder)}
        code, found, errors = call(capfd, checkpoints["llama"], ["inference_ability"], **options)
        assert (code, found) == (2, None)
        assert phrase in errors
        after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != EVALUATION}
        assert after == {path: text for path, text in before.items() if path.name != EVALUATION}

    contents = {
        "eval_results.json": ('{"command": "mine"}', "was not written by an evaluation and would be replaced; choose"),
        "five_dimensions.png": ("picture", "was not written by an evaluation"),
        "samples/inference_ability.jsonl": ('{"mine": 1}\n', "ability.jsonl was not written by an evaluation"),
    }
    for i, (name, (text, phrase)) in enumerate(contents.items()):
        path = tmp_path / str(i) / name
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
        refused(tmp_path / str(i), phrase)
    with lock(tmp_path / "2" / EVALUATION, ""):
        refused(tmp_path / "2", "another evaluation is writing into")


def test_both_commands_share_a_folder(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], taught_data: Path, tmp_path: Path
) -> None:
    """The results that stand there step aside under their command's name and are found again."""
    options = {"data_dir": str(command.SAMPLES), "limit": 2, "output_path": str(tmp_path)}
    code, found, errors = call(capfd, checkpoints["llama"], ["inference_ability"], **options)
    assert code == 0, errors
    model = ["--model_name_or_path", str(checkpoints["llama"]), "--dataset_path", str(taught_data), "--limit", "2"]
    assert model_performance_evaluation.main([*model, "--gpu_id", "-1", "--output_path", str(tmp_path)]) == 0
    aside = tmp_path / f"eval_results.{FIVE}.json"
    assert read_report(tmp_path)["command"] == PERFORMANCE
    assert json.loads(aside.read_text(encoding="utf-8"))["evaluation_results"] == found["evaluation_results"]
    assert read_scores(tmp_path)[1] == found["evaluation_results"]
    code, _, _ = call(capfd, checkpoints["llama"], ["inference_ability"], **options)
    assert code == 0
    assert read_report(tmp_path)["command"] == FIVE
    assert not aside.exists()
    assert (tmp_path / f"eval_results.{PERFORMANCE}.json").is_file()


def test_a_folder_of_others_keeps_everything(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Also files with names like ours: only exact ones are read, replaced or removed."""
    foreign = {
        "log.txt": "1", "adapter_config.json": "{}", "samples/notes.txt": "2",
        "samples/inference_ability_old.jsonl": "{broken", "samples/inference_ability.process0.jsonl.bak": "3",
    }  # fmt: skip
    for name, text in foreign.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    write_lines(tmp_path / "samples" / "inference_ability.process7.jsonl", [{"key": 5}, {"key": "k"}])
    options = {"data_dir": str(command.SAMPLES), "limit": 2, "output_path": str(tmp_path)}
    code, _, errors = call(capfd, checkpoints["llama"], ["inference_ability"], **options)
    assert code == 0, errors
    assert {name: (tmp_path / name).read_text(encoding="utf-8") for name in foreign} == foreign
