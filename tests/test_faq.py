"""The FAQ scenario as a user runs it: the demo from nothing to scores, then every command of faq/README.md on it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, chat_main, environment, read_log, write_jsonl

from llmops.intents.catalog import load_catalog


def faq(name: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run one of faq/*.sh to its end."""
    return subprocess.run(
        ["bash", str(ROOT / "faq" / name), *arguments], env=environment(), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished demo, after `SCENARIO=faq bash chat_main.sh --demo`, beside settings of a user's own."""
    mount, own = tmp_path_factory.mktemp("mnt"), tmp_path_factory.mktemp("own")
    mine = dict.fromkeys(("TRAIN_FILE", "TEST_FILE", "TEST_DATA_FILE", "INTENTS_FILE"), "/no/such.jsonl")
    mine |= {"SCENARIO": "faq", "OUTPUT_PATH": str(own), "OVERWRITE_OUTPUT_PATH": "true", "MAX_STEPS": "1"}
    done = chat_main("--demo", "--mount_path", str(mount), timeout=900, **mine)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(own.iterdir())
    assert "accuracy" in done.stderr
    return mount / "demo" / "faq"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_demo_classifies_held_out_questions(demo: Path) -> None:
    constrained, free = json.loads((demo / "scores.json").read_text(encoding="utf-8"))["results"]
    assert constrained["questions"] > 80
    assert constrained["accuracy"] >= 0.6
    assert constrained["outside_the_candidates"] == 0
    assert constrained["constrained"]
    assert not free["constrained"]
    results = json.loads((demo / "output_path" / "train_results.json").read_text(encoding="utf-8"))
    assert results["eval_accuracy"] == pytest.approx(free["accuracy"], abs=1e-4)  # what greedy decoding writes
    catalog = load_catalog(demo / "output_path" / "intents.json")
    rows = read_lines(demo / "output_path" / "predictions.jsonl")
    asked = read_lines(demo / "datasets" / "test.jsonl")
    assert [row["question"] for row in rows] == [row["question"] for row in asked]
    for row, source in zip(rows, asked, strict=True):
        assert row["intent"] in catalog.answers(source.get("variant"))  # never outside the candidates
        assert row["reply"] == catalog.reply(row["intent"])
        assert 0 < row["runner_up"]["probability"] <= row["probability"] <= 1
        assert row["runner_up"]["intent"] != row["intent"]
    held_out = {row["question"] for row in asked}
    learned = {row["question"] for row in read_lines(demo / "datasets" / "train.jsonl")}
    assert not held_out & learned
    for picture in ("predictions.png", "training_loss.png"):
        assert (demo / "output_path" / picture).is_file()


def test_one_question_and_the_plain_way(demo: Path) -> None:
    model = str(demo / "output_path")
    question = "我要申请退款"
    answers = []
    for reuse in ("true", "false"):
        done = faq("predict.sh", "--model_name_or_path", model, "--question", question, "--reuse_prefix", reuse)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    assert answers[0]["intent"] == answers[1]["intent"]
    assert answers[0]["probability"] == pytest.approx(answers[1]["probability"], abs=1e-4)
    assert "reference" not in answers[0]


def test_a_file_of_questions(demo: Path, tmp_path: Path) -> None:
    """Raw questions, with and without intents, as csv; the same answers at another batch size."""
    table = tmp_path / "questions.csv"
    table.write_text(
        "question,intent\n怎么申请退款,\n帮我看看物流到哪了,查询物流进度\n讲个笑话,不符合\n", encoding="utf-8"
    )
    both, free = tmp_path / "both.jsonl", tmp_path / "free.jsonl"

    def rows(*arguments: str) -> list[tuple[str, str, bool]]:
        done = faq("predict.sh", "--mount_path", str(demo), "--input_file", str(table), *arguments)
        assert done.returncode == 0, done.stderr
        return told(done.stdout)

    def told(lines: str) -> list[tuple[str, str, bool]]:
        return [(row["question"], row["intent"], row["constrained"]) for row in map(json.loads, lines.splitlines())]

    written = ("--output_file", str(both), "--unconstrained_file", str(free))
    assert rows("--batch_size", "1", *written) == []
    held, plain = told(both.read_text(encoding="utf-8")), told(free.read_text(encoding="utf-8"))
    assert rows("--batch_size", "64") == held
    assert rows("--constrain", "false") == plain
    assert [len(held), *{row[2] for row in held}, *{row[2] for row in plain}] == [3, True, False]


def test_train_lora_merge_predict(demo: Path, tmp_path: Path) -> None:
    """A LoRA on the demo's model, merged: adapter and merged model answer alike."""
    settings = (
        "--scenario", "faq", "--mount_path", str(demo), "--output_path", str(tmp_path / "lora"),
        "--model_name_or_path", str(demo / "output_path"), "--merge_lora", "true", "--max_steps", "2",
        "--tensorboard", "false", "--max_seq_len", "1024", "--metric_for_best", "accuracy", "--eval_steps", "1",
    )  # fmt: skip
    done = chat_main(*settings)
    assert done.returncode == 0, done.stderr[-3000:]
    evaluated = [line for line in read_log(tmp_path / "lora") if "eval_accuracy" in line and line["step"]]
    best = max(evaluated, key=lambda line: line["eval_accuracy"])  # the first of equal ones
    results = json.loads((tmp_path / "lora" / "train_results.json").read_text(encoding="utf-8"))
    assert (results["best_step"], results["eval_accuracy"]) == (best["step"], best["eval_accuracy"])
    saved = json.loads((tmp_path / "lora" / "finetune_config.json").read_text())
    assert (saved["lora_dim"], saved["per_device_train_batch_size"], saved["warmup_ratio"]) == (8, 16, 0.1)
    answers = []
    for model in (tmp_path / "lora", tmp_path / "lora" / "merged"):
        done = faq("predict.sh", "--model_name_or_path", str(model), "--question", "发票怎么开")
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    assert answers[0]["intent"] == answers[1]["intent"]
    assert answers[0]["probability"] == pytest.approx(answers[1]["probability"], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["--model_name_or_path", "/no/model", "--question", "x"], "/no/model holds no model"),
        ([], "give either --input_file or --question"),
        (["--question", "x", "--constrain", "false", "--batch_size", "-1"], "--batch_size is -1, expected 0 or more"),
        (["--question", "x", "--max_new_tokens", "-5"], "--max_new_tokens is -5, expected 0 or more"),
        (["--question", "x", "--mode", "glm3"], "--mode glm3 is for model_type chatglm, the checkpoint is 'llama'"),
        (["--question", "x", "--mode", "vicuna"], "invalid choice: 'vicuna'"),
        (["--question", "x", "--intents_file", "/no/intents.json"], "/no/intents.json does not exist"),
        (["--question", "长" * 6000], "more than the model's 4096"),
        (["--input_file", "/no/file.jsonl"], "the data file /no/file.jsonl does not exist"),
        (["--question", "x", "--unconstrained_file", "a.jsonl"], "--unconstrained_file goes with --output_file"),
        (["--question", "x", "--unconstrained_file", "a", "--output_file", "./a"], "is the --output_file ./a; choose"),
    ],
)
def test_wrong_predictions_are_one_sentence(demo: Path, arguments: list[str], phrase: str) -> None:
    done = faq("predict.sh", "--mount_path", str(demo), *arguments)
    assert done.returncode == 2
    assert phrase in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_training_refuses_what_it_would_have_to_cut(demo: Path, tmp_path: Path) -> None:
    """A question without its whole candidate list means something else: no row of the faq scenario is cut."""
    common = ("--scenario", "faq", "--mount_path", str(demo), "--output_path", str(tmp_path / "out"))
    done = chat_main(*common, "--model_name_or_path", str(demo / "tiny-chat-model"), "--max_seq_len", "100")
    assert done.returncode == 2
    assert "train.jsonl:1: the prompt with its answer has" in done.stderr
    assert "the limit is 100" in done.stderr


