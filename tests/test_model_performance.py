"""eval/model_performance_evaluation as a user runs it: JSON, metrics, resume, several processes, wrong input."""

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
from conftest import ROOT, Messages, environment, write_jsonl
from test_thinking import QWEN3

from eval import metrics, model_performance_evaluation
from eval.engine import Engine, Settings, made
from eval.model_performance_evaluation import read_metrics, read_samples
from eval.options import read_options
from eval.thoughts import after_thought, in_thought
from llmops.console import UserError
from llmops.machine.sharing import Processes

SCRIPT = ROOT / "eval" / "model_performance_evaluation.py"
ALL = "Acc,F1,BLEU,Rouge"


@pytest.fixture
def data(tmp_path: Path, conversations: list[Messages]) -> Path:
    """16 conversations, some with two answers and some with a system message."""
    return write_jsonl(tmp_path / "data.jsonl", conversations[:16])


def call(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, the JSON, stderr) of a run in this process; stdout holds nothing but the JSON."""
    capfd.readouterr()
    code = model_performance_evaluation.main(arguments)
    captured = capfd.readouterr()
    return code, json.loads(captured.out), captured.err


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The per-sample file of a run."""
    path = folder / "samples" / "model_performance.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_samples_are_the_assistants_turns(data: Path, conversations: list[Messages]) -> None:
    samples = read_samples(data)
    answers = [m["content"] for c in conversations[:16] for m in c if m["role"] == "assistant"]
    assert [sample.references for sample in samples] == [(answer,) for answer in answers]
    for sample in samples:
        assert sample.messages[-1]["role"] == "user"
        assert any(sample.messages == c[: len(sample.messages)] for c in conversations)


def test_metrics_can_be_named_in_many_ways() -> None:
    assert read_metrics(["Acc,Rouge"]) == ("Acc", "Rouge")
    assert read_metrics(["rouge", "F1", "f1"]) == ("Rouge", "F1")
    assert read_metrics(['["BLEU", "Acc"]']) == ("BLEU", "Acc")
    assert read_metrics([]) == ("Rouge",)
    for wrong in (["Meteor"], [""], ["[1]"], ["[Acc"], ["[]"]):
        with pytest.raises(UserError, match="--evaluation_metrics"):
            read_metrics(wrong)


def test_the_command_as_written(checkpoints: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """As a subprocess from another directory: stdout is the documented JSON, everything else is on stderr."""
    output = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(SCRIPT.with_suffix(".sh")), "--model_name_or_path", str(checkpoints["llama"]), "--dataset_path",
         str(data), "--evaluation_metrics", "Rouge", "--max_seq_len", "512", "--per_device_batch_size", "10",
         "--gpu_id", "0", "--output_path", str(output), "--max_new_tokens", "8"],
        env=environment(), capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["code"] == 0
    assert found["msg"] == "Success"
    assert list(found["data"]) == ["evaluation_results"]
    assert list(found["data"]["evaluation_results"]) == ["Rouge"]
    report = json.loads((output / "eval_results.json").read_text(encoding="utf-8"))
    assert report["evaluation_results"] == found["data"]["evaluation_results"]
    assert report["counts"]["samples"] == len(read_samples(data))
    assert set(report["metrics"]["Rouge"]) == {"mean", "standard_error", "interval_95", "samples"}
    for row in rows_of(output):
        assert row["scores"]["Rouge"] == pytest.approx(
            metrics.rouge(row["prediction"], row["references"])["rougeL"], abs=1e-6
        )


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_batch_size_and_prefixes_change_nothing(checkpoints: dict[str, Path], data: Path, architecture: str) -> None:
    samples = read_samples(data)
    answers = []
    for size, reuse in [(1, True), (3, True), (8, True), (1, False), (3, False), (8, False)]:
        settings = Settings(str(checkpoints[architecture]), batch_size=size, reuse_prefix=reuse, gpu_id=-1)
        engine = Engine(settings, Processes())
        answers.append([answer.text for answer in engine.answer(engine.prepare("x", samples, 6))])
    assert all(found == answers[0] for found in answers[1:])


