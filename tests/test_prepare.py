"""FAQ data in every shape users have, and every way in which it can be bad, named by line."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment

from faq import prepare
from llmops.intents.catalog import load_catalog, wording_of
from llmops.intents.questions import compared, read_faq

INTENTS = {
    "退款": ["怎么退款", "我要退款", "退款多久到", "钱退到哪里"],
    "物流": ["快递到哪了", "查一下物流", "什么时候送到", "物流不动了"],
    "发票": ["怎么开发票", "发票抬头写错", "要电子发票", "发票没收到"],
    "密码": ["忘记密码", "怎么改密码", "密码错误", "密码锁了"],
}


def write(path: Path, text: str) -> Path:
    """A file with this text."""
    path.write_text(text, encoding="utf-8")
    return path


def lines(rows: list[Any]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def single_rows() -> list[dict[str, str]]:
    """One record per question."""
    return [
        {"instruction": "判断意图", "question": q, "intent": intent, "output": f"{intent}的答复"}
        for intent, questions in INTENTS.items()
        for q in questions
    ]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(data: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """faq/prepare.sh as a user runs it."""
    command = ["bash", str(ROOT / "faq" / "prepare.sh"), "--data_file", str(data), "--output_dir", str(output), *flags]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


def shapes() -> dict[str, tuple[str, str]]:
    """File name and text of the same questions in every shape."""
    rows = single_rows()
    listed = [
        {"intruction": "判断意图", "input": str(questions), "intent": intent, "output": f"{intent}的答复"}
        for intent, questions in INTENTS.items()
    ]
    table = "question,intent,output\n" + "".join(f'"{r["question"]}",{r["intent"]},{r["output"]}\n' for r in rows)
    return {
        "lines": ("a.jsonl", lines(rows)),
        "array": ("a.json", json.dumps(rows, ensure_ascii=False, indent=2)),
        "listed": ("a.jsonl", lines(listed)),
        "listed array": ("a.json", json.dumps(listed, ensure_ascii=False)),
        "csv": ("a.csv", table),
        "csv of spreadsheets": ("a.csv", "\ufeff" + table.replace("\n", "\r\n")),
    }


@pytest.mark.parametrize("shape", shapes())
def test_every_shape_gives_the_same(tmp_path: Path, shape: str) -> None:
    name, text = shapes()[shape]
    path = tmp_path / name
    path.write_bytes(text.encode())
    done = run(path, tmp_path / "out", "--test_ratio", "0.25", "--out_of_scope_ratio", "0")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"train": 12, "test": 4, "intents": 4, "output_dir": str(tmp_path / "out")}
    assert ("csv" if "csv" in shape else "JSON array" if "array" in shape else "JSON lines") in done.stderr
    catalog = load_catalog(tmp_path / "out" / "intents.json")
    assert catalog.intents == {intent: f"{intent}的答复" for intent in INTENTS}
    rows = read(tmp_path / "out" / "test.jsonl")
    assert sorted(row["intent"] for row in rows) == sorted(INTENTS)  # stratified: one of each
    for row in rows:
        assert row["question"] in INTENTS[row["intent"]]
        assert row["messages"] == [
            *catalog.prompt(row["question"]),
            {"role": "assistant", "content": row["intent"]},
        ]


def test_the_prompt_has_the_question_last(tmp_path: Path) -> None:
    """So that all rows share their prompt's beginning: instruction, then every candidate, then the question."""
    run(write(tmp_path / "a.jsonl", lines(single_rows())), tmp_path / "out", "--out_of_scope_ratio", "0")
    rows = read(tmp_path / "out" / "train.jsonl")
    heads = {row["messages"][0]["content"].removesuffix(row["question"]) for row in rows}
    assert len(heads) == 1
    (head,) = heads
    assert [head.index(intent) for intent in INTENTS] == sorted(head.index(intent) for intent in INTENTS)
    assert "不符合" in head


