"""Runs of the five dimensions that do not go smoothly: prompts that do not fit, signals, full disks, foreign files."""

import json
import os
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
from eval.answers import FIVE, LOCK_NAME, PERFORMANCE
from eval.engine import Engine, Settings
from eval.metrics import cmrc_em, cmrc_f1
from eval.report import read_scores
from eval.samples import Answer
from llmops import files
from llmops.console import RunStopped, UserError
from llmops.machine.kept import appending
from llmops.machine.sharing import Processes

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
    options: dict[str, Any] = {"limit": 24, "data_dir": str(command.SAMPLES), "output_path": str(tmp_path / "out")}
    slow = {"gpu_id": -1, "batch_size": 1}  # the others run at once: the answers are the same
    arguments = [str(checkpoints["llama"]), json.dumps(names), json.dumps(options | slow)]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], env=environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    part = tmp_path / "out" / "samples" / "reading_comprehension.process0.jsonl"
    deadline = time.monotonic() + 90
    while (not part.is_file() or part.read_bytes().count(b"\n") < 4) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors[-1500:]
    assert "Traceback" not in errors
    found = json.loads(output)
    assert list(found["evaluation_results"]) == ["inference_ability"]
    (note,) = found["diagnosis"]["reading_comprehension"]
    kept = len({row["key"] for row in read_lines(part)})
    told = f"not finished, ended by SIGTERM: {kept} of 24 answers are in {tmp_path / 'out' / 'samples'}"
    assert note == f"{told}; the same command goes on there"
    report = read_report(tmp_path / "out")
    assert report["finished"] is False
    assert report["evaluation_results"] == found["evaluation_results"]
    code, again, errors = call(capfd, checkpoints["llama"], names, **options)
    assert code == 0
    assert f"reading_comprehension: {kept} of 24 answers are in" in errors
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
        after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK_NAME}
        assert after == {path: text for path, text in before.items() if path.name != LOCK_NAME}

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
    with files.lock(tmp_path / "2" / LOCK_NAME, ""):
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


# --- official files --------------------------------------------------------------------------------------------------