def test_thoughts_are_not_scored(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of answer and reference counts what follows the last thought; one that never leaves it is empty and said."""
    said = [
        "<think>\n\n</think>\n\n八点",
        "<think>\n先</think>想</think>\n\n九点",
        "<think>\n九点",
        "想\n</think>\n\n十点",
    ]
    golds = ["八点", "<think>\n要想\n</think>\n\n九点", "九点", "十点"]
    rows = [[{"role": "user", "content": f"几点{i}"}, {"role": "assistant", "content": g}] for i, g in enumerate(golds)]
    rows[0][1]["reasoning_content"] = "再想想"
    data = write_jsonl(tmp_path / "data.jsonl", rows)

    def thinking(_: Engine, requests: Any, samples: Any) -> Any:
        yield from ((i, made(said[i], [], True, 9)) for i in range(len(requests)))

    monkeypatch.setattr(Engine, "_compute", thinking)
    model = ("--model_name_or_path", str(checkpoints["llama"]), "--gpu_id", "-1", "--evaluation_metrics", ALL)
    code, found, errors = call(capfd, *model, "--dataset_path", str(data), "--output_path", str(tmp_path / "out"))
    assert code == 0, errors
    assert set(found["data"]["evaluation_results"].values()) == {0.75}
    assert "1 of 4 answers never left their thought (</think>) and count as empty" in errors
    assert [row["prediction"] for row in rows_of(tmp_path / "out")] == said
    assert [row["references"] for row in rows_of(tmp_path / "out")] == [["八点"], ["九点"], ["九点"], ["十点"]]
    predictions = tmp_path / "predictions.jsonl"
    lines = [json.dumps({"answer": a, "gold": g}) for a, g in zip(said, golds, strict=True)]
    predictions.write_text("\n".join(lines), encoding="utf-8")
    code, found, _ = call(capfd, "--dataset_path", str(predictions), "--evaluation_metrics", ALL)
    assert set(found["data"]["evaluation_results"].values()) == {0.75}
    only = write_jsonl(
        tmp_path / "only.jsonl", [[rows[0][0], {"role": "assistant", "content": "<think>\n想\n</think>"}]]
    )
    code, found, _ = call(capfd, *model, "--dataset_path", str(only))
    assert code == 2
    assert "only.jsonl:1: an answer is only a thought; take it out" in found["msg"]


@pytest.mark.parametrize(("setting", "recorded", "closed"), [
    ("auto", "", False), ("auto", "false", True), ("false", "", True), ("true", "false", False),
])  # fmt: skip
def test_the_template_is_told_whether_to_think(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], taught_data: Path, tmp_path: Path, setting: str,
    recorded: str, closed: bool,
) -> None:  # fmt: skip
    """enable_thinking of both commands; auto is what the run told it that trained the model."""
    model = tmp_path / "model"
    shutil.copytree(checkpoints["llama"], model)
    (model / "chat_template.jinja").write_text(QWEN3, encoding="utf-8")
    (model / "finetune_config.json").write_text(json.dumps({"enable_thinking": recorded}), encoding="utf-8")
    arguments = ("--model_name_or_path", str(model), "--dataset_path", str(taught_data), "--gpu_id", "-1")
    given = ("--limit", "2", "--max_new_tokens", "2", "--output_path", str(tmp_path), "--enable_thinking", setting)
    code, _, errors = call(capfd, *arguments, *given)
    assert code == 0, errors
    assert [row["prompt"].endswith("</think>\n\n") for row in rows_of(tmp_path)] == [closed] * 2
    options = read_options(json.dumps({"enable_thinking": {"true": True, "false": False}.get(setting, setting)}))
    assert options.enable_thinking == setting


def test_a_thought_that_the_prompt_opened() -> None:
    """DeepSeek-R1's prompt ends with `<think>`: an answer without `</think>` is all thought."""
    assert after_thought("想\n</think>\n\n八点", opened=True) == "八点"
    assert (after_thought("想八点", opened=True), after_thought("想八点")) == ("", "想八点")
    assert in_thought("想八点", opened=True)
    assert in_thought("<think>a</think><think>b")
    assert not in_thought("标签 <think> 是什么")


def test_a_model_that_knows_the_answers_scores_one(
    capfd: pytest.CaptureFixture[str], taught: Path, taught_data: Path, tmp_path: Path
) -> None:
    """The references of a data set that a model was taught; against shuffled references the score falls."""
    arguments = ("--model_name_or_path", str(taught), "--evaluation_metrics", ALL, "--gpu_id", "-1")
    code, found, _ = call(capfd, *arguments, "--dataset_path", str(taught_data))
    assert code == 0
    assert list(found["data"]["evaluation_results"]) == ALL.split(",")
    assert min(found["data"]["evaluation_results"].values()) > 0.95
    lines = [json.loads(line)["messages"] for line in taught_data.read_text(encoding="utf-8").splitlines()]
    rolled = [[q, other[1]] for [q, _], other in zip(lines, lines[1:] + lines[:1], strict=True)]
    shuffled = write_jsonl(tmp_path / "shuffled.jsonl", rolled)
    code, found, _ = call(capfd, *arguments, "--dataset_path", str(shuffled))
    assert found["data"]["evaluation_results"]["Acc"] == 0
    assert max(found["data"]["evaluation_results"].values()) < 0.5


def test_killed_and_started_again(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """What was answered before SIGKILL is not answered again, and the result is the undisturbed run's."""
    model = ("--model_name_or_path", str(checkpoints["llama"]), "--dataset_path", str(data), "--gpu_id", "-1")
    arguments = (*model, "--evaluation_metrics", ALL, "--per_device_batch_size", "1", "--max_new_tokens", "24")
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--output_path", str(folder)], env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    part = folder / "samples" / "model_performance.process0.jsonl"
    deadline = time.monotonic() + 90
    while (not part.is_file() or part.read_bytes().count(b"\n") < 3) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.communicate()[0] == b""
    kept = [json.loads(line)["key"] for line in part.read_bytes().split(b"\n")[:-1]]
    with open(part, "ab") as file:
        file.write(b'{"key": "half a li')
    code, again, errors = call(capfd, *arguments, "--output_path", str(folder))
    assert code == 0
    total = len(read_samples(data))
    assert 3 <= len(kept) < total
    assert f"{len(kept)} of {total} answers are in" in errors
    code, straight, _ = call(capfd, *arguments, "--output_path", str(tmp_path / "straight"))
    assert again == straight
    assert rows_of(folder) == rows_of(tmp_path / "straight")
    assert len({row["key"] for row in rows_of(folder)}) <= total
    assert not list((folder / "samples").glob("*.process*"))
    # another model's answers are not taken for this one's
    other = tmp_path / "other"
    shutil.copytree(checkpoints["qwen2"], other)
    _, _, errors = call(
        capfd, *arguments[2:], "--model_name_or_path", str(other), "--output_path", str(folder), "--limit", "2"
    )
    assert "already" not in errors


def test_a_run_with_a_limit_loses_no_answers(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """What a full run answered is there after a small one into its folder; another model's answers go."""
    folder, other = tmp_path / "out", tmp_path / "other"
    arguments = ("--dataset_path", str(data), "--gpu_id", "-1", "--max_new_tokens", "3", "--output_path", str(folder))
    model = ("--model_name_or_path", str(checkpoints["llama"]))
    total = len(read_samples(data))
    code, full, _ = call(capfd, *arguments, *model)
    assert code == 0
    rows = rows_of(folder)
    for limit in ("2", "3"):
        call(capfd, *arguments, *model, "--limit", limit)
        assert len(rows_of(folder)) == int(limit)
    code, again, errors = call(capfd, *arguments, *model)
    assert (code, again) == (0, full)
    assert f"{total} of {total} answers are in" in errors
    assert rows_of(folder) == rows
    assert os.listdir(folder / "samples") == ["model_performance.jsonl"]
    shutil.copytree(checkpoints["qwen2"], other)
    call(capfd, *arguments, "--model_name_or_path", str(other), "--limit", "2")
    assert os.listdir(folder / "samples") == ["model_performance.jsonl"]


def test_several_processes_share_the_samples(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """Two processes, as the launcher starts them: one JSON, all samples, the same answers as one process."""
    arguments = (
        "--model_name_or_path", str(checkpoints["llama"]), "--dataset_path", str(data), "--evaluation_metrics", ALL,
        "--max_new_tokens", "4",
    )  # fmt: skip
    done = subprocess.run(
        ["bash", str(SCRIPT.with_suffix(".sh")), *arguments, "--output_path", str(tmp_path / "two")],
        env=environment() | {"NUM_PROCESSES": "2", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    _, alone, _ = call(capfd, *arguments, "--output_path", str(tmp_path / "one"))
    assert json.loads(done.stdout) == alone
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one")
    report = json.loads((tmp_path / "two" / "eval_results.json").read_text(encoding="utf-8"))
    assert report["processes"] == 2
    assert report["counts"]["samples"] == len(read_samples(data))


def test_long_prompts_are_cut_and_counted(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "前面的问题"}, {"role": "assistant", "content": "前面的回答"}]
    long = write_jsonl(tmp_path / "long.jsonl", [[*turns, {"role": "user", "content": "很长" * 200}, turns[1]]])
    arguments = ("--model_name_or_path", str(checkpoints["llama"]), "--dataset_path", str(long), "--gpu_id", "-1")
    folder = str(tmp_path / "out")
    code, _, errors = call(capfd, *arguments, "--max_seq_len", "64", "--max_new_tokens", "5", "--output_path", folder)
    assert code == 0
    assert "1 of 2 prompts were longer" in errors
    first, second = rows_of(Path(folder))
    assert not first["prompt_cut"]
    assert second["prompt_cut"]
    assert "前面" not in second["prompt"]
    code, found, _ = call(capfd, *arguments, "--max_seq_len", "9", "--max_new_tokens", "5")
    assert (code, found["code"]) == (2, 2)
    assert "max_seq_len 9 is too small" in found["msg"]


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["--model_name_or_path", "/no/model"], "/no/model holds no model"),
        (["--evaluation_metrics", "Meteor"], "found 'Meteor', expected some of Acc, F1, BLEU, Rouge"),
        (["--gpu_id", "99"], "gpu_id 99 does not exist"),
        (["--gpu_id", "first"], "invalid int value: 'first'"),
        (["--max_seq_len", "0"], "max_seq_len is 0"),
        (["--dataset_path", "/no/data.jsonl"], "the data set /no/data.jsonl does not exist"),
        (["--dataset_path", "BROKEN"], "broken.jsonl:2: broken JSON"),
        (["--dataset_path", "NO_ANSWER"], "expected the assistant's answer"),
        (["--dataset_path", "EMPTY"], "has no assistant turn"),
        (["--output_path", "FILE/below"], "cannot be written (Not a directory)"),
        (["--limit", "-1"], "--limit is -1"),
        (["--adapter", "/no/adapter"], "/no/adapter holds no adapter"),
        (["--nonsense", "1"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_input_is_one_sentence(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], data: Path, tmp_path: Path, arguments: list[str],
    phrase: str,
) -> None:  # fmt: skip
    line = data.read_text(encoding="utf-8").splitlines()[0]
    files = {
        "BROKEN": tmp_path / "broken.jsonl", "NO_ANSWER": tmp_path / "question.jsonl", "EMPTY": tmp_path / "empty.jsonl"
    }  # fmt: skip
    files["BROKEN"].write_text(line + "\n" + line[:30] + "\n", encoding="utf-8")
    files["NO_ANSWER"].write_text('{"messages": [{"role": "user", "content": "?"}]}\n', encoding="utf-8")
    files["EMPTY"].write_text("\n", encoding="utf-8")
    (tmp_path / "file").write_text("")
    arguments = [str(files.get(a, a)).replace("FILE", str(tmp_path / "file")) for a in arguments]
    given = ["--model_name_or_path", str(checkpoints["llama"]), "--dataset_path", str(data), *arguments]
    code, found, errors = call(capfd, *given)
    assert code == 2
    assert found == {"code": 2, "msg": found["msg"], "data": {"evaluation_results": {}}}
    assert phrase in found["msg"]
    assert f"error: {found['msg']}" in errors
    assert "Traceback" not in errors


def test_help_is_quick() -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], env=os.environ, capture_output=True, text=True, check=True
    )
    assert time.monotonic() - started < 1
    assert "--evaluation_metrics" in done.stdout


def test_what_a_reader_must_know(
    capfd: pytest.CaptureFixture[str], taught: Path, taught_data: Path, tmp_path: Path
) -> None:
    """A fixed limit of tokens whatever the references, answers that run into it counted, scores by language."""
    arguments = ("--model_name_or_path", str(taught), "--evaluation_metrics", ALL, "--gpu_id", "-1")
    code, found, errors = call(capfd, *arguments, "--dataset_path", str(taught_data), "--output_path", str(tmp_path))
    assert code == 0
    assert list(found["data"]["evaluation_results"]) == ALL.split(",")
    report = json.loads((tmp_path / "eval_results.json").read_text(encoding="utf-8"))
    assert report["max_new_tokens"] == 256
    assert report["counts"]["answers_at_the_limit"] == 0
    languages = report["by_language"]
    rows = rows_of(tmp_path)
    assert {name: part["samples"] for name, part in languages.items()} == {"zh": 4, "other": 4}
    for name, part in languages.items():
        own = [row["scores"] for row in rows if metrics.language(row["references"][0]) == name]
        for metric in ALL.split(","):
            assert part[metric] == pytest.approx(sum(scores[metric] for scores in own) / len(own), abs=1e-4)
    assert "zh: samples 4, Acc " in errors
    _, _, errors = call(capfd, *arguments, "--dataset_path", str(taught_data), "--max_new_tokens", "1")
    assert " of 8 answers ran into the limit of tokens (--max_new_tokens)" in errors
    code, found, _ = call(capfd, *arguments, "--dataset_path", str(taught_data), "--max_new_tokens", "0")
    assert (code, found["msg"]) == (2, "--max_new_tokens is 0; expected 1 or more")
    code, found, _ = call(capfd, *arguments, "--dataset_path", str(taught_data), "--seed", "-1")
    assert (code, found["msg"]) == (2, "--seed is -1; expected 0 or more")


def test_a_signal_says_how_far_it_was(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The documented JSON with the signal's code, and the answers on disk."""
    questions = [[{"role": "user", "content": f"{i} + {i}"}, {"role": "assistant", "content": "?"}] for i in range(500)]
    data = write_jsonl(tmp_path / "many.jsonl", questions)  # seconds of work, however late this process gets its turn
    arguments = ("--model_name_or_path", str(checkpoints["llama"]), "--dataset_path", str(data), "--gpu_id", "-1")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--per_device_batch_size", "1", "--output_path", str(tmp_path)],
        env=environment() | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    part = tmp_path / "samples" / "model_performance.process0.jsonl"
    deadline = time.monotonic() + 90
    while (not part.is_file() or part.read_bytes().count(b"\n") < 2) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    output = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == output["code"] == 130
    total = len({json.dumps(sample.messages) for sample in read_samples(data)})
    kept = part.read_bytes().count(b"\n")
    assert output["msg"].startswith(f"ended by Ctrl-C: {kept} of {total} answers are in {tmp_path / 'samples'}")
    assert output["data"] == {"evaluation_results": {}}
