"""What went wrong on other people's logs, rebuilt by hand from the numbers that describe each, judged right."""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from test_diagnosis import call, levels

Lines = list[dict[str, float]]


def trainer(train: Sequence[float], evaluation: Sequence[float], epochs: float, first_epoch: float = 0.0) -> str:
    """The Trainer's output: losses spread evenly over the epochs, evaluations too, the last of both at the end."""
    told: list[tuple[float, int, dict[str, float]]] = []
    for kind, (name, values) in enumerate((("loss", train), ("eval_loss", evaluation))):
        for i, value in enumerate(values, 1):
            epoch = round(first_epoch + (epochs - first_epoch) * i / len(values), 4)
            told.append((epoch, kind, {name: round(value, 5), "epoch": epoch}))
    return "".join(f"{line}\n" for _, _, line in sorted(told, key=lambda row: row[:2]))


def fall(count: int, start: float, end: float, speed: float, noise: float = 0.01) -> list[float]:
    """A noisy exponential descent."""
    draw = random.Random(count)
    return [(end + (start - end) * math.exp(-speed * i / count)) * (1 + draw.gauss(0, noise)) for i in range(count)]


def staircase() -> str:
    """Epochs as steps: 1.5, 0.9, 0.47, flat within each, as a training loss falls on what it has seen before."""
    draw = random.Random(3)
    steps = [level * (1 + draw.gauss(0, 0.02)) for level in (1.5, 0.9, 0.6) for _ in range(40)]
    return trainer(steps, [], 3)


def container() -> str:
    """The original container: six epochs, `step` from 1 in each, evaluation 2.5 at best, then up to 4.2."""
    lines = []
    for epoch, evaluation in enumerate((2.9, 2.5, 2.8, 3.3, 3.8, 4.2)):
        for step in range(1, 21):
            line = {"rank": 0, "epoch": round(epoch + step / 20, 2), "step": step,
                    "loss": 3.0 / (1 + epoch + step / 20), "learning_rate": 2e-05}  # fmt: skip
            line |= {"eval_loss": evaluation} if step == 20 else {}
            lines.append(f"{line}\n")
    return "".join(lines)


