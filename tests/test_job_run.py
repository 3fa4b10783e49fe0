"""Whole jobs as the platform starts them: real trainings and evaluations, ended, killed, started again, told."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, ROOT, environment, read_log, read_messages, write_jsonl
from embedding_model import write_embedding_model
from job_platform import AUTH, PlatformServer, platform_server, read_progress, settled_port, wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from job.progress import without_brackets
from job.state import alone
from llmops.models.checkpoints import run_settings

RUN = ("bash", str(ROOT / "job" / "run.sh"))


class Started:
    """A job's container: a command with an environment, its output as the platform collects it, mixed."""

    def __init__(self, command: tuple[str, ...], **variables: str) -> None:
        self.process = subprocess.Popen(
            command, env=environment() | variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        assert self.process.stdout
        self.reader = threading.Thread(target=self.lines.extend, args=(self.process.stdout,), daemon=True)
        self.reader.start()

    @property
    def output(self) -> str:
        """What it has written."""
        return "".join(list(self.lines))

    def end(self, timeout: float = 240) -> int:
        """Wait for its end; the exit code."""
        code = self.process.wait(timeout)
        self.reader.join(30)
        return code


@pytest.fixture
def server() -> Iterator[PlatformServer]:
    """A platform with one running job."""
    with platform_server() as platform:
        yield platform


def hub(home: Path, name: str, model: Path) -> str:
    """Put a model's folder into a Hugging Face home under a hub id; the id."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "snapshots").mkdir(parents=True)
    (folder / "snapshots" / "rev").symlink_to(model)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("rev")
    return name


def check_whole(output: Path) -> None:
    """OUTPUT_DIR is the merged model, in words that servers of today and of 2024 read, and knows its run."""
    assert not (output / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(output / "run" / "merged", dtype=torch.float32)
    assert all(torch.equal(one, merged.state_dict()[name]) for name, one in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(output).chat_template
    config = json.loads((output / "config.json").read_text())
    assert {"rope_theta", "torch_dtype"} <= config.keys()  # a server of 2024 reads these
    assert "TokenizersBackend" not in (output / "tokenizer_config.json").read_text()
    assert run_settings(output) == output / "run" / "finetune_config.json"


def test_a_training_of_the_platform(
    server: PlatformServer, checkpoints: dict[str, Path], conversations: list[Any], tmp_path: Path
) -> None:
    """Cancelled, killed, started again: the platform hears of the end once, and OUTPUT_DIR is a whole model."""
    output = tmp_path / "ft-model" / "ft-qwen-1"
    train = write_jsonl(tmp_path / "train.jsonl", conversations[:24])
    test = write_jsonl(tmp_path / "test.jsonl", read_messages(DEMO / "test.jsonl")[:6])
    server.stored = {"/storage/train.jsonl": train.read_bytes(), "/storage/eval.jsonl": test.read_bytes()}
    train.unlink()
    test.unlink()
    given = server.environment(
        SCENARIO="general", BASE_MODEL_PATH=hub(tmp_path / "hf", "org/tiny", checkpoints["llama"]),
        BASE_MODEL_NAME="tiny", TRAIN_FILE=f"{server.url}/storage/train.jsonl?sig=0123456789",
        EVAL_FILE=f"{server.url}/storage/eval.jsonl", OUTPUT_DIR=str(output), USE_LORA="true", GPUS_PER_NODE="0",
        MODEL_MAX_LENGTH="256", NUM_TRAIN_EPOCHS="4", PER_DEVICE_TRAIN_BATCH_SIZE="2", PER_DEVICE_EVAL_BATCH_SIZE="3",
        GRADIENT_ACCUMULATION_STEPS="1", LEARNING_RATE="2e-3", MASTER_PORT=str(settled_port()),
        HF_HOME=str(tmp_path / "hf"), EVAL_STEPS="4", GRADIENT_CHECKPOINTING="false",
    )  # fmt: skip

    cancelled = Started(RUN, **given)
    wait_for(lambda: read_progress(cancelled.output))  # one line: it must not be done when the signal comes
    cancelled.process.send_signal(signal.SIGTERM)
    assert cancelled.end() == 143, cancelled.output[-3000:]
    assert server.ends == []
    assert list((output / "run").glob("checkpoint-*"))

    killed = Started(RUN, **given)
    wait_for(lambda: "continuing from" in killed.output)
    killed.process.kill()
    killed.process.wait()

    last = Started(RUN, **given)  # waits for what the kill left at work, and goes on
    assert last.end() == 0, last.output[-3000:]
    (call,) = server.ends
    results = json.loads((output / "run" / "train_results.json").read_text())
    assert call.body == {"status": "success", "data": results}
    assert server.state == "success"

    seen = read_progress(last.output)
    assert len(seen) > 10
    assert (seen[-1]["epoch"], seen[-1]["step"]) == (4.0, 48)
    assert all(entry["loss"] > 0 and entry["eval_loss"] > 0 for entry in seen)
    assert seen[-1]["eval_loss"] == [line["eval_loss"] for line in read_log(output / "run") if "eval_loss" in line][-1]
    secrets = (AUTH, AUTH.split()[1], "0123456789")
    assert not [text for text in secrets for job in (cancelled, killed, last) if text in job.output]
    kept = [path for path in output.rglob("*") if path.is_file() and path.suffix in ("", ".json", ".txt", ".jsonl")]
    assert not [path for path in kept for text in secrets if text.encode() in path.read_bytes()]

    settings = json.loads((output / "run" / "finetune_config.json").read_text())
    expected = {
        "scenario": "general", "train_type": "lora", "zero_stage": "2", "max_seq_len": 256, "num_train_epochs": 4.0,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "gradient_accumulation_steps": 1,
        "learning_rate": 2e-3, "merge_lora": True, "mode": "auto", "tensorboard": False,
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    assert settings["test_file"].startswith(str(output / "job" / "data" / "eval_file-"))

    check_whole(output)
    again = Started(RUN, **given)
    assert again.end() == 0
    assert "the platform knows: nothing to do" in again.output
    assert len(server.ends) == 1


def test_every_weight_of_an_faq_model(server: PlatformServer, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Raw FAQ records, as the platform exports them; no evaluation file; the platform removes the job by itself."""
    questions = [("怎么改密码", "改密码"), ("密码忘了", "改密码"), ("包裹到哪了", "查快递"), ("快递呢", "查快递")]
    rows = [{"instruction": "判断意图", "question": f"{q}{i}", "intent": a, "output": "-"}
            for q, a in questions for i in range(4)]  # fmt: skip
    data = tmp_path / "faq.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    given = server.environment(
        SCENARIO="faq", BASE_MODEL_PATH=str(checkpoints["qwen2"]), TRAIN_FILE=str(data), EVAL_FILE="",
        OUTPUT_DIR=str(tmp_path / "out"), USE_LORA="false", GPUS_PER_NODE="0", MODEL_MAX_LENGTH="512",
        NUM_TRAIN_EPOCHS="1", PER_DEVICE_TRAIN_BATCH_SIZE="8", LEARNING_RATE="1e-3",
    )  # fmt: skip
    server.faults = [503, "refuse"]
    job = Started(RUN, **given)
    server.taken = lambda: job.process.send_signal(signal.SIGTERM)
    assert job.end() == 0, job.output[-3000:]
    assert [call.answer for call in server.ends][:2] == ["503", "refuse"]
    assert server.state == "success"
    settings = json.loads((tmp_path / "out" / "run" / "finetune_config.json").read_text())
    assert (settings["scenario"], settings["train_type"], settings["zero_stage"]) == ("faq", "all", "3")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "intents.json", "tokenizer.json", "run", "job"} <= names
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(read_progress(job.output)) > 1


