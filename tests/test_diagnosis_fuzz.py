"""Mutated logs: the diagnosis never ends in a traceback and always prints the documented shape."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from test_diagnosis_shapes import SHAPES

from eval import diagnosis_monitoring
from eval.diagnosis.criteria import RISKS

LOGS = [path.read_bytes() for path in sorted((ROOT / "tests" / "logs").iterdir()) if path.suffix != ".md"]
LOGS += [text.encode() for text, _, _ in SHAPES.values()]
ENCODINGS = ("utf-16", "utf-16-be", "utf-32", "gb18030", "utf-8-sig")
SPECIAL = [
    b"NaN", b"Infinity", b"-inf", b"null", b"1e999", b"-1e-999", b"0", b"-1", b"1" * 400, b"", b"{", b"}", b"\r", b"\n",
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"loss", b'"loss": ', b"step=", b"'epoch': ", b"Epoch 1/3", b"\x1b[32m",
    b"\x08",
    "损失".encode("gb18030"), b"rank: 3, ", b"[" * 300, b'"log_history": [', b"tensor(", b"1/81 [=====>] - loss: ",
]  # fmt: skip


def drop(draw: random.Random, data: bytes) -> bytes:
    """Without some bytes."""
    start = draw.randrange(len(data) + 1)
    return data[:start] + data[start + draw.randint(1, 60) :]


def repeat(draw: random.Random, data: bytes) -> bytes:
    """A part of it again, somewhere."""
    start, place = draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)
    return data[:place] + data[start : start + draw.randint(1, 400)] + data[place:]


def flip(draw: random.Random, data: bytes) -> bytes:
    """Some bytes changed."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 20)):
        if changed:
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def insert(draw: random.Random, data: bytes) -> bytes:
    """Something that is trouble, somewhere."""
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.choice(SPECIAL) + data[place:]


def renumber(draw: random.Random, data: bytes) -> bytes:
    """A number replaced by something that is trouble."""
    places = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return data
    start = end = draw.choice(places)
    while end < len(data) and data[end : end + 1] in b"0123456789.e-":
        end += 1
    return data[:start] + draw.choice(SPECIAL) + data[end:]


def cut(draw: random.Random, data: bytes) -> bytes:
    """It ends early."""
    return data[: draw.randrange(len(data) + 1)]


def shuffle(draw: random.Random, data: bytes) -> bytes:
    """Its lines in another order."""
    lines = data.splitlines(keepends=True)
    draw.shuffle(lines)
    return b"".join(lines)


def splice(draw: random.Random, data: bytes) -> bytes:
    """Another format put in."""
    other = draw.choice(LOGS)
    place = draw.randrange(len(data) + 1)
    return data[:place] + other[draw.randrange(len(other)) :] + data[place:]


def recode(draw: random.Random, data: bytes) -> bytes:
    """In another encoding."""
    return data.decode("utf-8", "replace").encode(draw.choice(ENCODINGS))


MUTATIONS: list[Callable[[random.Random, bytes], bytes]] = [
    drop, repeat, flip, insert, renumber, cut, shuffle, splice, recode,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(400))
def test_mutated_logs(seed: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(seed)
    data = draw.choice(LOGS) * draw.choice((1, 1, 3))
    for _ in range(draw.randint(1, 8)):
        data = draw.choice(MUTATIONS)(draw, data)
    log = tmp_path / "log.txt"
    log.write_bytes(data)
    capfd.readouterr()
    code = diagnosis_monitoring.main([str(log), "--explain"])
    captured = capfd.readouterr()
    answer = json.loads(captured.out)
    assert code == answer["code"]
    assert code in (0, 1)
    assert "Traceback" not in captured.err
    assert list(answer) == ["code", "msg", "data"]
    assert list(answer["data"]) == ["current_risks", "recommendations"]
    if code:
        assert answer["data"] == {"current_risks": {}, "recommendations": {}}
        assert "has no readable loss" in answer["msg"] or "but no loss" in answer["msg"]
        return
    assert answer["msg"] == "Monitoring Report"
    for part in answer["data"].values():
        assert tuple(part) == RISKS
    for risk, level in answer["data"]["current_risks"].items():
        assert level in ("High", "Medium", "Low")
        assert (answer["data"]["recommendations"][risk] == "-") is (level == "Low")
