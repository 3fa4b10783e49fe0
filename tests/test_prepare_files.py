"""faq/prepare with several files: commas and patterns as training takes them; places of both, all problems at once."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import chat_main
from test_faq import faq

from faq import prepare
from llmops.intents import questions

INTENTS = {
    "退款": ["怎么退款", "我要退款", "退款多久到", "钱退到哪里"],
    "物流": ["快递到哪了", "查一下物流", "什么时候送到", "物流不动了"],
    "发票": ["怎么开发票", "发票抬头写错", "要电子发票", "发票没收到"],
}
ROWS = [{"question": question, "intent": intent} for intent, asked in INTENTS.items() for question in asked]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    """A file of these rows: csv or JSON lines by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    if path.suffix == ".csv":
        texts = [",".join(values) for values in (rows[0].keys(), *(row.values() for row in rows))]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def listed(intent: str) -> dict[str, str]:
    """All questions of an intent as one record."""
    return {"input": str(INTENTS[intent]), "intent": intent, "output": f"{intent}的答复"}


def run(given: str, folder: Path, *flags: str) -> int:
    """The command's exit code."""
    return prepare.main(["--data_file", given, "--output_dir", str(folder / "out"), *flags])


def asked(path: Path) -> set[str]:
    """The questions of a prepared file."""
    return {json.loads(line)["question"] for line in path.open(encoding="utf-8")}


def test_several_files_of_any_shape_are_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named with commas or by a pattern, as one file with all of it; each file is told with its shape."""
    write(tmp_path / "one.jsonl", *map(listed, INTENTS))
    assert run(str(tmp_path / "one.jsonl"), tmp_path) == 0
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[a-z]*")}
    write(tmp_path / "more" / "1.jsonl", listed("退款"))
    write(tmp_path / "more" / "2.csv", *({"问题": q, "意图": "物流", "答案": "物流的答复"} for q in INTENTS["物流"]))
    (tmp_path / "more" / "3.json").write_text(json.dumps([listed("发票")]), encoding="utf-8")
    names = [str(tmp_path / "more" / name) for name in ("1.jsonl", "2.csv", "3.json")]
    for given in (f"{names[0]}, {names[1]},{names[2]}", f"{tmp_path}/more/*", f"{names[0]},{tmp_path}/more/[23].*"):
        capsys.readouterr()
        assert run(given, tmp_path) == 0
        said = capsys.readouterr()
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[a-z]*")} == expected
        assert json.loads(said.out)["intents"] == 3
        assert f"{names[0]}: JSON lines with input, intent, output, 1 records" in said.err
        assert f"{names[1]}: csv with 问题, 意图, 答案, 4 records" in said.err
        assert f"{names[2]}: a JSON array with input, intent, output, 1 records" in said.err


def test_the_problems_of_all_files_come_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad records, a file that is not there, a question with two intents in two files."""
    one = write(tmp_path / "a.jsonl", *ROWS, {"question": "问"})
    other = write(tmp_path / "b.csv", {"question": "怎么退款", "intent": "物流"}, {"question": "", "intent": "物流"})
    assert run(f"{one},{tmp_path}/none.csv,{other}", tmp_path) == 2
    said = capsys.readouterr().err
    assert f"{one}:13: no intent (keys found: 'question')" in said
    assert f"the data file {tmp_path}/none.csv does not exist" in said
    assert f"{other}:3: an empty question" in said
    assert "1 questions have two intents; decide on one each" in said
    assert f"{other}:2: '怎么退款' has the intent '物流' here and '退款' in {one}:1\n" in said
    assert not (tmp_path / "out").exists()
    assert run(f"{one},{other}", tmp_path, "--skip_bad_lines", "true") == 0
    assert "怎么退款" not in asked(tmp_path / "out" / "train.jsonl") | asked(tmp_path / "out" / "test.jsonl")
    assert f"left out: 1 questions have two intents; decide on one each:\n  {other}:2: " in capsys.readouterr().err


