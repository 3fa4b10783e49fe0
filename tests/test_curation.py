"""The curator: pairs of a real report, decisions that outlast everything, a cleaned file that says what was decided."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from starlette.applications import Starlette
from starlette.testclient import TestClient

from eval import analyze_similar_questions_and_intents as similar
from llmops import files, json_text
from llmops.intents.questions import read_faq
from serve.console import pairs as pairs_module
from serve.console.mount import Mounted
from serve.console.routes import routes

DATA = ROOT / "eval" / "eval_datasets" / "faq_similar" / "combine_data.json"
DECIDE, WRITE, STATE = (f"/console/api/curator{part}" for part in ("/decide", "/write", ""))
NAMES = {"report": "faq/similar.json", "data": "faq/combine_data.json"}


@pytest.fixture
def mount(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    """A mount with FAQ data and the report of the similar-questions command on it."""
    folder = tmp_path / "mnt" / "faq"
    folder.mkdir(parents=True)
    data = folder / "combine_data.json"
    data.write_bytes(DATA.read_bytes())
    arguments = ["--data_file_path", str(data), "--model_path", "builtin:ngram", "--similarity_threshold", "0.5"]
    assert similar.main([*arguments, "--output_file", str(folder / "similar.json")]) == 0
    return tmp_path / "mnt"


@pytest.fixture
def client(mount: Path) -> Iterator[TestClient]:
    """A browser without scripts."""
    with TestClient(Starlette(routes=routes(mount))) as opened:
        yield opened


def state_of(client: TestClient) -> dict[str, Any]:
    return client.get(STATE, params=NAMES).json()


def all_pairs(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [pair for group in state["groups"] for pair in group["pairs"]]


def decide(client: TestClient, pair: dict[str, Any], **what: Any) -> None:
    answer = client.post(DECIDE, json=NAMES | {"pair": pair["key"]} | what)
    assert answer.status_code == 200, answer.text


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_groups_are_the_report_s_pairs(mount: Path, client: TestClient) -> None:
    report = json.loads((mount / "faq" / "similar.json").read_text(encoding="utf-8"))["data"]
    state = state_of(client)
    pairs = all_pairs(state)
    assert state["total"] == len(pairs) == len(report["mismatched_intents"]) + len(report["similar_intents"])
    assert [len(group["pairs"]) for group in state["groups"]] == sorted(
        (len(g["pairs"]) for g in state["groups"]), reverse=True
    )
    first = next(
        pair for pair in pairs if pair["sides"][0]["question"] == report["mismatched_intents"][0]["questionPair"][0]
    )
    assert [side["record"] for side in first["sides"]] == report["mismatched_intents"][0]["lineNumbers"]
    assert first["decision"] is None
    page = client.get("/curator?report=faq/similar.json").text  # the data is found by what the report says
    assert 'data-data="faq/combine_data.json"' in page


def test_a_session(mount: Path, client: TestClient) -> None:
    pairs = all_pairs(state_of(client))
    kept, dropped, moved, gone, taken_back = pairs[0], pairs[6], pairs[7], pairs[4], pairs[8]
    decide(client, kept, action="keep")
    decide(client, dropped, action="drop", side=1)
    decide(client, moved, action="relabel", side=0)
    decide(client, gone, action="merge", side=1)  # the right one's intent goes into the left one's
    decide(client, taken_back, action="drop", side=0)
    decide(client, taken_back, action="undo")
    with TestClient(Starlette(routes=routes(mount))) as other:  # another process, a reload
        decisions = {pair["key"]: pair["decision"] for pair in all_pairs(state_of(other))}
        written = other.post(WRITE, json=NAMES)
    assert [decisions[p["key"]]["action"] for p in (kept, dropped, moved, gone)] == ["keep", "drop", "relabel", "merge"]
    assert decisions[taken_back["key"]] is None
    assert decisions[pairs[5]["key"]]["pair"] == gone["key"]  # of the same group: the merge decides it, too
    assert written.status_code == 200, written.text

    cleaned = mount / "faq" / "combine_data.json.cleaned.jsonl"
    before, after = read_faq(DATA).records, read_faq(cleaned).records
    was = {(question, record.intent) for record in before for question in record.questions}
    now = {(question, record.intent) for record in after for question in record.questions}
    away = dropped["sides"][1]
    label = moved["sides"]
    into, merged = (gone["sides"][i]["intent"] for i in (0, 1))
    expected = {(q, into if i == merged else i) for q, i in was - {(away["question"], away["intent"])}}
    expected -= {(label[0]["question"], label[0]["intent"])}
    expected |= {(label[0]["question"], label[1]["intent"])}
    assert now == expected
    replies = {record.intent: record.reply for record in before}
    assert {r.reply for r in after if label[0]["question"] in r.questions} == {replies[label[1]["intent"]]}
    told = json.loads((mount / "faq" / "combine_data.json.changes.json").read_text(encoding="utf-8"))
    assert (told["relabelled"], told["dropped"], told["decisions"]) == (1, 1, 4)
    assert told["merged"] == sum(len(r.questions) for r in before if r.intent == merged)
    assert told["questions_before"] - told["dropped"] == told["questions_after"] == sum(len(r.questions) for r in after)
    assert (mount / "faq" / "combine_data.json").read_bytes() == DATA.read_bytes()  # the original stays


def test_a_decision_is_on_the_disk_and_a_cut_line_is_passed_over(mount: Path, client: TestClient) -> None:
    pairs = all_pairs(state_of(client))
    decide(client, pairs[0], action="keep")
    kept = mount / "faq" / "combine_data.json.decisions.jsonl"
    with kept.open("a") as stream:
        line = json.loads(kept.read_text(encoding="utf-8")) | {"pair": pairs[3]["key"]}
        for harm in (
            {"records": [float("nan"), 1]},
            {"action": "drop", "side": 1.0},
            {"intents": "AB"},
            {"group": [[], 1]},
        ):
            stream.write(json.dumps(line | harm) + "\n")  # what somebody else wrote
        stream.write('{"pair": "' + pairs[1]["key"] + '", "action": "ke')  # as kill -9 or a full disk may leave it
    decide(client, pairs[2], action="keep")
    assert [pair["decision"] is not None for pair in all_pairs(state_of(client))[:4]] == [True, False, True, False]
    assert kept.read_text(encoding="utf-8").count("\n") == 7


def test_decisions_about_what_is_not_there_any_more(tmp_path: Path) -> None:
    folder = tmp_path / "faq"
    folder.mkdir()
    texts = [("a1", "A"), ("a2", "A"), ("b1", "B"), ("b2", "B"), ("c", "C"), ("d", "D")]
    rows = [{"question": question, "intent": intent} for question, intent in texts]

    def put(rows: list[dict[str, str]]) -> None:
        """The data, and a report of the same pairs."""
        text = "".join(json_text.dumps(row) + "\n" for row in rows)
        (folder / "combine_data.json").write_text(text, encoding="utf-8")
        at = {row["question"]: i for i, row in enumerate(rows)}
        pair = {"intent1": "A", "intent2": "B", "questionPair": ["a2", "b2"], "lineNumbers": [at["a2"], at["b2"]]}
        alike = [
            {"intentPair": [one[0].upper(), other[0].upper()], "lineNumbers": [at[one], at[other]]}
            for one, other in (("a1", "b1"), ("c", "d"))
            if one in at
        ]
        report = {"data": {"mismatched_intents": [pair], "similar_intents": alike}}
        (folder / "similar.json").write_text(json.dumps(report), encoding="utf-8")

    def written(client: TestClient) -> tuple[list[str], dict[str, Any]]:
        assert client.post(WRITE, json=NAMES).status_code == 200
        changes = next(folder.glob("*.changes.json"))
        cleaned = next(folder.glob("*.cleaned.jsonl"))
        return [row["question"] for row in lines(cleaned)], json.loads(changes.read_text(encoding="utf-8"))

    put(rows)
    with TestClient(Starlette(routes=routes(tmp_path))) as client:
        by_question = {pair["sides"][0]["question"]: pair for pair in all_pairs(state_of(client))}
        decide(client, by_question["a2"], action="drop", side=1)
        decide(client, by_question["a1"], action="drop", side=0)
        decide(client, by_question["c"], action="merge", side=1)
        found, told = written(client)
        assert (found, told["not_applied"]) == (["a2", "b1", "c", "d"], 0)
        put([{"question": "a0", "intent": "A"}, *rows[:4]])  # one line more before, two fewer behind
        assert [pair["decision"] for pair in all_pairs(state_of(client))] == [None, None]
        found, told = written(client)
        assert found == ["a0", "a1", "a2", "b1", "b2"]
        assert (told["decisions"], told["not_applied"], told["dropped"]) == (3, 3, 0)
        assert [one["action"] for one in told["decisions_not_applied"]] == ["drop", "drop", "merge"]
        put(rows)  # nothing was lost
        assert written(client)[1]["not_applied"] == 0
        kept = next(folder.glob("*.decisions.jsonl"))
        old = [{key: value for key, value in line.items() if key != "texts"} for line in lines(kept)]
        kept.write_text("".join(json.dumps(line) + "\n" for line in old))  # they did not say what the records held
        assert written(client)[0] == ["a1", "a2", "b1", "c", "d"]


def write_suspects(folder: Path) -> list[dict[str, Any]]:
    """Suspects as faq/score writes them of prompts that are made already, and the raw data; two of them are one."""
    rows = [{"question": "q0", "intent": "A"}, {"input": ["q1", "q2"], "intent": "A", "output": "a"},
            {"question": "q3", "intent": "B", "output": "b"}]  # fmt: skip
    said = [
        {
            "messages": [{"role": "user", "content": f"{row} {q}"}, {"role": "assistant", "content": intent}],
            "question": q,
        }
        for row, q, intent in ((0, "q0", "A"), (1, "q0", "A"), (2, "q1", "A"), (3, "q2", "A"), (4, "q3", "B"))
    ]
    suspects = [
        {"line": line, "question": q, "intent": i, "suggested": "BA"[i == "B"], "probability": 0.75}
        for line, q, i in ((1, "q0", "A"), (2, "q0", "A"), (4, "q2", "A"), (5, "q3", "B"))
    ]
    for name, written in (("raw.json", rows), ("train.jsonl", said), ("suspects.jsonl", suspects)):
        (folder / name).write_text("".join(json_text.dumps(row) + "\n" for row in written), encoding="utf-8")
    return suspects


def test_suspects(tmp_path: Path) -> None:
    write_suspects(tmp_path)
    names = {"report": "suspects.jsonl", "data": "raw.json"}
    with TestClient(Starlette(routes=routes(tmp_path))) as client:
        assert "report=suspects.jsonl" in client.get("/curator").text
        assert 'data-data="raw.json"' in client.get("/curator?report=suspects.jsonl").text  # not the prompts
        found = all_pairs(client.get(STATE, params=names).json())
        assert [(p["sides"][0]["question"], p["suggested"], p["probability"], len(p["sides"])) for p in found] == [
            ("q0", "B", 0.75, 1), ("q2", "B", 0.75, 1), ("q3", "A", 0.75, 1),
        ]  # fmt: skip
        for pair, what in zip(
            found, ({"action": "drop", "side": 0}, {"action": "relabel", "side": 0}, {"action": "keep"}), strict=True
        ):
            assert client.post(DECIDE, json=names | {"pair": pair["key"]} | what).status_code == 200
        for what in ({"action": "drop", "side": 1}, {"action": "merge", "side": 0}):
            answer = client.post(DECIDE, json=names | {"pair": found[0]["key"]} | what)
            assert (answer.status_code, "a suspect is one question" in answer.text) == (422, True)
        found = all_pairs(client.get(STATE, params=names).json())
        assert [pair["decision"]["action"] for pair in found] == ["drop", "relabel", "keep"]
        told = client.post(WRITE, json=names).json()
        assert (told["dropped"], told["relabelled"], told["not_applied"]) == (1, 1, 0)
        assert lines(tmp_path / "raw.json.cleaned.jsonl") == [
            {"input": ["q1"], "intent": "A", "output": "a"}, {"input": ["q2"], "intent": "B", "output": "b"},
            {"question": "q3", "intent": "B", "output": "b"},
        ]  # fmt: skip
        answer = client.get(STATE, params=names | {"data": "train.jsonl"})
        assert "choose the raw questions with intents" in answer.json()["error"]["message"]
        with (tmp_path / "suspects.jsonl").open("a") as stream:
            stream.write('{"line": 9, "question": "q3", "intent": "B"}\n')
        answer = client.get(STATE, params=names)
        assert "suspects.jsonl:5: no question with an intent, a suggested one" in answer.json()["error"]["message"]


def test_suspects_of_the_command(tmp_path: Path) -> None:
    """Its lines are known as what they are."""
    from faq.advice import suspects
    from llmops.intents.classifiers import Asked

    class Known:
        """What `suspects` reads of Classifiers."""

        own = (Asked("q0", "A", None, 1), Asked("q1", "B", None, 2))
        classes, labels = ("A", "B"), np.array([0, 1])
        judged = np.array([True, True])

    found = suspects(Known(), np.array([[0.01, 0.99], [0.1, 0.9]]))  # type: ignore[arg-type]
    path = tmp_path / "suspects.jsonl"
    path.write_text("".join(json_text.dumps(row) + "\n" for row in found))
    assert Mounted(tmp_path).look().pairs == ["suspects.jsonl"]
    assert pairs_module.read_report(path).suspects == [pairs_module.Suspect("q0", "A", "B", 0.99)]


def test_data_files_that_differ_in_their_ending_share_nothing(mount: Path, client: TestClient) -> None:
    folder = mount / "faq"
    first, second = all_pairs(state_of(client))[:2]
    decide(client, first, action="drop", side=0)
    (folder / "combine_data.json.decisions.jsonl").rename(folder / "combine_data.decisions.jsonl")  # as it was called
    decide(client, second, action="keep")
    assert [pair["decision"] is not None for pair in all_pairs(state_of(client))[:3]] == [True, True, False]
    other = NAMES | {"data": "faq/combine_data.jsonl"}
    (folder / "combine_data.jsonl").write_bytes(DATA.read_bytes())
    assert not any(pair["decision"] for pair in all_pairs(client.get(STATE, params=other).json()))
    assert [pair["decision"] is not None for pair in all_pairs(state_of(client))[:3]] == [False, True, False]
    written = [client.post(WRITE, json=names).json() for names in (NAMES, other)]
    assert [one["cleaned"] for one in written] == [
        "combine_data.json.cleaned.jsonl", "combine_data.jsonl.cleaned.jsonl",
    ]  # fmt: skip
    assert [one["decisions"] for one in written] == [1, 0]


def test_a_pair_that_is_not_in_the_data_is_not_decided_about(
    mount: Path, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs_module, "FIRST", 1)
    report = mount / "faq" / "similar.json"
    told = json.loads(report.read_text(encoding="utf-8"))
    pairs = told["data"]["mismatched_intents"]
    pairs.append(pairs[0] | {"lineNumbers": [20, 21]})  # beyond those that tell at once
    report.write_text(json.dumps(told), encoding="utf-8")
    strange = next(pair for pair in all_pairs(state_of(client)) if pair["sides"][0]["record"] == 20)
    answer = client.post(DECIDE, json=NAMES | {"pair": strange["key"], "action": "drop", "side": 0})
    assert (answer.status_code, "is not there" in answer.text) == (422, True)


def test_decisions_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    threads = [threading.Thread(target=lambda n=n: [files.append_line(path, {"n": n, "i": i}) for i in range(20)])
               for n in range(8)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((line["n"], line["i"]) for line in lines(path)) == [(n, i) for n in range(8) for i in range(20)]


@pytest.mark.parametrize(("what", "sentence"), [
    ({"action": "burn"}, "action is 'burn', expected one of keep, merge, relabel, drop, undo"),
    ({"action": "drop"}, "side is null, expected 0 (the left question) or 1"),
    ({"action": "drop", "side": True}, "side is true, expected 0"),
    ({"action": "relabel", "side": 0, "intent": "飞行"}, "'飞行' is no intent of faq/combine_data.json"),
    ({"action": "relabel", "side": 0, "intent": "SELF"}, "has the intent"),
    ({"action": "merge", "side": 0, "intent": "更换手机号码"}, "is no intent of"),
    ({"action": "keep", "pair": "0" * 16}, "has no pair"),
    ({"action": "keep", "report": "faq/combine_data.json"}, "the pairs"),
    ({"action": "keep", "data": 3}, "data is 3, expected a text"),
])  # fmt: skip
def test_decisions_that_make_no_sense(client: TestClient, what: dict[str, Any], sentence: str) -> None:
    pair = all_pairs(state_of(client))[0]
    if what.get("intent") == "SELF":
        what = what | {"intent": pair["sides"][0]["intent"]}
    answer = client.post(DECIDE, json=NAMES | {"pair": pair["key"]} | what)
    assert answer.status_code == 422
    assert sentence in answer.json()["error"]["message"]


def test_a_report_about_other_data_is_refused(mount: Path, client: TestClient) -> None:
    (mount / "faq" / "other.jsonl").write_text('{"question": "a", "intent": "b"}\n{"question": "c", "intent": "d"}\n')
    answer = client.get(STATE, params=NAMES | {"data": "faq/other.jsonl"})
    assert "is not about faq/other.jsonl" in answer.json()["error"]["message"]
    assert client.get("/curator?report=faq/similar.json&data=../../etc/passwd").status_code == 404


def test_a_file_of_somebody_else_is_not_replaced(mount: Path, client: TestClient) -> None:
    target = mount / "faq" / "combine_data.json.cleaned.jsonl"
    target.write_text("mine\n")
    decide(client, all_pairs(state_of(client))[0], action="keep")
    answer = client.post(WRITE, json=NAMES)
    assert (answer.status_code, target.read_text()) == (422, "mine\n")
    assert "was not written here" in answer.json()["error"]["message"]


def test_links_are_not_written_through(mount: Path, client: TestClient) -> None:
    outside = mount.parent / "outside.jsonl"
    outside.write_text("mine\n")
    for name in (
        "combine_data.json.decisions.jsonl",
        "combine_data.json.cleaned.jsonl",
        "combine_data.json.changes.json",
    ):
        (mount / "faq" / name).symlink_to(outside)
    pair = all_pairs(state_of(client))[0]
    assert client.post(DECIDE, json=NAMES | {"pair": pair["key"], "action": "keep"}).status_code == 422
    assert client.post(WRITE, json=NAMES).status_code == 422
    assert outside.read_text() == "mine\n"
