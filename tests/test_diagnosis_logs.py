"""Reading training logs: every format to the right numbers, restarts, repeated ranks, NaN, encodings, memory."""

import json
import math
import random
from pathlib import Path

import pytest
from conftest import ROOT

from eval.diagnosis.curves import CELLS, Curve, Place
from eval.diagnosis.log_reader import LogReader
from eval.diagnosis.training_run import TrainingRun, series_of

LOGS = ROOT / "tests" / "logs"
Points = list[tuple[float, float]]


def read_bytes(data: bytes, piece: int = 1 << 20) -> TrainingRun:
    """What a log of these bytes tells, fed in pieces."""
    reader = LogReader()
    for start in range(0, len(data), piece):
        reader.feed(data[start : start + piece])
    reader.finish()
    return reader.run


def points(run: TrainingRun, name: str = "loss") -> Points:
    """(place, value) of a curve."""
    curve = series_of(run, name, run.axis())
    return list(zip(curve.x, curve.y, strict=True))


# the numbers that stand in the files, written down by hand: axis, training, evaluation, retention
EXPECTED: dict[str, tuple[str, Points, Points, Points]] = {
    "ours.txt": (
        "step", [(1, 3.05), (2, 2.6), (3, 2.25), (4, 2.0), (5, 1.5), (6, 1.25)], [(0, 3.1), (4, 2.2), (6, 2.4)],
        [(0, 1.2), (4, 1.3), (6, 1.75)],
    ),
    # two ranks, and steps that begin again with each epoch
    "original_container.txt": (
        "step", [(1, 17.162593841552734), (2, 9.5), (3, 6.25), (4, 5.0)],
        [(1, 17.33646011352539), (2, 9.75), (3, 6.5), (4, 5.25)], [],
    ),
    "hf_trainer.txt": (
        "epoch", [(0.25, 10.5949), (0.5, 6.2), (0.75, 2.5), (1.0, 0.75)], [(0.9, 0.3477), (1.8, 0.3125)], [],
    ),
    "hf_trainer_5.txt": ("epoch", [(0.4375, 9.409), (0.875, 8.25), (1.312, 7.5)], [(1.0, 8.125)], []),
    "trainer_state.json": (
        "step", [(10, 2.75), (20, 1.25), (30, 0.5)], [(10, 2.5), (20, 1.5), (30, 1.75)], [],
    ),
    "llamafactory_trainer_log.jsonl": ("step", [(30, 0.5625), (60, 0.375), (90, 0.2805)], [(60, 0.4375)], []),
    "ms_swift_logging.jsonl": ("step", [(1, 7.39), (10, 4.5), (20, 3.125)], [(10, 4.25)], []),
    "deepspeed_steps_only.txt": ("step", [], [], []),
    # the loss of "Epoch 1 finished" is a mean over steps that were told before, so only its evaluation counts
    "deepspeed_script.txt": ("step", [(5, 3.5), (10, 2.31), (15, 1.5), (20, 1.25)], [(10, 2.75), (20, 1.4)], []),
    # a progress bar's means over a part of the epoch do not count
    "keras2.txt": (
        "epoch", [(1, 0.5241), (2, 0.4125), (3, 0.3125)], [(1, 0.6997), (2, 0.6125), (3, 0.6875)], [],
    ),
    "keras3.txt": ("epoch", [(1, 1.625), (2, 1.125)], [(1, 1.5), (2, 1.25)], []),
    "nanochat.txt": ("step", [(10, 8.5), (20, 5.25), (30, 4.75)], [(20, 5.5), (40, 4.625)], []),
}  # fmt: skip


def test_every_format_has_its_numbers() -> None:
    assert set(EXPECTED) | {"README.md"} == {path.name for path in LOGS.iterdir()}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("piece", [1 << 20, 7])
def test_formats(name: str, piece: int) -> None:
    run = read_bytes((LOGS / name).read_bytes(), piece)
    axis, train, evaluation, retention = EXPECTED[name]
    assert run.axis() == axis
    assert [points(run, curve) for curve in ("loss", "eval_loss", "retention_loss")] == [train, evaluation, retention]
    assert run.restarts == 0


