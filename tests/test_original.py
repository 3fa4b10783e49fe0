"""Data, names and flags of the platform that these commands come from: records of ours in its shapes."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, chat_main, environment

from eval import analyze_similar_questions_and_intents as similar
from eval import diagnosis_monitoring, model_performance_evaluation
from eval import evaluate_model_from_five_dimensions as five
from eval.dimensions import m3ke
from faq import prepare, queries
from llmops import files
from llmops.console import UserError
from llmops.intents.catalog import load_catalog
from llmops.intents.questions import kind_of_data, read_faq
from train import finetune
from train.flags import parse

SAMPLES = ROOT / "eval" / "eval_datasets"
LISTS = (("改密码", "查快递", "退货"), ("退货", "开发票"))
QUESTIONS = [("怎么改密码", 0, "改密码"), ("密码忘了", 0, "改密码"),
             ("包裹到哪了", 0, "查快递"), ("快递呢", 0, "查快递"),
             ("想退货", 1, "退货"), ("怎么退", 1, "退货"), ("要发票", 1, "开发票"), ("发票在哪开", 1, "开发票"),
             ("今天天气", 1, "不符合"), ("讲个笑话", 0, "不符合")]  # fmt: skip


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines, whatever the file is called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def converted(question: str, listed: int, intent: str) -> dict[str, str]:
    """A row as its converter writes it."""
    asked = f"问题: {question}\n候选类别: " + "\n".join(LISTS[listed])
    return {"instruction": "判断问题属于哪个类别。", "input": asked, "output": intent}


def test_a_question_with_two_lists_is_on_one_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether a part is held out or a test file is given."""
    rows = [converted(f"{intent}{k}", k % 2, intent) for k in range(8) for intent in set(LISTS[0]) & set(LISTS[1])]
    rows += [row | {"input": f"问题: 想{k}\n候选类别: " + "\n".join(LISTS[listed])}
             for k in range(8) for listed in (0, 1) for row in [converted("", listed, LISTS[listed][0])]]  # fmt: skip
    data = lines(tmp_path / "faq.jsonl", rows)
    assert prepare.main(["--data_file", str(data), "--output_dir", str(tmp_path / "a"), "--test_ratio", "0.4"]) == 0
    sides = [asked(tmp_path / "a" / f"{name}.jsonl") for name in ("train", "test")]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == len({row["input"].split("\n")[0] for row in rows})
    capsys.readouterr()
    test = lines(tmp_path / "test.jsonl", [row for row in rows if "想3\n" in row["input"]][:1])
    given = ["--data_file", str(data), "--test_data_file", str(test), "--output_dir", str(tmp_path / "b")]
    assert prepare.main(given) == 0
    assert "2 questions are test questions, too, and left out of training" in capsys.readouterr().err
    assert asked(tmp_path / "b" / "test.jsonl") == {"想3"}
    assert "想3" not in asked(tmp_path / "b" / "train.jsonl")


def asked(path: Path) -> set[str]:
    """The questions of a prepared file."""
    return {json.loads(line)["question"] for line in path.open(encoding="utf-8")}