def test_official_forms_are_what_the_scripts_read(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """CMRC's predictions by query_id give the report's F1 and EM; CLUE's lines follow the test file."""
    write_afqmc(tmp_path, 4)
    write_lines(tmp_path / "afqmc_public" / "test.json", [pair(i, id=str(i)) | {"id": i} for i in (2, 0, 1)])
    native = command.SAMPLES / "cmrc2018" / "cmrc2018_dev.json"
    (tmp_path / "cmrc2018" / "data").mkdir(parents=True)
    (tmp_path / "cmrc2018" / "data" / "cmrc2018_dev.json").write_bytes(native.read_bytes())
    out = tmp_path / "out"
    names = ["inference_ability", "reading_comprehension"]
    options = {"data_dir": str(tmp_path), "output_path": str(out), "export_official": True}
    code, _, errors = call(capfd, checkpoints["llama"], names, **options)
    assert code == 0, errors
    predictions = json.loads((out / "official" / "cmrc2018_predict.json").read_text(encoding="utf-8"))
    f1, em, asked = 0.0, 0.0, 0
    for passage in json.loads(native.read_text(encoding="utf-8")):
        for row in passage["qas"]:
            asked += 1
            f1 += cmrc_f1(predictions[row["query_id"]], [str(a) for a in row["answers"]])
            em += cmrc_em(predictions[row["query_id"]], [str(a) for a in row["answers"]])
    assert len(predictions) == asked
    figures = read_report(out)["dimensions"]["reading_comprehension"]["metrics"]
    assert figures["F1"]["mean"] == pytest.approx(f1 / asked)
    assert figures["EM"]["mean"] == pytest.approx(em / asked)
    lines = read_lines(out / "official" / "afqmc_predict.json")
    assert [line["id"] for line in lines] == [2, 0, 1]
    rows = read_lines(out / "samples" / "inference_ability.test.jsonl")
    assert [line["label"] for line in lines] == [{"是": "1", "否": "0"}[row["prediction"]] for row in rows]
    assert [row["id"] for row in read_lines(out / "samples" / "inference_ability.jsonl")] == ["0", "1", "2", "3"]
    code, found, errors = call(capfd, checkpoints["llama"], names, **options | {"output_path": ""})
    assert (code, found) == (2, None)
    assert "export_official writes into output_path" in errors


def test_whole_checkouts_are_read_as_they_are(tmp_path: Path) -> None:
    """M3KE with its test folder of blank answers, CMRC2018's repository, CLUE's folders."""
    name = "Arts & Humanities-High school.jsonl"
    write_lines(tmp_path / "M3KE" / "data" / "dev" / f"Chinese-{name}", [question(i, "ABCD"[i]) for i in range(4)])
    write_lines(tmp_path / "M3KE" / "data" / "test" / f"Chinese-{name}", [question(i, "") for i in range(6)])
    (tmp_path / "M3KE" / "README.md").write_text("M3KE", encoding="utf-16")
    (tmp_path / "M3KE" / "data" / "M3KE.zip").write_bytes(b"PK\x03\x04")
    dimension = command.DIMENSIONS["innovation_capacity"]
    data = command.load_data(dimension, command.Options(data_dir=str(tmp_path), num_fewshot=1))
    assert len(data.loaded.samples) == 3
    assert data.path == tmp_path / "M3KE" / "data" / "dev"
    assert data.loaded.notes[0] == "the 6 questions of test have no answers, so those of dev are scored"
    rows = [question(i, "ABCD"[i] if i else "") for i in range(4)]
    write_lines(tmp_path / "M3KE" / "data" / "test" / f"Chinese-{name}", rows)
    data = command.load_data(dimension, command.Options(data_dir=str(tmp_path)))
    assert (data.path.name, len(data.loaded.samples)) == ("test", 3)
    assert data.loaded.notes == ["1 questions without an answer are left out"]


def test_linked_folders_are_entered(tmp_path: Path) -> None:
    """A data folder of links to checkouts elsewhere."""
    checkout = tmp_path / "elsewhere" / "BIG-bench" / command.quoref.CHECKOUT / command.quoref.TASK
    checkout.mkdir(parents=True)
    task = {"examples": [{"input": "Passage: a", "target": "Why?"}]}
    (checkout / "task.json").write_text(json.dumps(task), encoding="utf-8")
    write_lines(tmp_path / "elsewhere" / "M3KE" / "data" / "dev" / "A-B-C.jsonl", [question(0, "A")])
    (tmp_path / "data").mkdir()
    for name in ("BIG-bench", "M3KE"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere" / name)
    for name in ("command_compliance", "innovation_capacity"):
        data = command.load_data(command.DIMENSIONS[name], command.Options(data_dir=str(tmp_path / "data")))
        assert len(data.loaded.samples) == 1


def test_files_without_answers_are_refused(tmp_path: Path) -> None:
    """TNEWS's test file, whose keywords are of another kind, under the dev file's name or alone."""
    row = {"id": 0, "sentence": "标题", "keywords": "甲,乙"}
    path = write_lines(tmp_path / "tnews_public" / "dev.json", [row])
    tnews = command.DIMENSIONS["chinese_language_skill"]
    with pytest.raises(UserError, match=r"dev.json:1: no 'label'; this is the test file, take the dev file"):
        command.load_data(tnews, command.Options(data_dir=str(tmp_path)))
    path.rename(path.with_name("test.json"))
    with pytest.raises(UserError, match=r"test.json has no answers to score by; put TNEWS"):
        command.load_data(tnews, command.Options(data_dir=str(tmp_path)))


# --- floors and ceilings ---------------------------------------------------------------------------------------------


def test_choices_per_token(checkpoints: dict[str, Path]) -> None:
    """acc_norm takes the choice that is the likeliest per token, counted by the tokenizer."""
    answer = Answer("k", "是", "p", 1, False, (-3.0, -4.0), (1, 2))
    assert answer.normalised_choice(("是", "否")) == "否"
    assert Answer("k", "是", "p", 1, False, (-3.0, -4.0), (2, 2)).normalised_choice(("是", "否")) == "是"
    engine = Engine(Settings(str(checkpoints["llama"]), gpu_id=-1), Processes())
    samples = command.load_data(command.DIMENSIONS["inference_ability"], command.Options(limit=1)).loaded.samples
    (found,) = engine.answer(engine.prepare("x", samples, 1))
    assert found.choice_tokens == tuple(
        len(engine.renderer.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in samples[0].choices
    )


def test_floors_and_ceilings_by_hand(tmp_path: Path) -> None:
    """TNEWS: the keywords that stand in the title; quoref: another person's question, and nobody's own as a floor."""
    rows = [("甲乙丙丁", "甲乙,戊己"), ("无", "甲")]
    write_lines(tmp_path / "tnews" / "dev.json", [{"label": "1", "sentence": a, "keywords": b} for a, b in rows])
    tnews = command.DIMENSIONS["chinese_language_skill"]
    samples = command.load_data(tnews, command.Options(data_dir=str(tmp_path))).loaded.samples
    _, best = tnews.ceiling(samples)
    assert best == [tnews.score("甲乙", samples[0])["BLEU"], 0.0]
    assert tnews.score("甲乙，庚", samples[0]) == pytest.approx(
        {"BLEU": tnews.score("甲乙,庚", samples[0])["BLEU"], "keyword_F1": 0.5}
    )
    quoref = command.DIMENSIONS["command_compliance"]
    shipped = command.load_data(quoref, command.Options(limit=3)).loaded.samples
    what, best = quoref.ceiling(shipped)
    one, other = shipped[0].references
    both = (quoref.score(one, shipped[0])["BLEU"], quoref.score(other, shipped[0])["BLEU"])
    assert both == (1.0, 1.0)
    assert best[0] is not None
    assert 0 < best[0] < 1
    assert what == "another person's question"
    for seed in range(5):
        assert quoref.baselines(shipped, seed)["a random question"] < 0.5  # a shuffle that fixes one would give a third


def test_report_has_bounds(capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Floor, ceiling and the share of the way beside every score; n, limit and interval in diagnosis."""
    names = list(command.DIMENSIONS)
    options = {"limit": 4, "output_path": str(tmp_path), "data_dir": str(command.SAMPLES)}
    code, found, errors = call(capfd, checkpoints["llama"], names, **options)
    assert code == 0, errors
    for name, report in read_report(tmp_path)["dimensions"].items():
        low, high, score = report["floor"]["score"], report["ceiling"]["score"], report["score"]
        assert low == max(report["baselines"].values())
        expected = (score - low) / (high - low) if high > low else None
        assert report["share_of_the_way"] == (pytest.approx(expected, abs=2e-3) if expected is not None else None)
        note = next(note for note in found["diagnosis"][name] if note.startswith("4 samples drawn from "))
        assert f"(limit 4): {report['metric']} {report['metrics'][report['metric']]['mean']:.3f}, 95% interval" in note
    assert os.listdir(tmp_path / "samples")


def test_the_hubs_parquet_files_are_read(tmp_path: Path) -> None:
    """AFQMC and CMRC2018 as the Hugging Face hub keeps them: the same samples as from the authors' files."""
    import pyarrow
    from pyarrow import parquet

    rows = [pair(i) | {"label": i % 2, "idx": i} for i in range(3)]
    path = tmp_path / "clue" / "afqmc" / "validation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    afqmc = command.DIMENSIONS["inference_ability"]
    data = command.load_data(afqmc, command.Options(data_dir=str(tmp_path)))
    write_lines(tmp_path / "afqmc" / "dev.json", [row | {"label": str(row["label"])} for row in rows])
    assert data.loaded.samples == command.load_data(afqmc, command.Options(data_dir=str(tmp_path))).loaded.samples
    cmrc = command.DIMENSIONS["reading_comprehension"]
    native = cmrc.read(command.SAMPLES / "cmrc2018" / "cmrc2018_dev.json").samples
    flat = [
        {"id": sample.id, "context": sample.passage, "question": sample.after[4:-4],
         "answers": {"text": list(sample.references), "answer_start": [0] * len(sample.references)}}
        for sample in native
    ]  # fmt: skip
    path = tmp_path / "cmrc2018" / "data" / "validation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(flat), path)
    assert command.load_data(cmrc, command.Options(data_dir=str(tmp_path))).loaded.samples == native
    path.write_bytes(b"PAR1broken")
    with pytest.raises(UserError, match="is no parquet file"):
        command.load_data(cmrc, command.Options(data_dir=str(tmp_path)))
