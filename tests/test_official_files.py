"""The official files of the benchmarks as they are, and the floors and ceilings of their scores."""

import json
import os
from pathlib import Path

import pytest
from test_evaluation_runs import call, pair, question, read_lines, read_report, write_afqmc, write_lines

from eval import evaluate_model_from_five_dimensions as command
from eval.engine import Engine, Settings
from eval.metrics import cmrc_em, cmrc_f1
from eval.samples import Answer, Sample
from llmops.console import UserError
from llmops.machine.sharing import Processes


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


def test_official_files_are_asked_as_the_score_is_and_say_what_they_lack(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The test file's questions follow the same solved examples; a file without all samples says so."""
    write_afqmc(tmp_path, 5)
    write_lines(tmp_path / "afqmc_public" / "test.json", [pair(i + 7) | {"id": i} for i in range(2)])
    out = tmp_path / "out"
    options = {"data_dir": str(tmp_path), "output_path": str(out), "export_official": True, "num_fewshot": 2}
    code, _, errors = call(capfd, checkpoints["llama"], ["inference_ability"], **options)
    assert code == 0, errors
    assert "lacks" not in errors
    (scored,) = {
        row["prompt"].rpartition("下面两个句子")[0] for row in read_lines(out / "samples/inference_ability.jsonl")
    }
    tested = read_lines(out / "samples" / "inference_ability.test.jsonl")
    assert scored.count("下面两个句子") == 2
    assert [row["prompt"].rpartition("下面两个句子")[0] for row in tested] == [scored] * 2
    options |= {"data_dir": str(command.SAMPLES), "limit": 3}
    code, _, errors = call(capfd, checkpoints["llama"], ["reading_comprehension"], **options)
    assert code == 0, errors
    count = len(command.cmrc2018.read(command.SAMPLES / "cmrc2018" / "cmrc2018_dev.json").samples)
    assert f"cmrc2018_predict.json lacks {count - 3} of {count} samples: those that limit drops" in errors


def test_a_kill_after_the_first_official_file_is_no_stranger(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Without results our samples say whose the file is; alone it is somebody else's."""
    out = tmp_path / "out"
    options = {"data_dir": str(command.SAMPLES), "limit": 2, "output_path": str(out), "export_official": True}
    code, found, errors = call(capfd, checkpoints["llama"], ["inference_ability"], **options)
    assert code == 0, errors
    for name in ("eval_results.json", "five_dimensions.png"):  # what a killed run has not written
        (out / name).unlink()
    assert (out / "official" / "afqmc_predict.json").is_file()
    code, again, errors = call(capfd, checkpoints["llama"], ["inference_ability"], **options)
    assert (code, again) == (0, found), errors
    assert "2 of 2 answers are in" in errors
    for name in ("eval_results.json", "five_dimensions.png", "samples/inference_ability.jsonl"):
        (out / name).unlink()
    code, _, errors = call(capfd, checkpoints["llama"], ["inference_ability"], **options)
    assert code == 2
    assert "afqmc_predict.json was not written by an evaluation" in errors


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
    assert what == "another person's question, against one reference fewer where a passage has one sample"
    shared = [Sample("", questions, "p") for questions in (("Who sat there?", "Who is it?"), ("Who sat?",), ("Why?",))]
    what, best = quoref.ceiling(shared)
    assert what == "another person's question"
    for sample, value in zip(shared, best, strict=True):  # the model's own references, not the passage's
        others = [one for other in shared if other is not sample for one in other.references]
        expected = sum(quoref.score(one, sample)["BLEU"] for one in others) / len(others)
        assert value == pytest.approx(expected)
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