def test_converted_records_keep_their_own_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON lines in a file called .json; one catalog per list, whose rows begin alike; answers are held to the list."""
    data = lines(tmp_path / "faq.json", [converted(*row) for row in QUESTIONS])
    assert kind_of_data(data) == "raw"
    out = tmp_path / "out"
    assert prepare.main(["--data_file", str(data), "--output_dir", str(out), "--test_ratio", "0.3"]) == 0
    assert "the rows have 2 candidate lists of their own, which are kept" in capsys.readouterr().err
    catalog = load_catalog(out / "intents.json")
    assert [catalog.answers(i) for i in range(2)] == [[*listed, "不符合"] for listed in LISTS]
    rows = [json.loads(line) for name in ("train", "test") for line in (out / f"{name}.jsonl").open(encoding="utf-8")]
    assert {(row["question"], row["intent"]) for row in rows} == {
        (question, intent) for question, _, intent in QUESTIONS
    }
    for question, listed, _ in QUESTIONS:
        (row,) = (row for row in rows if row["question"] == question)
        _, found, tail = row["messages"][0]["content"].partition("\n".join(LISTS[listed]))
        assert found
        assert question in tail
        assert row["variant"] == listed
        assert row["messages"][:1] == catalog.prompt(question, listed)
    record = read_faq(data).records[4]
    assert queries.own_variant(catalog, record, "a") == 1
    unknown = converted("退", 1, "退货") | {"input": "问题: 退\n候选类别: 退货\n换货"}
    record = read_faq(lines(tmp_path / "other.json", [unknown])).records[0]
    with pytest.raises(UserError, match="its candidate '换货' is no intent of the"):
        queries.own_variant(catalog, record, "a")


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"output": "换货"}, "the intent '换货' is not among its own candidates, and not 不符合"),
        ({"output": ""}, "'output' is empty; expected the intent, one of the candidates"),
        ({"input": "问题: 退\n候选类别: 退货"}, "fewer than two candidates after 候选类别"),
    ],
)
def test_a_broken_converted_record(tmp_path: Path, change: dict[str, str], phrase: str) -> None:
    data = lines(tmp_path / "faq.json", [converted(*QUESTIONS[0]), converted(*QUESTIONS[4]) | change])
    with pytest.raises(UserError) as caught:
        read_faq(data)
    assert f"{data}:2: " in str(caught.value)
    assert phrase in str(caught.value)


def test_raw_records_go_straight_to_the_command(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """They are prepared on the way, which is said; what is prepared passes the check."""
    raw = [{"instruction": "判断意图", "question": q + more, "intent": i, "output": f"请看{i}页面。"}
           for q, _, i in QUESTIONS for more in ("", "吗", "啊", "呀")]  # fmt: skip
    data = lines(tmp_path / "data" / "faq.jsonl", raw)
    model, out = str(checkpoints["llama"]), tmp_path / "out"
    run = chat_main("--train_file", str(data), "--model_name_or_path", model, "--output_path", str(out),
                    "--learning_rate", "-1", "--eval_ratio", "0.5", SCENARIO="faq", timeout=60)  # fmt: skip
    assert run.returncode == 2
    assert "learning_rate is -1.0" in run.stderr  # what follows sees the settings as ever
    assert f"{data} holds questions with intents: faq/prepare.sh makes conversations of them in {out}_faq" in run.stderr
    made = tmp_path / "out_faq" / "train.jsonl"
    assert kind_of_data(made) == "prepared"
    held_out = [line.value["intent"] for line in files.json_lines(made.with_name("test.jsonl"))]
    assert [held_out.count(intent) for intent in ("改密码", "查快递", "退货", "开发票")] == [4] * 4  # of 8 each
    arguments = ["--check", "--scenario", "faq", "--train_file", str(made), "--model_name_or_path", model]
    assert finetune.main([*arguments, "--output_path", str(out)]) == 0


def test_a_crash_is_no_answer(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """What looks whether the data holds questions breaks: nothing goes on without knowing."""
    for name in ("llmops", "train"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "chat_main.sh", tmp_path)
    (tmp_path / "llmops" / "intents" / "questions.py").write_text("raise ZeroDivisionError\n")
    data = lines(tmp_path / "faq.jsonl", [{"question": "退", "intent": "退货"}])
    command = ["bash", str(tmp_path / "chat_main.sh"), "--scenario", "faq", "--train_file", str(data)]
    command += ["--model_name_or_path", str(checkpoints["llama"]), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError\n")
    assert done.stderr.count("Traceback") == 1


def test_exports_as_conversations_are_refused(
    tmp_path: Path, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Their answers are replies: as FAQ data each reply would be an intent."""
    rows = [{"messages": [{"role": "system", "content": "判断意图"}, {"role": "user", "content": f"{q}\n{i}"},
                          {"role": "assistant", "content": f"请看{i}页面。"}]} for q, _, i in QUESTIONS]  # fmt: skip
    data = lines(tmp_path / "train.jsonl", [row | {} for row in rows])
    for read in (read_faq, kind_of_data):
        with pytest.raises(UserError, match=r"conversations exported from FAQ data: .* with SCENARIO=general"):
            read(data)
    model = str(checkpoints["llama"])
    asked = [
        "--check",
        "--train_file",
        str(data),
        "--output_path",
        str(tmp_path / "out"),
        "--model_name_or_path",
        model,
    ]
    assert finetune.main(asked) == 0
    assert finetune.main([*asked, "--scenario", "faq"]) == 2
    assert "conversations exported from FAQ data" in capsys.readouterr().err