def test_training_tells_where_raw_data_goes(demo: Path, tmp_path: Path) -> None:
    """In the FAQ scenario it is prepared on the way (tests/test_original.py); in the general one the way is told."""
    raw = tmp_path / "train.jsonl"
    raw.write_text('{"question": "怎么退款", "intent": "退款"}\n', encoding="utf-8")
    done = chat_main(
        "--scenario", "general", "--train_file", str(raw), "--model_name_or_path", str(demo / "tiny-chat-model"),
        "--output_path", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 2
    assert "are learned with SCENARIO=faq, or become such lines by faq/prepare.sh" in done.stderr


def test_variants_of_another_file_are_named(demo: Path, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "申请退款"}], "variant": 7}
    path = write_jsonl(tmp_path / "test.jsonl", [])
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    done = faq("predict.sh", "--mount_path", str(demo), "--input_file", str(path))
    assert done.returncode == 2
    assert "test.jsonl:1: variant 7 is not in the intents file" in done.stderr


def test_run_all_where_general_was_trained_before(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """Its errors name flags that it has: first the data's folder, then output_path; bad records come before both."""
    mount, data = tmp_path / "mnt", tmp_path / "faq.csv"
    conversation = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "Pong!"}]
    write_jsonl(mount / "datasets" / "train.jsonl", [conversation])
    (mount / "output_path").mkdir()
    (mount / "output_path" / "config.json").write_text("{}", encoding="utf-8")
    command = ("--mount_path", str(mount), "--data_file", str(data), "--model_name_or_path", str(checkpoints["llama"]))
    rows = [f"{intent}的问题{i},{intent}" for intent in ("退款", "物流", "发票", "地址") for i in range(3)]
    data.write_text("\n".join(["问题,类别", *rows, ",退款"]), encoding="utf-8")
    done = faq("run_all.sh", *command)
    assert "faq.csv:14: an empty question" in done.stderr
    assert "pass --skip_bad_lines true" in done.stderr
    done = faq("run_all.sh", *command, "--skip_bad_lines", "true")
    assert "holds train.jsonl that this command did not write" in done.stderr
    assert "(--output_dir, of run_all.sh --mount_path), or pass --overwrite true" in done.stderr
    done = faq("run_all.sh", *command, "--skip_bad_lines", "true", "--overwrite", "true")
    assert done.returncode == 2
    assert "output_path holds config.json, which no run of this toolkit wrote" in done.stderr
    assert done.stderr.endswith(
        "run_all.sh: flags of chat_main.sh follow --, as in faq/run_all.sh ... -- --overwrite_output_path true\n"
    )


def test_run_all_chooses_by_the_validation(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """Shown by giving training the same file to learn."""
    data, datasets = tmp_path / "faq.csv", tmp_path / "mnt" / "datasets"
    rows = [f"{intent}的问题{i},{intent}" for intent in ("退款", "物流", "发票", "地址") for i in range(5)]
    data.write_text("\n".join(["问题,类别", *rows]), encoding="utf-8")
    command = ("--mount_path", str(tmp_path / "mnt"), "--model_name_or_path", str(checkpoints["llama"]))
    command = (*command, "--data_file", str(data), "--validation_ratio", "0.2")
    done = faq("run_all.sh", *command, "--", "--train_file", str(datasets / "validation.jsonl"))
    assert done.returncode == 2
    assert "validation.jsonl is learned (--train_file) and tests what was learned (--test_file)" in done.stderr


def test_run_all_needs_data() -> None:
    done = faq("run_all.sh")
    assert done.returncode == 2
    assert "--data_file is missing" in done.stderr