CASES: dict[str, tuple[str, tuple[str, str]]] = {
    "1a first evaluation late: train 3.4 to 0.58": (
        trainer(fall(160, 3.4, 0.58, 20), [0.742, 0.715, 0.721], 3), ("Low", "Low"),
    ),
    "1b first evaluation late: train 0.69 to 0.34": (
        trainer(fall(18, 0.69, 0.34, 6), [0.395, 0.416, 0.389], 3), ("Low", "Low"),
    ),
    "1c first evaluation late: train 20 to 0.15": (
        trainer(fall(90, 20, 0.15, 40), [0.158, 0.145, 0.135, 0.129], 4), ("Low", "Low"),
    ),
    "2a the evaluation has stopped: 1.62 to 1.122": (
        trainer(
            fall(180, 2.08, 1.03, 6),
            [1.622, 1.42, 1.357, 1.3, 1.251, 1.205, 1.175, 1.154, 1.13, 1.1265, 1.1245, 1.123, 1.122, 1.122], 3,
        ),
        ("Low", "Low"),
    ),
    "2c the evaluation has stopped after a late fall": (
        trainer(
            fall(160, 3.1, 1.85, 2), [3, 2.9, 2.8, 2.75, 2.7, 2.65, 2.6, 2.1, 1.9, 1.9, 1.9, 1.9, 1.9, 1.9], 3,
        ),
        ("Low", "Low"),
    ),
    "2b the evaluation has turned: 1.552, then 1.573 to 1.578": (
        trainer(
            [*fall(80, 2.2, 1.83, 8), *fall(80, 1.62, 1.6, 1), *fall(80, 1.47, 1.46, 1)],
            [1.641, 1.595, 1.577, 1.569, 1.571, 1.566, 1.561, 1.554, 1.552, 1.573, 1.576, 1.578, 1.578], 3,
        ),
        ("Medium", "Low"),
    ),
    "3a a log that begins in the middle": (trainer(fall(33, 0.955, 0.94, 1), [], 2.0, first_epoch=1.0), ("Low", "Low")),
    "3c the same in a long run, told often": (
        "".join(f"{{'loss': {0.95 - i * 5e-6:.6f}, 'step': {1000 + 10 * i}}}\n" for i in range(1900)), ("Low", "Low"),
    ),
    "3b a staircase of epochs": (staircase(), ("Low", "Low")),
    "4a nine percent over six epochs while the training loss halves": (
        trainer(
            fall(14, 0.2, 0.044, 4),
            [0.11, 0.103, 0.099, 0.098, 0.097, 0.095, 0.1, 0.0947, 0.099, 0.1, 0.1015, 0.102, 0.1035, 0.1032], 14,
        ),
        ("Medium", "Low"),
    ),
    "4b an onset of two percent": (
        trainer(fall(100, 2.5, 0.8, 3), [2.0, 1.8, 1.7, 1.66, 1.65, 1.67, 1.675, 1.68, 1.685], 9), ("Medium", "Low"),
    ),
    "5 steps that begin again in every epoch": (container(), ("High", "Low")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_went_wrong(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, expected = CASES[name]
    (tmp_path / "log.txt").write_text(text, encoding="utf-8")
    code, answer, err = call(capfd, str(tmp_path / "log.txt"), "--explain")
    assert (code, tuple(levels(answer)[:2])) == (0, expected), err
    assert answer["data"]["recommendations"]["underfitting"] == "-"


def test_each_case_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = {}
    for name, (text, _) in CASES.items():
        (tmp_path / "log.txt").write_text(text, encoding="utf-8")
        said[name.split(" ")[0]] = call(capfd, str(tmp_path / "log.txt"), "--explain")[2]
    assert "begins in the middle of the run, at 1.03" in said["3a"]
    assert "begins in the middle of the run, at 1000" in said["3c"]
    assert "more of this training is no cure" in said["2b"]
    assert "evaluation loss 1.578 is 1.7% over its best, 1.552" in said["2b"]
    assert "2.1% over its best, 1.65 at 5" in said["4b"]
    assert "120 training losses, 6 evaluation losses" in said["5"]  # nothing was thrown away
    assert "68.0% over its best, 2.5 at 40" in said["5"]


def test_case_6_the_progress_is_over_epochs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Noise between neighbouring losses is no progress: the quotient is the same with and without it."""
    found = []
    for noise in (0.0, 0.2):
        train = [2.0 / (1 + i // 20) + noise * (-1) ** i for i in range(120)]
        text = trainer(train, [2, 1.5, 1.2, 1.3, 1.35, 1.4], 6)
        (tmp_path / "log.txt").write_text(text, encoding="utf-8")
        err = call(capfd, str(tmp_path / "log.txt"), "--explain")[2]
        found.append(next(line.split()[6] for line in err.splitlines() if "(PQ)" in line))
    assert found[0] == found[1]


@pytest.mark.parametrize("seed", range(40))
def test_advice_never_contradicts_itself(seed: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Never fewer epochs and more of them at once, whatever the curves."""
    draw = random.Random(seed)
    ends = [draw.uniform(0.05, 8) for _ in range(4)]
    shapes: list[Callable[[int], list[float]]] = [
        lambda n: fall(n, ends[0], ends[1], draw.uniform(0.1, 20), 0.05),
        lambda n: [*fall(n // 2, ends[0], ends[1], 5, 0.02), *fall(n - n // 2, ends[2], ends[3], 5, 0.02)],
    ]
    text = trainer(draw.choice(shapes)(60), draw.choice(shapes)(draw.randint(3, 20)), draw.randint(1, 9))
    (tmp_path / "log.txt").write_text(text, encoding="utf-8")
    answer = call(capfd, str(tmp_path / "log.txt"))[1]
    over, under, _ = levels(answer)
    advice = answer["data"]["recommendations"]["underfitting"]
    assert over == "Low" or under == "Low" or "提高学习率" not in advice


def test_a_model_that_forgets_is_not_told_to_learn_faster(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for kept, faster in ((1.0, True), (1.3, False), (1.6, False)):
        rows = [
            {"step": i, "loss": 3 - i / 40, "eval_loss": 3 - i / 40, "retention_loss": 1 + (kept - 1) * i / 40}
            for i in range(0, 41, 5)
        ]
        (tmp_path / "log.txt").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        answer = call(capfd, str(tmp_path / "log.txt"))[1]
        assert levels(answer)[1] != "Low"
        assert (levels(answer)[2] == "Low") is faster
        advice = answer["data"]["recommendations"]["underfitting"]
        assert ("，提高学习率" in advice or "或提高学习率" in advice) is faster


def test_a_real_still_falling_run_is_underfitted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The rules that keep these cases quiet do not silence the others: half of the fall late, or a steep end."""
    for train, evaluation in (
        ([3 - i / 100 for i in range(100)], [2.75, 2.5, 2.25, 2.0]),
        (fall(60, 4, 0.8, 3), [3.1, 1.9, 1.2, 1.0, 0.85, 0.7]),
    ):  # fmt: skip
        (tmp_path / "log.txt").write_text(trainer(train, evaluation, 1), encoding="utf-8")
        assert levels(call(capfd, str(tmp_path / "log.txt"))[1])[1] != "Low"


def test_a_rise_that_the_curve_came_back_from_before_must_last(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As large as the one before: twice the patience; half as large: twice as long as that one lasted."""
    train, start = fall(160, 2, 0.02, 8), [1.6, 0.8, 0.4]
    bump = [0.35, 0.36, 0.38, 0.4, 0.36]  # 14% over 0.35, five evaluations without a better one
    as_large, half = [0.3, 0.32, 0.335, 0.34, 0.345], [0.3, 0.311, 0.312, 0.312, 0.313]
    for rise, expected in ((as_large[:3], "Low"), (as_large, "High"), (half, "Low"), (half + half[-1:] * 6, "Medium")):
        (tmp_path / "log.txt").write_text(trainer(train, [*start, *bump, *rise], 8), encoding="utf-8")
        assert levels(call(capfd, str(tmp_path / "log.txt"))[1])[0] == expected, rise


def test_what_annealing_brings_is_no_underfitting(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same losses: the rate ends at nothing, or on its way down."""
    evaluation = [9.4, 4.98, 3.61, 2.68, 2.06, 1.59, 1.2, 0.94, 0.79, 0.67, 0.6, 0.56, 0.54]
    for last, expected in ((0.0, "Low"), (0.3, "Medium")):
        rows = []
        for i, value in enumerate(evaluation):
            rate = last + (1 - last) * (1 + math.cos(math.pi * i / 12)) / 2
            rows.append({"step": 30 * i, "loss": value, "learning_rate": rate * 1e-4} | {"eval_loss": value})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "log.txt").write_text(text, encoding="utf-8")
        assert levels(call(capfd, str(tmp_path / "log.txt"))[1])[1] == expected


def test_rows_of_other_ranks_while_a_run_is_resumed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--explain counts what was thrown away: a resumed run replaces, a second process does not."""
    lines: Lines = [{"step": i, "loss": 5 / i} for i in range(1, 11)]
    resumed = [*lines, *({"step": i, "loss": 4 / i} for i in range(6, 13))]
    mixed = [{"step": 1, "loss": 5.0}]
    mixed += [
        line for i in range(1, 10) for line in ({"step": i + 1, "loss": 5 / (i + 1)}, {"step": i, "loss": 5.5 / i})
    ]
    for told, words in ((resumed, "12 training losses"), (mixed, "10 training losses")):
        (tmp_path / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in told), encoding="utf-8")
        err = call(capfd, str(tmp_path / "log.txt"), "--explain")[2]
        assert words in err
        assert ("1 restarts" in err) is (told is resumed)