def test_general_records_are_alpaca(tmp_path: Path, checkpoints: dict, capfd: pytest.CaptureFixture[str]) -> None:
    data = lines(tmp_path / "train.jsonl", [{"instruction": "译成英文", "input": "你好", "output": "Hello"}] * 3)
    model = str(checkpoints["llama"])
    arguments = ["--check", "--train_file", str(data), "--model_name_or_path", model]
    assert finetune.main([*arguments, "--output_path", str(tmp_path / "out")]) == 0
    assert "train.jsonl: Alpaca, 3 conversations" in capfd.readouterr().err


def test_answers_with_gold_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No model is asked; a row without one of them is named."""
    data = lines(tmp_path / "answers.jsonl", [{"answer": "退货", "gold": "退货"}, {"answer": "查快递", "gold": "退货"}])
    arguments = ["--dataset_path", str(data), "--evaluation_metrics", "Acc,F1"]
    assert model_performance_evaluation.main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["data"]["evaluation_results"]["Acc"] == 0.5
    assert model_performance_evaluation.main([*arguments, "--limit", "1", "--output_path", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["data"]["evaluation_results"]["Acc"] in (0.0, 1.0)
    assert "--output_path has no effect" in told.err
    lines(data, [{"answer": "退货", "gold": "退货"}, {"answer": "退货"}])
    assert model_performance_evaluation.main(arguments) == 2
    assert f'{data}:2: found no texts under \\"answer\\" and \\"gold\\"' in capsys.readouterr().out


def test_its_file_names_of_the_five_dimensions(tmp_path: Path) -> None:
    """All in one folder, with the contents that the benchmarks have."""
    first = next((SAMPLES / "m3ke" / "data" / "dev").glob("*.jsonl"))
    for name, source in {
        "inference_ability.jsonl": SAMPLES / "afqmc" / "dev.json",
        "reading_comprehension.json": SAMPLES / "cmrc2018" / "squad-style-data" / "cmrc2018_dev.json",
        "chinese_language_skill.jsonl": SAMPLES / "tnews" / "dev.json",
        "command_compliance.json": next((SAMPLES / "bigbench").glob("*/task.json")),
        "innovation_capacity.jsonl": first,
    }.items():
        (tmp_path / name).write_bytes(source.read_bytes())
        dimension = five.DIMENSIONS[name.partition(".")[0]]
        assert dimension.find(tmp_path) == tmp_path / name
        assert dimension.read(tmp_path / name).samples
    samples = m3ke.read(tmp_path / "innovation_capacity.jsonl").samples
    assert samples[0].messages[0]["content"].startswith("以下是单项选择题")


def test_its_flags(tmp_path: Path) -> None:
    """The names beside ours, on the four commands; its name of a schedule."""
    log = str(tmp_path / "log.txt")
    assert diagnosis_monitoring.parse([f"--log_path={log}"]).log_path == log
    named = [
        "--local_rank=0",
        "--model_name_or_path",
        "m",
        "--gpu_nums",
        "0",
        "--evaluation_dimensions",
        '["inference_ability"]',
    ]
    found = five.parse([*named, "--output_file", "o.json", "--options", "{}"])
    assert (found.model, found.dimensions, found.options) == ("m", '["inference_ability"]', "{}")
    assert (found.gpu_nums, found.output_file) == (0, "o.json")
    with pytest.raises(UserError, match="no model is given"):
        five.parse([])
    given = [
        "--model_name",
        "m",
        "--dataset",
        "d.jsonl",
        "--dataset_type",
        "faq",
        "--output_file",
        str(tmp_path / "o.json"),
    ]
    config = similar.parse(given)
    assert (config.model_path, config.data_file_path, config.output_file) == ("m", Path("d.jsonl"), tmp_path / "o.json")
    with pytest.raises(UserError) as caught:
        parse(["--lr_scheduler_type", "CONSTANT_WITH_WARMUP"])
    assert "lr_scheduler" not in str(caught.value)