def test_repeats_are_told_with_both_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within a file by its lines, as ever; other replies by the file that has them."""
    one = write(tmp_path / "a.jsonl", *ROWS, ROWS[0])
    other = write(tmp_path / "b.jsonl", ROWS[5], ROWS[1] | {"output": "甲"}, ROWS[2] | {"output": "乙"})
    assert run(f"{one},{other}", tmp_path) == 0
    said = capsys.readouterr().err
    assert f"{one}: 1 repeated questions are kept once; lines 13\n" in said
    assert (
        "3 questions of one file are repeated in another and are kept once:\n"
        f"  {other}:1: the same question as in {one}:6\n"
        f"  {other}:2: the same question as in {one}:2\n"
        f"  {other}:3: the same question as in {one}:3\n"
    ) in said
    assert f"{other}: 1 records have another reply than their intent's first one, which is used: lines 3\n" in said
    many = write(tmp_path / "c.jsonl", *ROWS)
    assert run(f"{one},{many}", tmp_path) == 0
    assert f"  {many}:10: the same question as in {one}:10\n  and 2 more\n" in capsys.readouterr().err


def test_tests_may_be_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / f"{name}.jsonl", *rows) for name, rows in (("a", ROWS[:6]), ("b", ROWS[6:]))]
    tests = [write(tmp_path / f"test{k}.jsonl", row, ROWS[0]) for k, row in enumerate((ROWS[3], ROWS[7]))]
    assert run(",".join(map(str, files)), tmp_path, "--test_data_file", f"{tmp_path}/test*.jsonl") == 0
    said = capsys.readouterr().err
    assert asked(tmp_path / "out" / "test.jsonl") == {ROWS[k]["question"] for k in (0, 3, 7)}
    assert f"{files[0]}: 2 questions are test questions, too, and left out of training; lines 1, 4\n" in said
    assert f"{files[1]}: 1 questions are test questions, too, and left out of training; lines 2\n" in said
    assert f"repeated in another and stay:\n  {tests[1]}:2: the same question as in {tests[0]}:2\n" in said


def test_files_that_cannot_be_one_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {"messages": [{"role": "user", "content": "意图？退"}, {"role": "assistant", "content": "退款"}]}
    one, other = write(tmp_path / "a.jsonl", *ROWS), write(tmp_path / "b.jsonl", made)
    for given, phrase in (
        (f"{one},{other}", f"{other}:1 has 'messages' and {one}:1 a question with its intent; expected one of the two"),
        (f"{one},{tmp_path}/out/t[er]*.jsonl", f"no file matches {tmp_path}/out/t[er]*.jsonl"),
        (f"{one},{tmp_path}", f"the data file {tmp_path} is a folder"),
        (" , ", "names no file"),
    ):
        assert run(given, tmp_path) == 2
        assert phrase in capsys.readouterr().err
    assert run(str(one), tmp_path) == 0
    capsys.readouterr()
    assert run(f"{one},{tmp_path}/out/t*.jsonl", tmp_path) == 2  # a pattern that takes in what prepare wrote
    said = capsys.readouterr().err
    for name in ("train", "test"):
        assert f"{tmp_path}/out/{name}.jsonl would be overwritten by its own result" in said


def test_training_prepares_several_files_on_the_way(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """test.jsonl beside the first of them holds the test questions, unless it is one of them."""
    write(tmp_path / "a" / "1.jsonl", *ROWS[:6])
    write(tmp_path / "b" / "2.csv", *ROWS[6:])
    write(tmp_path / "a" / "test.jsonl", ROWS[4])
    out = tmp_path / "out"
    common = ("--model_name_or_path", str(checkpoints["llama"]), "--output_path", str(out), "--learning_rate", "-1")
    given = f"{tmp_path}/a/1.jsonl,{tmp_path}/b/*.csv"
    done = chat_main("--train_file", given, *common, SCENARIO="faq")
    assert done.returncode == 2
    assert f"{given} holds questions with intents: faq/prepare.sh makes conversations of them in {out}_faq\n" in (
        done.stderr
    )
    assert "learning_rate is -1.0" in done.stderr
    made = tmp_path / "out_faq"
    assert asked(made / "test.jsonl") == {ROWS[4]["question"]}
    assert asked(made / "train.jsonl") == {row["question"] for row in ROWS} - {ROWS[4]["question"]}
    write(tmp_path / "a" / "test.jsonl", ROWS[11])
    write(tmp_path / "b" / "2.csv", *ROWS[6:11])
    done = chat_main("--train_file", f"{tmp_path}/a/*.jsonl,{tmp_path}/b/2.csv", *common, SCENARIO="faq")
    assert "learning_rate is -1.0" in done.stderr
    assert asked(made / "test.jsonl") | asked(made / "train.jsonl") == {row["question"] for row in ROWS}
    assert len(asked(made / "test.jsonl")) > 1  # held out, not that file's
    given = f"{tmp_path}/a/1.jsonl,{made}/train.jsonl"
    done = chat_main("--train_file", given, *common, SCENARIO="faq")
    assert done.returncode == 2
    assert f"{tmp_path}/a/1.jsonl holds questions with intents and {made}/train.jsonl conversations; " in done.stderr


def test_what_no_file_is_named_by_is_left_to_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which names it with all other problems of the settings."""
    assert questions.main([f"{tmp_path}/*.jsonl"]) == questions.OTHER_DATA
    assert questions.main([f"{tmp_path}/none.jsonl,{tmp_path}/none.csv"]) == questions.OTHER_DATA
    raw = write(tmp_path / "a.jsonl", *ROWS)
    assert questions.main([f"{raw},{tmp_path}/none.csv"]) == 0  # prepare says what is not there
    assert capsys.readouterr() == ("", "")


def test_run_all_takes_several_files(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    write(tmp_path / "a.jsonl", *ROWS)
    write(tmp_path / "b.csv", ROWS[0] | {"intent": "物流"}, ROWS[1] | {"intent": ""})
    done = faq(
        "run_all.sh", "--mount_path", str(tmp_path / "mnt"), "--data_file", f"{tmp_path}/a.jsonl,{tmp_path}/*.csv",
        "--model_name_or_path", str(checkpoints["llama"]),
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{tmp_path}/b.csv:3: the intent is empty" in done.stderr
    assert f"b.csv:2: '怎么退款' has the intent '物流' here and '退款' in {tmp_path}/a.jsonl:1" in done.stderr