def test_a_training_that_fails(server: PlatformServer, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The platform hears the end of the messages, 3,000 characters at most, and then the exit code is 0."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(f'{{"messages": [{{"role": "wrong-{i}"}}]}}\n' for i in range(400)))
    given = server.environment(TRAIN_FILE=str(data), BASE_MODEL_PATH=str(checkpoints["llama"]), GPUS_PER_NODE="0",
                               OUTPUT_DIR=str(tmp_path / "out"))  # fmt: skip
    job = Started(RUN, **given)
    assert job.end() == 0
    assert server.state == "failed"
    message = server.ends[0].body["message"]
    assert len(message) == 3000
    assert "message 1 is no object with 'role' and 'content'" in message
    assert without_brackets(message) in job.output
    assert read_progress(job.output) == []
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_evaluation_of_the_platform(server: PlatformServer, taught: Path, taught_data: Path, tmp_path: Path) -> None:
    """It starts eval/*.sh itself."""
    server.stored["/storage/test.jsonl"] = taught_data.read_bytes()
    given = server.environment(
        MODEL_PATH=str(taught), DATASET_PATH=f"{server.url}/storage/test.jsonl", EVALUATION_METRICS="Acc",
        MAX_SEQ_LEN="24", PER_DEVICE_BATCH_SIZE="4", MOUNT_PATH=str(tmp_path),
    )  # fmt: skip
    job = Started(("bash", str(ROOT / "eval" / "model_performance_evaluation.sh")), **given)
    assert job.end() == 0, job.output[-3000:]
    data = server.result
    assert set(data) == {"config", "overall_evaluation_metrics", "detailed_results"}
    assert data["config"] == {
        "model_name_or_path": str(taught), "dataset_path": f"{server.url}/storage/test.jsonl",
        "evaluation_metrics": ["Acc"], "max_seq_len": 24, "per_device_batch_size": 4, "gpu_nums": 0,
    }  # fmt: skip
    assert 0 < data["overall_evaluation_metrics"]["Acc"] <= 1
    rows = data["detailed_results"]
    assert len(rows) == 8
    assert set(rows[0]) == {"question", "reference", "model_output", "Acc"}
    assert sum(row["Acc"] for row in rows) / 8 == pytest.approx(data["overall_evaluation_metrics"]["Acc"], abs=1e-3)


def test_the_five_dimensions_of_the_platform(server: PlatformServer, taught: Path, tmp_path: Path) -> None:
    given = server.environment(MODEL_PATH=str(taught), DATASET_PATH="", EVALUATION_METRICS="five", MAX_SEQ_LEN="512",
                               PER_DEVICE_BATCH_SIZE="16", GPUS_PER_NODE="0", MOUNT_PATH=str(tmp_path))  # fmt: skip
    job = Started(("bash", str(ROOT / "eval" / "evaluate_model_from_five_dimensions.sh")), **given)
    assert job.end() == 0, job.output[-3000:]
    assert set(server.result) == {"inference_ability", "reading_comprehension", "chinese_language_skill",
                                  "command_compliance", "innovation_capacity"}  # fmt: skip
    assert all(isinstance(score, float) and 0 <= score <= 1 for score in server.result.values())


def test_similar_questions_of_the_platform(server: PlatformServer, tmp_path: Path) -> None:
    """The embedding model is a hub id of the cache; the data an address."""
    model = write_embedding_model(tmp_path / "embedding", "mean")
    rows = [("今天天气怎么样", "天气"), ("今天天气怎么样啊", "出行"), ("我要退货", "退货"), ("怎么开发票", "发票")]
    server.stored["/storage/q.jsonl"] = "".join(
        json.dumps({"instruction": "判断", "question": q, "intent": i, "output": "-"}, ensure_ascii=False) + "\n"
        for q, i in rows
    ).encode()
    given = server.environment(
        DATASET_ANALYZE_MODEL=hub(tmp_path / "hf", "uer/sbert", model), DATASET_TYPE="faq", JOB_ID="",
        DATA_TASK_JOB_ID="task-1", DATASET_PATH=f"{server.url}/storage/q.jsonl", HF_HOME=str(tmp_path / "hf"),
        MOUNT_PATH=str(tmp_path / "mnt"), CACHE_DIR=str(tmp_path / "vectors"),
    )  # fmt: skip
    job = Started(("bash", str(ROOT / "eval" / "analyze_similar_questions_and_intents.sh")), **given)
    assert job.end() == 0, job.output[-3000:]
    assert set(server.result) == {"mismatchedIntents", "similarIntents"}
    for row in server.result["mismatchedIntents"]:
        assert {"questionPair", "intent1", "intent2", "answer1", "answer2", "lineNumbers"} == set(row)
    assert (tmp_path / "mnt" / "jobs" / "task-1").is_dir()


ADDRESS = "expected one such as https://example.org/jobs/1 in printable ASCII"


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("GPUS_PER_NODE", "all", "GPUS_PER_NODE is 'all', expected a whole number from 0 to 1024"),
        ("JOB_ID", "a b", "JOB_ID is 'a b', expected letters, digits, dots, dashes, underscores"),
        ("NOTIFY_URL", "hook", f"NOTIFY_URL is no address; {ADDRESS}"),
    ],
)
def test_wrong_settings_are_told_as_well(
    server: PlatformServer, tmp_path: Path, name: str, value: str, sentence: str
) -> None:
    given = server.environment(MOUNT_PATH=str(tmp_path)) | {name: value}
    job = Started(RUN, **given)
    assert job.end() == 0
    assert (server.state, server.message) == ("failed", sentence)
    assert f"error: {sentence}" in job.output


