"""eval/diagnosis_monitoring as a user runs it: JSON, criteria against numbers by hand, errors, picture, watching."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment

from eval import diagnosis_monitoring
from eval.diagnosis.criteria import Thresholds
from eval.diagnosis.judge import Diagnosis, judge
from eval.diagnosis.log_lines import Reading
from eval.diagnosis.training_run import TrainingRun

SCRIPT = ROOT / "eval" / "diagnosis_monitoring.py"
LOGS = ROOT / "tests" / "logs"
STOP_TRAINING = "建议停止训练，降低学习率，增大dropout，增大数据量，降低训练周期数，并重新训练。"
GO_BACK = "建议回退到上个版本并调整参数。"


def call(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, the JSON, stderr) of a run in this process; stdout holds nothing but the JSON."""
    capfd.readouterr()
    code = diagnosis_monitoring.main(arguments)
    captured = capfd.readouterr()
    assert captured.out.count("\n") == 1
    return code, json.loads(captured.out), captured.err


def write_log(
    path: Path, train: Sequence[float], evaluation: Sequence[float] = (), retention: Sequence[float] = (),
    every: int = 10, rate: float = 1e-4,
) -> Path:  # fmt: skip
    """A log.txt: a training loss per step, and an evaluation before the first one and after every `every` steps."""
    lines = []
    for step, loss in enumerate([None, *train]):
        place = {"step": step, "epoch": step / 100}
        if loss is not None:
            lines.append(place | {"loss": loss, "learning_rate": rate})
        if step % every == 0:
            values = {"eval_loss": evaluation, "retention_loss": retention}
            told = {name: v[step // every] for name, v in values.items() if step // every < len(v)}
            lines += [place | told] if told else []
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def falling(count: int, start: float, end: float, speed: float = 12) -> list[float]:
    """An exponential descent that is over long before its end."""
    return [end + (start - end) * math.exp(-speed * i / count) for i in range(count)]


def judged(*readings: Reading, **limits: float) -> Diagnosis:
    """The diagnosis of readings."""
    run = TrainingRun()
    for reading in readings:
        run.add(reading)
    return judge(run, Thresholds(**limits))


def levels(answer: dict[str, Any]) -> list[str]:
    """The three levels in their order."""
    risks = answer["data"]["current_risks"]
    assert list(risks) == ["overfitting", "underfitting", "catastrophic_forgetting"]
    return list(risks.values())


# --- the command -----------------------------------------------------------------------------------------------------
def test_the_command_as_written(tmp_path: Path) -> None:
    log = write_log(
        tmp_path / "log.txt", falling(60, 3, 0.1), [3, 1.5, 1.2, 1.3, 1.5, 1.6, 1.8], [1, 1, 1.2, 1.4, 1.6, 1.7, 1.8]
    )
    expected = {
        "code": 0, "msg": "Monitoring Report",
        "data": {
            "current_risks": {"overfitting": "High", "underfitting": "Low", "catastrophic_forgetting": "High"},
            "recommendations": {"overfitting": STOP_TRAINING, "underfitting": "-", "catastrophic_forgetting": GO_BACK},
        },
    }  # fmt: skip
    for command in ([sys.executable, str(SCRIPT)], ["bash", str(SCRIPT.with_suffix(".sh"))]):
        done = subprocess.run(
            [*command, str(log)], env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stdout == json.dumps(expected, ensure_ascii=False) + "\n"
        assert done.stderr == ""


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from eval import diagnosis_monitoring; "
        "code = diagnosis_monitoring.main([sys.argv[2]]); "
        "heavy = ('numpy', 'torch', 'transformers', 'matplotlib', 'tqdm'); "
        "sys.exit(code or any(name in sys.modules for name in heavy))"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(LOGS / "ours.txt")], capture_output=True, check=True, cwd="/"
    )


def test_folder_stdin_and_settings_of_the_script(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path / "log.txt", falling(60, 3, 0.1), [3, 1.5, 1.2, 1.3, 1.5, 1.6, 1.8])
    _, plain, _ = call(capfd, str(log))
    code, answer, err = call(capfd, str(tmp_path))
    assert (code, answer) == (0, plain)
    assert f"reading {log}" in err
    nested = tmp_path / "run"
    (nested / "checkpoint-30").mkdir(parents=True)
    (nested / "checkpoint-30" / "trainer_state.json").write_bytes((LOGS / "trainer_state.json").read_bytes())
    assert "checkpoint-30/trainer_state.json" in call(capfd, str(nested))[2]
    script = ["bash", str(SCRIPT.with_suffix(".sh"))]
    with log.open() as stream:
        piped = subprocess.run(
            [*script, "-"], stdin=stream, env=environment(), capture_output=True, text=True, check=True
        )
    assert json.loads(piped.stdout) == plain
    env = environment() | {"MOUNT_PATH": str(tmp_path), "LOG_PATH": str(log), "GL_HIGH": "500", "EXPLAIN": "true"}
    done = subprocess.run(
        [*script, "--gl_medium=400", "--gl_slight=400"], env=env, capture_output=True, text=True, check=True
    )
    assert levels(json.loads(done.stdout))[0] == "Low"
    assert "gl_medium 400, gl_high 500" in done.stderr
    done = subprocess.run(
        [*script, "--explain", "--log_path", str(log)], env=environment(), capture_output=True, text=True, check=True
    )
    assert "overfitting: High" in done.stderr


def test_explain_tells_the_numbers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = write_log(
        tmp_path / "log.txt", falling(60, 3, 0.1), [3, 1.5, 1.2, 1.3, 1.5, 1.6, 1.8], [1, 1, 1.2, 1.4, 1.6, 1.7, 1.8]
    )
    code, answer, err = call(capfd, str(log), "--explain")
    assert (code, levels(answer)) == (0, ["High", "Low", "High"])
    for text in (
        "60 training losses, 7 evaluation losses, 7 retention losses",
        "1.2 at 20",
        "gl_high 10",
        "1.80 times",
    ):
        assert text in err
    assert "at step" in err
    assert call(capfd, "--explain", str(log))[2] == err  # the switch may stand before the path
    assert call(capfd, str(log), "--explain", "false")[2] == ""


def test_picture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path / "log.txt", falling(60, 3, 0.1), [3, 1.5, 1.2, 1.3, 1.5, 1.6, 1.8])
    picture = tmp_path / "risks.png"
    assert call(capfd, str(log), "--plot", str(picture))[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["nowhere/log.txt"], 2, "nowhere/log.txt does not exist; pass the log.txt of a training"),
        (["EMPTY_FOLDER"], 2, "holds none of log.txt, trainer_state.json"),
        (["EMPTY_FILE"], 1, "has no readable loss: it is empty; expected lines such as"),
        ([str(LOGS / "README.md")], 1, "has no readable loss"),
        ([str(LOGS / "deepspeed_steps_only.txt")], 1, "tells 2 steps but no loss (DeepSpeed's own lines"),
        ([str(LOGS / "ours.txt"), "--gl_medium", "20"], 2, "--gl_medium is 20.0, which is over --gl_high (10.0)"),
        ([str(LOGS / "ours.txt"), "--gl_high", "nan"], 2, "--gl_high is nan, expected 0 or more"),
        ([str(LOGS / "ours.txt"), "--patience", "x"], 2, "argument --patience: invalid int value: 'x'"),
        ([str(LOGS / "ours.txt"), "--min_points", "1"], 2, "--min_points is 1, expected 2 or more"),
        ([str(LOGS / "ours.txt"), "--plot", "no/such/folder/a.png"], 2, "the folder of no/such/folder/a.png does not"),
        ([str(LOGS / "ours.txt"), "--details", "no/such/a.json"], 2, "--details no/such/a.json cannot be written"),
        (["-", "--watch"], 2, "--watch follows a file, found - (stdin)"),
        (["--unknown"], 2, "unrecognized arguments: --unknown; --help lists every setting"),
    ],
)
def test_errors_are_one_sentence_and_json(
    arguments: list[str], code: int, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    places = {"EMPTY_FOLDER": str(tmp_path / "folder"), "EMPTY_FILE": str(tmp_path / "empty.txt")}
    found, answer, err = call(capfd, *[places.get(argument, argument) for argument in arguments])
    assert found == code
    assert answer == {"code": code, "msg": answer["msg"], "data": {"current_risks": {}, "recommendations": {}}}
    assert text in answer["msg"]
    assert err == f"error: {answer['msg']}\n"


# --- the criteria ----------------------------------------------------------------------------------------------------
def test_overfitting_numbers_by_hand() -> None:
    evaluation = [2.0, 1.0, 1.1, 1.25, 1.2]
    readings = [Reading(step=i, eval_loss=value) for i, value in enumerate(evaluation)]
    readings[1:1] = [Reading(step=1, loss=0.9)]
    readings += [Reading(step=9 + i, loss=value) for i, value in enumerate([0.5, 0.4, 0.55, 0.5, 0.55])]
    numbers = judged(*readings).findings["overfitting"].numbers
    assert numbers["generalisation_loss"] == pytest.approx(100 * (1.2 / 1.0 - 1))
    assert numbers["lasting_gl"] == pytest.approx(20)  # of the lower one of the last two
    assert numbers["evaluations_since_better"] == 3
    strips = [0.9, (0.5 + 0.4 + 0.55 + 0.5 + 0.55) / 5]  # no epochs: the training losses between evaluations
    assert numbers["progress_quotient"] == pytest.approx(20 / (1000 * (sum(strips) / (2 * min(strips)) - 1)))
    assert (numbers["best_at"], numbers["gap_at_best"]) == (1, pytest.approx(1.0 - 0.9))


def test_the_progress_strip_is_over_epochs() -> None:
    """Prechelt's k = 5 epochs, each the mean of its logged losses, however noisy these are."""
    readings = []
    for epoch in range(1, 8):
        readings += [
            Reading(step=10 * epoch + i, epoch=epoch - 1 + i / 10, loss=2 / epoch + 0.2 * (-1) ** i)
            for i in range(1, 11)
        ]
        readings.append(Reading(step=10 * epoch + 10, epoch=epoch, eval_loss=1 + 0.125 * abs(epoch - 3)))
    numbers = judged(*readings).findings["overfitting"].numbers
    means = [2 / epoch for epoch in range(3, 8)]
    assert numbers["generalisation_loss"] == pytest.approx(50)
    assert numbers["progress_quotient"] == pytest.approx(50 / (1000 * (sum(means) / (5 * min(means)) - 1)))


@pytest.mark.parametrize(
    ("evaluation", "level"),
    [
        ([2, 1, 1.2, 1.2], "High"), ([2, 1, 1.05, 1.06], "Medium"),
        ([2, 1, 1.015, 1.02], "Low"),  # under 3%, for two evaluations
        ([2, 1, 1.015, 1.02, 1.02, 1.02], "Medium"),  # under 3%, for four
        ([2, 1, 1.006, 1.007, 1.008, 1.007], "Low"),  # under 1%
        ([2, 1.5, 1, 1.2], "Low"),  # not lasting yet, and little progress lost
        ([2, 1, 1.3, 1.01], "Low"),  # a single bad evaluation
        ([3, 0.01, 0.015, 0.016], "Low"),  # 50%, of what is nothing beside the start
        ([0.02, 0.01, 0.015, 0.016], "High"),  # whatever the loss is measured in
        ([3, 2, 2.6, 2.5, 1.5, 1.7, 1.7], "Low"),  # it has come back from more than that
        ([3, 2, 2.6, 2.5, 1.5, 1.7, 1.7, 1.7, 1.7], "High"),  # but not from so long
    ],
)  # fmt: skip
def test_overfitting_levels(evaluation: list[float], level: str) -> None:
    readings = [Reading(step=10 * i, eval_loss=value) for i, value in enumerate(evaluation)]
    readings[1:1] = [Reading(step=1 + i, loss=1 / (1 + i)) for i in range(9)]
    assert judged(*readings).findings["overfitting"].level == level


def test_a_loss_that_rises_everywhere_is_no_overfitting() -> None:
    losses = [*falling(40, 3, 1), *[3.0 + i / 40 for i in range(40)]]
    readings = [Reading(step=i, loss=value) for i, value in enumerate(losses)]
    evaluations = [Reading(step=i, eval_loss=losses[i] + 0.05) for i in range(0, 80, 10)]
    finding = judged(*sorted(readings + evaluations, key=lambda r: r.step or 0)).findings["overfitting"]
    assert (finding.level, "no overfitting" in finding.reason) == ("Low", True)


def test_underfitting_numbers_by_hand() -> None:
    # the rate falls to nothing linearly, the loss falls in proportion to the learning spent: no plateau, however flat
    count, rates = 200, [1 - i / 200 for i in range(200)]
    spent = [sum(rates[: i + 1]) / sum(rates) for i in range(count)]
    readings = [Reading(step=i, loss=2 - spent[i], lr=rates[i]) for i in range(count)]
    finding = judged(*readings).findings["underfitting"]
    assert finding.numbers["late_share"] == pytest.approx(0.5, abs=0.06)
    assert finding.level == "Medium"  # without an evaluation it may be memorising
    evaluations = [Reading(step=i, eval_loss=2 - spent[i]) for i in range(0, count, 20)] + [
        Reading(step=199, eval_loss=1.0)
    ]
    both = judged(*sorted(readings + evaluations, key=lambda r: r.step or 0)).findings["underfitting"]
    assert both.numbers["late_share"] == pytest.approx(0.5, abs=0.01)
    assert both.level == "High"


@pytest.mark.parametrize(
    ("train", "level"),
    [
        (falling(100, 2, 0.5), "Low"), ([2 - i / 2000 for i in range(100)], "High"),
        (falling(100, 2, 1.85), "Low"),  # it learned what there was at once: a good model, tuned further
        ([5.0] * 3 + [4.2] * 97, "Medium"), ([1.0, 1.5] * 50, "High"),
        ([2 - i / 150 for i in range(100)], "Medium"),  # half of the fall in the second half
    ],
)  # fmt: skip
def test_underfitting_levels(train: list[float], level: str) -> None:
    assert judged(*[Reading(step=i, loss=v) for i, v in enumerate(train)]).findings["underfitting"].level == level


@pytest.mark.parametrize(
    ("retention", "level"),
    [([1, 1.05], "Low"), ([1, 1.2, 1.3], "Medium"), ([1, 1.5], "High"), ([1, 2, 1.05], "Low"), ([4, 4.3], "Low"),
     ([0.01, 0.1], "Low"), ([1, math.nan], "High")],
)  # fmt: skip
def test_forgetting_by_the_retention_loss(retention: list[float], level: str) -> None:
    readings = [Reading(step=i, loss=1.0, retention_loss=value) for i, value in enumerate(retention)]
    assert judged(*readings).findings["catastrophic_forgetting"].level == level


def test_forgetting_without_retention_loss_is_a_hint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jump = [*falling(50, 3, 0.5), *[8.0] * 50]
    code, answer, err = call(capfd, str(write_log(tmp_path / "jump.txt", jump)))
    assert (code, levels(answer)[2]) == (0, "Medium")
    assert "never more than Medium" in err
    spike = [*falling(50, 3, 0.5), *[8.0] * 3, *[0.5] * 47]  # taken back
    assert levels(call(capfd, str(write_log(tmp_path / "spike.txt", spike)))[1])[2] == "Low"


def test_a_run_that_ended_in_nan(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, answer, err = call(
        capfd, str(write_log(tmp_path / "log.txt", [*falling(30, 3, 1), math.nan, math.nan])), "--explain"
    )
    assert (code, levels(answer)) == (0, ["Low", "High", "Medium"])
    assert "2 not finite" in err
    recovered = [*falling(30, 3, 0.5), math.nan, *[0.5] * 30]
    assert levels(call(capfd, str(write_log(tmp_path / "log.txt", recovered)))[1])[1] == "Low"


def test_too_little_evidence_is_low_and_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, answer, err = call(capfd, str(write_log(tmp_path / "log.txt", [9.0, 9.0], [1, 5], every=2)))
    assert (code, levels(answer)) == (0, ["Low", "Low", "Low"])
    assert set(answer["data"]["recommendations"].values()) == {"-"}
    assert "evidence: overfitting: 2 evaluation losses, at least 3 are needed; it is Low" in err
    assert "evidence: underfitting: 2 training and 2 evaluation losses" in err


# --- watching --------------------------------------------------------------------------------------------------------
class Watcher:
    """The command with --watch as a process whose lines are read as they come."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, str(SCRIPT), *arguments, "--watch", "--watch_interval", "0.05"]
        self.process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def line(self) -> list[str]:
        """The levels of the next JSON line."""
        assert self.process.stdout
        return levels(json.loads(self.process.stdout.readline()))

    def end(self, number: int) -> tuple[int, str, str]:
        """(exit code, rest of stdout, stderr) after a signal."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


def append(path: Path, *lines: dict[str, float]) -> None:
    """Add lines, the last one in two pieces as a slow writer would."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for part in (text[:-8], text[-8:]):
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(part)
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_watch_follows_a_growing_log(number: int, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    watcher = Watcher(str(log))
    assert watcher.process.stderr
    assert "waiting for" in watcher.process.stderr.readline()
    write_log(log, falling(40, 3, 0.1), [3, 1.5, 1.1, 1.02, 1.0], [1, 1, 1, 1, 1])
    assert watcher.line() == ["Low", "Low", "Low"]
    append(log, {"step": 50, "loss": 0.1, "eval_loss": 1.0})  # nothing new, so no line
    append(log, {"step": 60, "eval_loss": 1.4}, {"step": 70, "loss": 0.1, "eval_loss": 1.5})
    assert watcher.line() == ["High", "Low", "Low"]
    append(log, {"step": 80, "eval_loss": 1.5, "retention_loss": 2.0})
    assert watcher.line() == ["High", "Low", "High"]
    append(log, {"step": 50, "loss": 0.1, "eval_loss": 0.99, "retention_loss": 1.0})  # resumed from an earlier step
    assert watcher.line() == ["Low", "Low", "Low"]
    code, out, err = watcher.end(number)
    assert (code, out) == (128 + number, "")
    assert "Traceback" not in err


def test_watch_sees_a_log_that_begins_anew(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.txt", falling(60, 3, 0.1), [3, 1.5, 1.2, 1.3, 1.5, 1.6, 1.8])
    watcher = Watcher(str(tmp_path))
    assert watcher.line()[0] == "High"
    write_log(log, falling(30, 3, 0.1), [3, 1.5, 1.2, 1.1])  # emptied and shorter
    assert watcher.line()[0] == "Low"
    other = write_log(tmp_path / "other", falling(200, 3, 0.1), [3, 1.5, 1.2, 1.3, 1.5, 1.6, 1.8])
    os.replace(other, log)  # another file under its name
    assert watcher.line()[0] == "High"
    code, out, err = watcher.end(signal.SIGTERM)
    assert (code, out) == (143, "")
    assert err.count("begins anew") == 2


def test_watch_ends_when_the_log_is_idle(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ("--watch", "--watch_interval", "0.02", "--watch_until_idle", "0.2")
    assert call(capfd, str(LOGS / "ours.txt"), *flags)[0] == 0
    code, answer, _ = call(capfd, str(LOGS / "deepspeed_steps_only.txt"), *flags)
    assert (code, answer["code"]) == (1, 1)
    code, answer, err = call(capfd, str(tmp_path / "never.txt"), *flags)
    assert (code, "never.txt does not exist" in answer["msg"]) == (2, True)
    assert "waiting for" in err