def test_several_formats_in_one_file() -> None:
    text = (LOGS / "deepspeed_steps_only.txt").read_text().splitlines()
    mixed = [
        text[0], "{'loss': 2.5, 'learning_rate': 1e-05, 'epoch': 0.5}", text[2], "noise without numbers",
        "{'loss': 2.0, 'learning_rate': 1e-05, 'epoch': 1.0}", '{"step": 30, "epoch": 1.5, "loss": 1.5}',
        "step 00040/00050 (80.00%) | loss: 1.25 | lrm: 1.00", '{"step": 40, "epoch": 2.0, "eval_loss": 1.75}',
    ]  # fmt: skip
    run = read_bytes("\n".join([*mixed, ""]).encode())
    assert points(run) == [(10, 2.5), (20, 2.0), (30, 1.5), (40, 1.25)]  # steps of DeepSpeed's lines, then their own
    assert points(run, "eval_loss") == [(40, 1.75)]


def test_progress_bar_and_losses_share_lines() -> None:
    text = (
        " 10%|#  | 1/10 [00:01<00:09]\r{'loss': 2.5, 'epoch': 0.1}\r 20%|## | 2/10\r\n{'loss': 2.25, 'epoch': 0.2}\r\n"
    )
    assert points(read_bytes(text.encode())) == [(0.1, 2.5), (0.2, 2.25)]


def ours(step: int, loss: float, name: str = "loss") -> str:
    """A line of log.txt."""
    return json.dumps({"step": step, "epoch": step / 10, name: loss, "learning_rate": 1e-4, "remaining": None}) + "\n"


def test_a_resumed_run_replaces_what_it_tells_again() -> None:
    first = "".join(ours(i, 10 - i) for i in range(1, 8)) + ours(4, 4.5, "eval_loss")
    log = "".join(ours(i, 10 - i) for i in range(1, 8)).replace(ours(5, 5), ours(4, 4.5, "eval_loss") + ours(5, 5))
    resumed = log + "".join(ours(i, 20 - i) for i in range(5, 9)) + ours(8, 11.5, "eval_loss")
    run = read_bytes(resumed.encode())
    assert points(run) == [(1, 9), (2, 8), (3, 7), (4, 6), (5, 15), (6, 14), (7, 13), (8, 12)]
    assert points(run, "eval_loss") == [(4, 4.5), (8, 11.5)]
    assert run.restarts == 1
    anew = read_bytes((first + ours(1, 3.5) + ours(2, 3.25)).encode())  # another run in the same file
    assert points(anew) == [(1, 3.5), (2, 3.25)]
    assert points(anew, "eval_loss") == []


def test_repeated_lines_count_once() -> None:
    lines = [ours(i, 5 / i) for i in range(1, 40)]
    plain = points(read_bytes("".join(lines).encode()))
    together = read_bytes("".join(line * 4 for line in lines).encode())
    late = read_bytes(
        "".join([lines[0], *(a + b for a, b in zip(lines[1:], lines, strict=False))]).encode()
    )  # one process lags behind
    assert points(together) == plain
    assert points(late) == plain
    assert late.restarts == 0
    ranks = "".join(
        f"{{'rank': {rank}, 'epoch': 1, 'step': {i}, 'loss': {5 / i + rank}}}\n"
        for i in range(1, 40)
        for rank in (2, 0, 1)
    )
    assert points(read_bytes(ranks.encode())) == [(i, 5 / i + 2) for i in range(1, 40)]  # the first that spoke


def test_values_that_are_not_finite() -> None:
    lines = [ours(1, 2.0), ours(2, math.nan), ours(3, 1.5), ours(4, math.inf), '{"step": 5, "loss": -Infinity}\n',
             "{'loss': nan, 'step': 6}\n"]  # fmt: skip
    run = read_bytes("".join(lines).encode())
    assert points(run) == [(1, 2.0), (3, 1.5)]
    assert run.nonfinite["loss"] == 4
    assert run.broken["loss"] == 3
    assert run.first_nonfinite == Place(1, 2, 0.2)