@pytest.mark.parametrize(("work_dir", "phrase"), [("file/x", "cannot be made"), ("full", "")])
def test_a_disk_that_takes_nothing_is_told(server: PlatformServer, tmp_path: Path, work_dir: str, phrase: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full" / "told.json").mkdir(parents=True)  # it can be read and written as little
    given = server.environment(MODEL_PATH=str(tmp_path), DATASET_PATH="gone", EVALUATION_METRICS="Acc",
                               WORK_DIR=str(tmp_path / work_dir))  # fmt: skip
    job = Started(RUN, **given)
    assert job.end() == 0, job.output
    assert server.state == "failed"
    assert phrase in server.message
    assert "Traceback" not in job.output


def test_a_start_that_waits_can_be_ended(tmp_path: Path) -> None:
    """Another start is at work, which will tell the end; nobody is told by this one."""
    with alone(tmp_path / "jobs" / "evaluate", threading.Event(), print):
        job = Started(RUN, MODEL_PATH=str(tmp_path), EVALUATION_METRICS="Acc", MOUNT_PATH=str(tmp_path))
        wait_for(lambda: "an earlier start of this job is still at work" in job.output)
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 143


ASKED = """
import os, sys
from job import run as program
from job.tasks import Work
surroundings = dict(os.environ)
program.Job.prepare = lambda self: Work(["bash", "-c", sys.argv[1]], surroundings, None, lambda printed: (None, None))
sys.exit(program.main([]))
"""


@pytest.mark.parametrize(
    ("number", "end", "code", "state"),
    [
        (signal.SIGTERM, "exit 143", 143, "stopped"),
        (signal.SIGHUP, "exit 143", 129, "stopped"),
        (signal.SIGTERM, "echo the disk is full >&2; exit 1", 1, "failed"),
        (signal.SIGHUP, "echo the disk is full >&2; exit 1", 1, "failed"),
    ],
)
def test_asked_to_end_it_tells_how_that_went(
    server: PlatformServer, tmp_path: Path, number: signal.Signals, end: str, code: int, state: str
) -> None:
    """143 promises a checkpoint to go on from; the platform, which may have asked for the end, hears nothing."""
    work = f"trap '{end}' TERM; echo at work >&2; while :; do sleep 0.05; done"
    given = server.environment(MOUNT_PATH=str(tmp_path), NOTIFY_URL=f"{server.url}/hook", PYTHONPATH=str(ROOT))
    job = Started((sys.executable, "-c", ASKED, work), **given)
    wait_for(lambda: "at work" in job.output)
    job.process.send_signal(number)
    assert job.end() == code, job.output
    assert [hook["state"] for hook in server.hooks] == ["started", state]
    assert ("the disk is full" in server.hooks[1]["message"]) == (state == "failed")
    assert (server.ends, server.state) == ([], "running")
    assert "nothing is told to the platform" in job.output


def test_a_hangup_that_nohup_ignores_ends_no_job(tmp_path: Path) -> None:
    work = "echo at work >&2; until [ -e go ]; do sleep 0.05; done"
    command = ("nohup", sys.executable, "-c", ASKED, f"cd {tmp_path}; {work}")
    job = Started(command, MOUNT_PATH=str(tmp_path), PYTHONPATH=str(ROOT))
    wait_for(lambda: "at work" in job.output)
    job.process.send_signal(signal.SIGHUP)
    (tmp_path / "go").touch()
    assert job.end() == 0, job.output
    assert '"state": "succeeded"' in job.output


def test_a_platform_that_refuses_makes_the_exit_code(server: PlatformServer, tmp_path: Path) -> None:
    """The work is done and nobody knows: that must not look like a good end."""
    data = tmp_path / "answers.jsonl"
    data.write_text('{"answer": "a", "gold": "a"}\n')
    server.faults = [404]
    job = Started(RUN, **server.environment(MODEL_PATH=str(tmp_path), DATASET_PATH=str(data), EVALUATION_METRICS="Acc",
                                            MOUNT_PATH=str(tmp_path)))  # fmt: skip
    assert job.end() == 1
    assert "does not take the end of the job: HTTP 404" in job.output
    assert server.state == "running"


def test_a_job_of_anybody_else(server: PlatformServer, tmp_path: Path) -> None:
    """Without the platform: one JSON object on stdout, the exit code of the work, a webhook."""
    data = tmp_path / "answers.jsonl"
    data.write_text('{"answer": "a", "gold": "a"}\n{"answer": "a", "gold": "b"}\n')
    given = environment() | {"MODEL_PATH": str(tmp_path), "NOTIFY_TOKEN": "hook-token-1", "SLURM_JOB_ID": "4711"}
    given |= {"NOTIFY_URL": f"{server.url}/hook?key=0123456789", "MOUNT_PATH": str(tmp_path / "mnt")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*RUN, *arguments], env=given, capture_output=True, text=True, check=False, timeout=60)

    done = run("--dataset_path", str(data), "--evaluation_metrics", "Acc", "--", "--limit", "0")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["job"], told["task"], told["state"], told["data"]) == ("4711", "evaluate", "succeeded", {"Acc": 0.5})
    assert [hook["state"] for hook in server.hooks] == ["started", "succeeded"]
    assert server.hooks[1] | {"time": 0} == told | {"time": 0}
    failed = run("--dataset_path", str(tmp_path / "gone.jsonl"), "--evaluation_metrics", "Acc")
    assert failed.returncode == 2
    told = json.loads(failed.stdout)
    assert (told["state"], told["exit_code"]) == ("failed", 2)
    assert server.hooks[3]["message"] == told["message"]
    assert not [text for text in ("hook-token-1", "0123456789") if text in done.stderr + failed.stderr + failed.stdout]
    wrong = run("--lora_dim", "8")
    assert wrong.returncode == 2
    assert "unrecognized arguments: --lora_dim 8" in wrong.stderr
    assert json.loads(wrong.stdout)["state"] == "failed"


def test_a_fault_of_ours_is_told_and_shown(
    server: PlatformServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from job import run as program

    def broken(self: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(program.Job, "work", broken)
    for name, value in server.environment(MOUNT_PATH=str(tmp_path)).items():
        monkeypatch.setenv(name, value)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        with pytest.raises(ZeroDivisionError):
            program.main([])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (server.state, server.message) == ("failed", "ZeroDivisionError: division by zero")
    assert os.environ["AUTH"] not in capfd.readouterr().err
