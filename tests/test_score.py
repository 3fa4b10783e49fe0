"""Scores against a hand computation; what predictions must look like."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import f1_score

from faq import score
from llmops import pictures

# (true, predicted): a 3 of 4 right, b 1 of 2, none 1 of 2; one answer outside the candidates
PAIRS = [("a", "a"), ("a", "a"), ("a", "a"), ("a", "b"), ("b", "b"), ("b", "x!"), ("不符合", "不符合"), ("不符合", "a")]


def rows(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Predictions as faq/predict.sh writes them."""
    return [
        {"question": "q", "intent": predicted, "reference": true, "known": predicted != "x!", "constrained": False}
        for true, predicted in pairs
    ]


def write(path: Path, found: list[dict[str, Any]]) -> str:
    """A predictions file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
    return str(path)


def test_by_hand() -> None:
    result = score.score(rows(PAIRS), "不符合")
    assert result["accuracy"] == 5 / 8
    # a: precision 3/4, recall 3/4; b: precision 1/2, recall 1/2; 不符合: precision 1, recall 1/2, F1 2/3
    assert result["macro_f1"] == pytest.approx((3 / 4 + 1 / 2 + 2 / 3) / 3, abs=1e-4)
    assert result["none_of_the_intents"] == {"precision": 1.0, "recall": 0.5, "f1": 0.6667, "support": 2}
    assert result["outside_the_candidates"] == 1
    assert result["per_intent"]["a"] == {"accuracy": 0.75, "questions": 4}
    assert {(p["intent"], p["predicted"]) for p in result["most_confused"]} == {
        ("a", "b"),
        ("b", "x!"),
        ("不符合", "a"),
    }
    assert result["accuracy_standard_error"] == pytest.approx((5 / 8 * 3 / 8 / 8) ** 0.5, abs=1e-4)
    # Wilson's centre (p + z² / 2n) / (1 + z² / n) and half width z √(p (1 - p) / n + z² / 4n²) / (1 + z² / n), z = 1.96
    assert result["accuracy_interval"] == pytest.approx([0.5845 - 0.2788, 0.5845 + 0.2788], abs=2e-4)
    assert not result["constrained"]


def test_macro_f1_is_scikit_learns() -> None:
    """To the last digit that is told, with many intents: nothing is rounded before the mean."""
    for seed in (0, 1, 32, 112, 147, 157):  # from the third on rounding first makes another last digit
        draw = random.Random(seed)
        names = [str(k) for k in range(7 + 70 * (seed % 2))]
        pairs = [(true, true if draw.random() < 0.6 else draw.choice(names)) for true in draw.choices(names, k=300)]
        known = [{"reference": true, "intent": predicted} for true, predicted in pairs]
        expected = f1_score(*zip(*pairs, strict=True), average="macro")
        assert score.score(known, "不符合")["macro_f1"] == round(expected, 4)


def test_few_test_questions_are_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main([write(tmp_path / "few.jsonl", rows([("a", "a")] * 7 + [("b", "a")] * 2))]) == 0
    said = "warning: 9 test questions say little: an accuracy of 78% may as well be 45% or 94%"
    assert said in capsys.readouterr().err
    assert score.main([write(tmp_path / "many.jsonl", rows([("a", "a")] * 80 + [("b", "a")] * 20))]) == 0
    assert "say little" not in capsys.readouterr().err


def test_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = write(tmp_path / "many.jsonl", rows([*PAIRS, ("b", "a"), ("b", "a")]))
    good = write(tmp_path / "good.jsonl", rows([("a", "a"), ("b", "b")]))
    assert score.main([many, good]) == 0
    printed = capsys.readouterr()
    first, second = json.loads(printed.out)["results"]
    assert first["most_confused"][0] == {"intent": "b", "predicted": "a", "count": 2}
    assert second["accuracy"] == second["macro_f1"] == 1
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "good.png").exists()  # nothing was confused


def test_without_a_chinese_font_intents_are_numbered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures, "CHINESE_FONTS", ())
    assert pictures.prepare_labels(["退款", "refund", "物流"]) == ["1", "refund", "3"]
    assert "1 退款, 3 物流" in capsys.readouterr().err
    assert pictures.prepare_labels(["refund"]) == ["refund"]


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("", "is empty"),
        ("{", "p.jsonl:1: broken JSON"),
        ('{"intent": "a"}', "p.jsonl:1: no 'reference'"),
        ('{"reference": "a", "intent": "a"}\n[]', "p.jsonl:2: no 'intent'"),
    ],
)
def test_bad_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, phrase: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    assert score.main([str(path)]) == 2
    printed = capsys.readouterr()
    assert phrase in printed.err
    assert printed.out == ""
    assert score.main([str(tmp_path / "no.jsonl")]) == 2
