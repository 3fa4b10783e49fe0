"""Decisions that meet, and what becomes of the rows of FAQ data."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from llmops import json_text
from serve.console.cleaning import Edits, clean
from serve.console.routes import routes

DECIDE, WRITE, STATE = (f"/console/api/curator{part}" for part in ("/decide", "/write", ""))
NAMES = {"report": "similar.json", "data": "faq.json"}


def rows_of(path: Path, rows: list[dict[str, Any]], **edits: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    path.write_text("".join(json_text.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cleaned = clean(path, Edits(**edits))
    return cleaned.rows, cleaned.changes


def test_rows_keep_their_shape(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "question": "q0", "intent": "A", "output": "a"},
        {"input": "['q1', 'q2', 'q3']", "intent": "B", "output": "b", "note": "n"},
        {"input": ["q4"], "意图": "C"},
        {"question": "q1", "intent": "A", "output": "a"},
    ]
    path = tmp_path / "data.jsonl"
    assert rows_of(path, rows)[0] == rows
    found, changes = rows_of(path, rows, relabelled={(1, "q2"): "A", (1, "q1"): "A"}, dropped={(2, "q4")})
    assert found == [
        rows[0],
        {"input": "['q3']", "intent": "B", "output": "b", "note": "n"},
        {"input": "['q2']", "intent": "A", "output": "a", "note": "n"},
        rows[3],
    ]  # q1 stands under A already, in the last row
    assert [(c["question"], c["change"]) for c in changes] == [
        ("q1", "dropped"),
        ("q2", "relabelled"),
        ("q4", "dropped"),
    ]


def test_merges_that_meet(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "intent": intent} for i, intent in enumerate("ABCD")]
    edits = Edits()
    edits.merge("A", "B")
    edits.merge("B", "C")  # A goes along
    edits.merge("D", "A")
    path = tmp_path / "data.jsonl"
    found, _ = rows_of(path, rows, merged=edits.merged)
    assert [row["intent"] for row in found] == ["C", "C", "C", "C"]
    edits.merge("C", "B")  # turned around: B stays
    assert {edits.final(intent) for intent in "ABCD"} == {"B"}


def test_prompts_that_are_made_already_are_not_edited(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "候选意图：A B\n问题：q"}, {"role": "assistant", "content": "A"}]
    rows = [{"question": "q", "messages": messages}, {"question": "q0", "intent": "B"}]
    path = tmp_path / "data.jsonl"
    assert rows_of(path, rows, dropped={(1, "q0")})[0] == rows[:1]
    with pytest.raises(Exception, match=r"data.jsonl:1 holds a prompt that is made already"):
        rows_of(path, rows, relabelled={(0, "q"): "B"})


def test_a_question_gets_the_reply_of_its_new_intent_or_none(tmp_path: Path) -> None:
    rows = [
        {"question": "q0", "intent": "A", "output": "a", "reply": "a again"},
        {"question": "q1", "intent": "B"},
        {"question": "q2", "intent": "C", "output": "c"},
        {"input": ["q3", "q4"], "intent": "C", "output": "c too"},
    ]
    path = tmp_path / "data.jsonl"
    found, _ = rows_of(path, rows, relabelled={(0, "q0"): "B", (2, "q2"): "A", (3, "q4"): "B"})
    assert found == [
        {"question": "q0", "intent": "B"},  # B has no reply
        rows[1],
        {"question": "q2", "intent": "A", "output": "a"},
        {"input": ["q3"], "intent": "C", "output": "c too"},
        {"input": ["q4"], "intent": "B"},
    ]
    found, _ = rows_of(path, rows, merged={"A": "B"}, relabelled={(2, "q2"): "B"})
    assert [row.get("output") for row in found] == ["a", None, "a", "c too"]  # the only reply of the two that are one
    found, _ = rows_of(path, rows, merged={"A": "C"})
    assert found[0] == {"question": "q0", "intent": "C", "output": "c", "reply": "c"}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """A curator with two pairs of the same intents, A and B, and one of others."""
    texts = [("a1", "A"), ("a2", "A"), ("b1", "B"), ("b2", "B"), ("c", "C")]
    lines = "".join(json_text.dumps({"question": q, "intent": i}) + "\n" for q, i in texts)
    (tmp_path / "faq.json").write_text(lines)
    pairs = [
        {"intent1": one[0].upper(), "intent2": two[0].upper(), "questionPair": [one, two], "lineNumbers": [i, j]}
        for one, i, two, j in (("a1", 0, "b1", 2), ("a2", 1, "b2", 3), ("c", 4, "a1", 0))
    ]
    report = {"data": {"mismatched_intents": pairs, "similar_intents": []}}
    (tmp_path / "similar.json").write_text(json.dumps(report))
    with TestClient(Starlette(routes=routes(tmp_path))) as opened:
        yield opened


def shown(client: TestClient) -> dict[str, tuple[str, str] | None]:
    """What the page says of each pair: the action, and whose decision it is."""
    pairs = {p["key"]: p for group in client.get(STATE, params=NAMES).json()["groups"] for p in group["pairs"]}
    left = {key: pair["sides"][0]["question"] for key, pair in pairs.items()}
    told = {key: pair["decision"] for key, pair in pairs.items()}
    return {left[key]: (one["action"], left[one["pair"]]) if one else None for key, one in told.items()}


def act(client: TestClient, question: str, action: str, side: int = 1) -> None:
    pairs = [p for group in client.get(STATE, params=NAMES).json()["groups"] for p in group["pairs"]]
    key = next(pair["key"] for pair in pairs if pair["sides"][0]["question"] == question)
    answer = client.post(DECIDE, json=NAMES | {"pair": key, "action": action, "side": side})
    assert answer.status_code == 200, answer.text


def intents(client: TestClient, tmp_path: Path) -> str:
    """The intents of the cleaned file."""
    assert client.post(WRITE, json=NAMES).json()["not_applied"] == 0
    lines = (tmp_path / "faq.json.cleaned.jsonl").read_text().splitlines()
    return "".join(json.loads(line)["intent"] for line in lines)


def test_a_merge_and_a_pair_that_is_kept_do_not_contradict_each_other(client: TestClient, tmp_path: Path) -> None:
    act(client, "a1", "keep")
    act(client, "c", "keep")
    act(client, "a2", "merge")  # B goes into A: a1 and b1 cannot both be right any more
    assert shown(client) == {"a1": ("merge", "a2"), "a2": ("merge", "a2"), "c": ("keep", "c")}
    assert intents(client, tmp_path) == "AAAAC"
    act(client, "a2", "undo")
    assert shown(client) == {"a1": ("keep", "a1"), "a2": None, "c": ("keep", "c")}
    assert intents(client, tmp_path) == "AABBC"
    act(client, "a2", "merge")
    act(client, "a1", "keep")  # both are right: the merge is taken back
    assert shown(client) == {"a1": ("keep", "a1"), "a2": None, "c": ("keep", "c")}
    assert intents(client, tmp_path) == "AABBC"
    act(client, "a2", "keep")
    assert shown(client) == {"a1": ("keep", "a1"), "a2": ("keep", "a2"), "c": ("keep", "c")}
    act(client, "a1", "merge")
    act(client, "a2", "merge", side=0)  # turned around: A goes into B
    assert shown(client) == {"a1": ("merge", "a2"), "a2": ("merge", "a2"), "c": ("keep", "c")}
    assert intents(client, tmp_path) == "BBBBC"
    act(client, "a1", "relabel", side=0)  # of one question: the merge stays
    assert shown(client)["a2"] == ("merge", "a2")