def test_a_cut_last_line_tells_nothing_wrong() -> None:
    whole = ours(1, 2.5) + ours(2, 12.375)
    for cut in range(len(ours(1, 2.5)), len(whole) + 1):
        values = points(read_bytes(whole[:cut].encode()))
        assert values in ([(1, 2.5)], [(1, 2.5), (2, 12.375)])
    assert values == [(1, 2.5), (2, 12.375)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030"])
@pytest.mark.parametrize("piece", [1 << 20, 4097, 1])
def test_encodings(encoding: str, piece: int) -> None:
    text = "".join(f"第{i}步，训练损失见右 {{'step': {i}, 'loss': {100 - i}.5}}\r\n" for i in range(1, 100))
    assert points(read_bytes(text.encode(encoding), piece)) == [(i, 100.5 - i) for i in range(1, 100)]


def test_broken_bytes_between_the_lines() -> None:
    data = b"\x00\xff\xfe{{\n" + ours(1, 2.5).encode() + b"\x81\x30\xc3(\n\xed\xa0\x80" + ours(2, 1.5).encode()
    assert points(read_bytes(data)) == [(1, 2.5), (2, 1.5)]


@pytest.mark.parametrize(
    "text", ["aux_loss: 0.5, loss: 2.0", "aux loss: 0.5, kl loss = 1, loss: 2.0", "loss=tensor(2.0)"]
)
def test_parts_of_a_loss_are_not_the_loss(text: str) -> None:
    assert points(read_bytes(f"step: 1, {text}\n".encode())) == [(1, 2.0)]


def test_one_long_line_of_records() -> None:
    entries = [{"epoch": i / 100, "loss": 5 / i, "step": i} for i in range(1, 30_001)]
    run = read_bytes(json.dumps({"best_metric": 0.1, "log_history": entries, "max_steps": 9}).encode())
    assert run.readings == len(entries)
    assert points(run)[-1][0] == 30_000
    pretty = read_bytes(json.dumps({"global_step": 7, "log_history": entries}, indent=2).encode())
    assert points(pretty) == points(run)


def test_the_quick_way_reads_what_the_slow_way_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    lines, step = [], 0
    for _ in range(30_000):
        step += 1
        lines.append(ours(step, draw.random()))
        kind = draw.random()
        if kind < 0.01:
            lines.append(ours(step, draw.random(), "eval_loss"))
        elif kind < 0.012:
            lines.append("something happened\n")
        elif kind < 0.013:
            lines.append(ours(step, math.nan))
        elif kind < 0.0135:
            step = max(0, step - 20)
        elif kind < 0.02:
            lines.append(lines[-1])
    data = "".join(lines).encode()
    quick = read_bytes(data)
    monkeypatch.setattr("eval.diagnosis.log_reader.learn_shape", lambda block: None)
    slow = read_bytes(data)
    assert quick.restarts == slow.restarts > 5
    for name in quick.curves:
        assert [cell.place for cell in quick.curves[name].all_cells()] == [
            c.place for c in slow.curves[name].all_cells()
        ]
        assert points(quick, name) == points(slow, name)


def test_memory_is_bounded_and_the_extremes_exact() -> None:
    draw = random.Random(2)
    values = [2 + draw.random() for _ in range(100_000)]
    values[61_803] = 1.0
    curve = Curve()
    for start in range(0, len(values), 1000):
        chunk = values[start : start + 1000]
        places = range(start, start + len(chunk))
        curve.extend(places, places, [None] * len(chunk), chunk)
    cells = curve.all_cells()
    assert CELLS <= len(cells) <= 2 * CELLS + 1
    assert sum(cell.size for cell in cells) == len(values)
    assert sum(cell.mean * cell.size for cell in cells) == pytest.approx(sum(values))
    lowest = min(cells, key=lambda cell: cell.low)
    assert (lowest.low, lowest.low_place.step) == (1.0, 61_803)
    assert (cells[-1].last, cells[-1].place.step) == (values[-1], 99_999)


def test_a_hole_at_the_start() -> None:
    assert points(read_bytes(bytes(3 << 20) + ours(1, 2.5).encode() + ours(2, 1.5).encode())) == [(1, 2.5), (2, 1.5)]


def test_noise_of_gigabytes_is_not_kept() -> None:
    reader = LogReader()
    for _ in range(24):
        reader.feed(b"x" * (1 << 20))  # one line without an end
    assert len(reader._rest) <= 2 << 20
    reader.feed(b"\n" + ours(1, 2.0).encode())
    reader.finish()
    assert points(reader.run) == [(1, 2.0)]


def test_fixtures_are_small() -> None:
    assert sum(Path(path).stat().st_size for path in LOGS.iterdir()) < 20_000