def test_messages_pass_through(tmp_path: Path) -> None:
    made = [
        {"messages": [{"role": "user", "content": f"意图？{q}"}, {"role": "assistant", "content": intent}]}
        for intent, questions in INTENTS.items()
        for q in questions
    ]
    done = run(write(tmp_path / "a.jsonl", lines(made)), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert all({"messages": json.loads(row)["messages"]} in made for row in rows)
    assert load_catalog(tmp_path / "out" / "intents.json").wording is None


def test_split_is_seeded(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", lines(single_rows()))
    texts = []
    for seed in ("1", "1", "2"):
        assert run(data, tmp_path / "out", "--seed", seed).returncode == 0
        texts.append((tmp_path / "out" / "test.jsonl").read_text(encoding="utf-8"))
    assert texts[0] == texts[1] != texts[2]


def test_out_of_scope_rows(tmp_path: Path) -> None:
    """A variant's questions are those whose intent it leaves out; variants are few; real 不符合 rows stay."""
    rows = [*single_rows(), *({"question": f"闲聊{i}", "intent": "不符合"} for i in range(4))]
    flags = ("--out_of_scope_ratio", "0.5", "--variants", "2", "--test_ratio", "0.25")
    done = run(write(tmp_path / "a.jsonl", lines(rows)), tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    catalog = load_catalog(tmp_path / "out" / "intents.json")
    assert "不符合" not in catalog.intents
    assert len(catalog.left_out) == 1  # four intents are too few for two variants
    made = read(tmp_path / "out" / "train.jsonl")
    variants = [row for row in made if "variant" in row]
    assert variants
    truth = {q: intent for intent, questions in INTENTS.items() for q in questions}
    for row in variants:
        assert row["intent"] == row["messages"][-1]["content"] == "不符合"
        assert truth[row["question"]] in catalog.left_out[row["variant"]]
        assert f"\n{truth[row['question']]}\n" not in row["messages"][0]["content"]
    assert sum(row["intent"] == "不符合" and "variant" not in row for row in made) == 3


def test_a_question_with_other_marks_is_on_one_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Full width, case, blanks and the marks at the end; what is written stays as it was."""
    forms = ["{}{}?", "{}{}？", "{} {}", "{}{}。", "{}{}!!"]
    rows = [{"question": form.format(q, "WiFi" if k % 2 else "ＷＩＦＩ"), "intent": intent}
            for intent, questions in INTENTS.items() for q in questions for k, form in enumerate(forms)]  # fmt: skip
    data = write(tmp_path / "a.jsonl", lines(rows))
    common = ["--data_file", str(data), "--out_of_scope_ratio", "0"]
    assert prepare.main([*common, "--output_dir", str(tmp_path / "a"), "--test_ratio", "0.5"]) == 0
    made = [{r.questions[0] for r in read_faq(tmp_path / "a" / f"{name}.jsonl").records} for name in ("train", "test")]
    assert [len(side) for side in made] == [40, 40]  # 2 of 4 questions of each intent, in 5 forms
    assert made[0] | made[1] == {row["question"] for row in rows}
    assert not {compared(text) for text in made[0]} & {compared(text) for text in made[1]}
    test = write(tmp_path / "b.jsonl", lines([{"question": "怎么退款ｗｉｆｉ…", "intent": "退款"}]))
    assert prepare.main([*common, "--output_dir", str(tmp_path / "b"), "--test_data_file", str(test)]) == 0
    assert "5 questions are test questions, too" in capsys.readouterr().err
    assert [compared(text) for text in ("？！", "C++", "Ｃ#。", "", "a b.c")] == ["?!", "c++", "c#", "", "ab.c"]


def test_english_data_is_asked_in_english_also_with_questions_out_of_scope(tmp_path: Path) -> None:
    rows = [{"question": f"{word} {k}", "intent": word} for word in ("refund", "parcel") for k in range(4)]
    rows += [{"question": f"the weather on day {k}", "intent": "不符合"} for k in range(3)]
    data = write(tmp_path / "a.jsonl", lines(rows))
    assert prepare.main(["--data_file", str(data), "--output_dir", str(tmp_path / "out")]) == 0
    wording = load_catalog(tmp_path / "out" / "intents.json").wording
    assert wording == wording_of("auto", "", "en")
    assert wording != wording_of("auto")


def test_repeats_and_other_replies_are_told_by_line(tmp_path: Path) -> None:
    rows = [*single_rows(), single_rows()[0], single_rows()[1] | {"question": "新问题", "output": "另一个答复"}]
    done = run(write(tmp_path / "a.jsonl", lines(rows)), tmp_path / "out")
    assert done.returncode == 0
    assert "1 repeated questions are kept once; lines 17" in done.stderr
    assert "another reply than their intent's first one, which is used: lines 18" in done.stderr


BAD = [
    ({"question": "问"}, "a.jsonl:17: no intent (keys found: 'question')"),
    ({"question": "问", "intent": " "}, "a.jsonl:17: the intent is empty"),
    ({"question": "问", "intent": "退\n款"}, r"a.jsonl:17: the intent '退\n款' has a line break"),
    ({"question": " ", "intent": "退款"}, "a.jsonl:17: an empty question"),
    ({"intent": "退款"}, "a.jsonl:17: no question (keys found: 'intent')"),
    ({"input": "怎么了", "intent": "退款"}, "a.jsonl:17: 'input' is '怎么了', expected a list of questions"),
    ({"input": "['a', 1]", "intent": "退款"}, "a.jsonl:17: 'input' is"),
    ({"input": "{[]: 1}", "intent": "退款"}, "a.jsonl:17: 'input' is '{[]: 1}'"),
    ({"input": "-" * 100_000 + "1", "intent": "退款"}, "a.jsonl:17: 'input' is '-----"),
    ({"input": "1" + "+1" * 20_000, "intent": "退款"}, "a.jsonl:17: 'input' is '1+1"),
    (["x"], "a.jsonl:17: found a JSON list"),
    (
        {"question": "怎么退款", "intent": "物流"},
        "a.jsonl:17: '怎么退款' has the intent '物流' here and '退款' in line 1",
    ),
    ({"messages": []}, "a.jsonl:17: 'messages' is empty"),
]


@pytest.mark.parametrize(("row", "phrase"), BAD)
def test_bad_records_are_named(tmp_path: Path, row: Any, phrase: str) -> None:
    data = write(tmp_path / "a.jsonl", lines([*single_rows(), row]))
    done = run(data, tmp_path / "out")
    assert done.returncode == 2
    assert phrase in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()
    assert run(data, tmp_path / "out", "--skip_bad_lines", "true").returncode == 0


@pytest.mark.parametrize(
    ("name", "text", "phrase"),
    [
        ("a.jsonl", '{"question": "a", "intent": "b"}\n{broken\n', "a.jsonl:2: broken JSON"),
        ("a.json", '[{"question": "a", "intent": "b"},\n {broken]', "a.json:2: broken JSON"),
        ("a.json", '[{"question": "a", "intent": "b"}', "a.json:1: broken JSON"),
        ("a.csv", "question,intent\na,b\nonly one\n", "a.csv:3: found fewer columns than the header's 2"),
        ("a.csv", 'question,intent\n"a\nb",c\nx,y,z\n', "a.csv:4: found more columns than the header's 2"),
        ("a.jsonl", "", "no usable record"),
        ("a.jsonl", '{"question": "a", "intent": "b"}\n', "has 1 intent beside '不符合'"),
        ("a.jsonl", lines([{"question": "a", "intent": "b"}, {"question": "c", "intent": "d"}]), "0 rows left for the"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, phrase: str) -> None:
    done = run(write(tmp_path / name, text), tmp_path / "out")
    assert done.returncode == 2
    assert phrase in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_records_and_two_intents_come_at_once(tmp_path: Path) -> None:
    """And before what is wrong with the folder, which holds a file of somebody else's."""
    output = tmp_path / "datasets"
    output.mkdir()
    write(output / "train.jsonl", "mine\n")
    bad = [{"question": "问"}, {"question": "怎么退款", "intent": "物流"}]
    done = run(write(tmp_path / "a.jsonl", lines(single_rows() + bad)), output)
    assert done.returncode == 2
    assert "a.jsonl:17: no intent (keys found: 'question')" in done.stderr
    assert "1 questions have two intents" in done.stderr
    assert "a.jsonl:18: '怎么退款' has the intent '物流' here and '退款' in line 1" in done.stderr


def test_other_encodings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("question,intent\n怎么退款,退款\n".encode("gb18030"))
    done = run(path, tmp_path / "out")
    assert done.returncode == 2
    assert "a.csv:2: not UTF-8" in done.stderr


def test_test_intents_must_be_known(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", lines(single_rows()))
    tested = write(
        tmp_path / "b.jsonl", lines([{"question": "怎么退", "intent": "退款"}, {"question": "x", "intent": "新"}])
    )
    done = run(data, tmp_path / "out", "--test_data_file", str(tested))
    assert done.returncode == 2
    assert "b.jsonl:2: '新'" in done.stderr
    done = run(data, tmp_path / "out", "--test_data_file", str(tested), "--skip_bad_lines", "true")
    assert json.loads(done.stdout)["test"] == 1


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        (["--mode", "vicuna"], "invalid choice: 'vicuna'"),
        (["--test_ratio", "1"], "--test_ratio is 1.0"),
        (["--validation_ratio", "-1"], "--validation_ratio is -1.0"),
        (["--test_ratio", "0.7", "--validation_ratio", "0.1"], "0 rows left for validation"),
        (["--test_ratio", "0"], "there is no --test_data_file and --test_ratio is 0"),
        (["--model_name_or_path", "/no/model"], "the model folder /no/model has no config.json"),
    ],
)
def test_wrong_settings(tmp_path: Path, flags: list[str], phrase: str) -> None:
    done = run(write(tmp_path / "a.jsonl", lines(single_rows())), tmp_path / "out", *flags)
    assert done.returncode == 2
    assert phrase in done.stderr


@pytest.mark.parametrize("more", [(), ("--candidates", "2", "--out_of_scope_ratio", "0.5")])
def test_validation_is_apart_from_training_and_test(tmp_path: Path, more: tuple[str, ...]) -> None:
    data, out = write(tmp_path / "a.jsonl", lines(single_rows())), tmp_path / "out"
    done = run(data, out, "--test_ratio", "0.25", "--validation_ratio", "0.3", *more)
    assert done.returncode == 0, done.stderr
    rows = {name: read(out / f"{name}.jsonl") for name in ("train", "test", "validation")}
    assert json.loads(done.stdout).items() >= {name: len(found) for name, found in rows.items()}.items()
    asked = {name: {row["question"] for row in found} for name, found in rows.items()}
    assert sum(map(len, asked.values())) == len(set().union(*asked.values())) == 16
    assert [len(asked[name]) for name in ("train", "test", "validation")] == [8, 4, 4]
    assert run(data, out, "--test_ratio", "0.25", *more).returncode == 0
    assert {row["question"] for row in read(out / "test.jsonl")} == asked["test"]
    assert not (out / "validation.jsonl").exists()
    own = write(out / "validation.jsonl", "mine\n")
    assert run(data, out, *more).returncode == 0
    assert own.read_text(encoding="utf-8") == "mine\n"
    done = run(data, out, "--validation_ratio", "0.3", *more)
    assert done.returncode == 2
    assert "holds validation.jsonl that this command did not write" in done.stderr


def test_nothing_of_others_is_overwritten(tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", lines(single_rows()))
    before = data.read_bytes()
    assert "would be overwritten by its own result" in run(data, tmp_path).stderr
    other = write(tmp_path / "a.jsonl", lines(single_rows()))
    done = run(other, tmp_path)
    assert done.returncode == 2
    assert re.search(r"holds train\.jsonl that this command did not write", done.stderr)
    assert data.read_bytes() == before
    assert run(other, tmp_path, "--overwrite", "true").returncode == 0
    assert run(other, tmp_path).returncode == 0  # its own files it may replace


def test_the_model_decides_mode_and_length(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    data = write(tmp_path / "a.jsonl", lines(single_rows()))
    model = str(checkpoints["llama"])
    done = run(data, tmp_path / "out", "--model_name_or_path", model, "--mode", "glm3")
    assert done.returncode == 2
    assert "--mode glm3 is for model_type chatglm, the checkpoint is 'llama'" in done.stderr
    done = run(data, tmp_path / "out", "--model_name_or_path", model, "--max_seq_len", "40")
    assert done.returncode == 2
    assert re.search(r"a\.jsonl:\d+: this question's prompt with its 4 candidate intents has \d+ tokens", done.stderr)
    done = run(data, tmp_path / "out", "--model_name_or_path", model)
    assert done.returncode == 0
    assert "chat format: the checkpoint's own chat template" in done.stderr


def test_the_longest_prompt_is_found_among_lists_and_histories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoints: dict[str, Path]
) -> None:
    """The shortest question has the longest prompt; the sentence counts the candidates of its own list."""
    texts = [f"一个比较长的问题，它的编号是{k}" for k in range(30)]
    lists = [["甲", "乙"]] * 30 + [["甲", *(f"很长的候选意图的名字{k}" for k in range(40))]]
    listed = [
        {"input": f"问题: {text}\n候选类别: " + "\n".join(own), "output": own[k % 2]}
        for k, (text, own) in enumerate(zip([*texts, "短"], lists, strict=True))
    ]
    told = [
        {"messages": [{"role": "user", "content": "前" * (900 if text == "短" else 1)},
                      {"role": "assistant", "content": "嗯"}, {"role": "user", "content": text},
                      {"role": "assistant", "content": "乙" if k % 2 else "甲"}]}
        for k, text in enumerate([*texts, "短"])
    ]  # fmt: skip
    for rows, limit in ((listed, "400"), (told, "600")):
        data, out = write(tmp_path / "a.jsonl", lines(rows)), tmp_path / "out"
        given = ["--data_file", str(data), "--output_dir", str(out), "--model_name_or_path", str(checkpoints["llama"])]
        assert prepare.main([*given, "--max_seq_len", limit]) == 2
        said = capsys.readouterr().err
        assert "a.jsonl:31: this question's prompt with its" in said
    assert prepare.main([*given, "--max_seq_len", "5000"]) == 0
    write(tmp_path / "a.jsonl", lines(listed))
    assert prepare.main([*given, "--max_seq_len", "400"]) == 2
    assert "prompt with its 41 candidate intents has" in capsys.readouterr().err


def test_python_and_shell_have_the_same_settings() -> None:
    text = (ROOT / "faq" / "prepare.sh").read_text(encoding="utf-8")
    variables = dict(re.findall(r'^([A-Z_]+)="\$\{\1:-(.*)\}" ', text, re.MULTILINE))
    options = {a.dest: a.default for a in prepare.build_parser()._actions if a.dest != "help"}
    assert {name.lower() for name in variables} - {"mount_path"} == set(options)
    for name, default in options.items():
        shown = variables[name.upper()]
        assert shown in ("", str(default), str(default).lower()), name


def test_records_know_where_they_stand(tmp_path: Path) -> None:
    """Line from 1, index from 0, over blank lines, quoted line breaks and indentation."""
    rows = single_rows()[:2]
    spread = write(tmp_path / "a.json", "[\n" + ",\n\n".join(json.dumps(r, indent=1) for r in rows) + "\n]")
    assert [(r.line, r.index) for r in read_faq(spread).records] == [(2, 0), (9, 1)]
    table = write(tmp_path / "a.csv", 'question,intent\n"a\nb",c\n\nd,e\n')
    assert [(r.line, r.index) for r in read_faq(table).records] == [(2, 0), (5, 1)]
    spaced = write(tmp_path / "a.jsonl", "\n" + lines(rows[:1]) + "\n" + lines(rows[1:]))
    assert [(r.line, r.index) for r in read_faq(spaced).records] == [(2, 0), (4, 1)]
