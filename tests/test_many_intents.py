"""Many questions with many intents: what is computed by parts is what a plain computation gives, in bounded memory."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from faq import prepare, score
from llmops.console import UserError
from llmops.embedding.ngrams import NgramRows, ngram_vectors
from llmops.intents import classifiers, neighbours, retrieval
from llmops.intents.candidate_lists import CandidateLists
from llmops.intents.catalog import Catalog, load_catalog, wording_of
from llmops.intents.classifiers import Asked, Classifiers
from llmops.intents.neighbours import Neighbours
from llmops.intents.retrieval import Features, largest, nearest

MIB = 1 << 20
WORDS = ["refund", "card", "退款", "invoice", "late", "transfer", "pin", "top up", "abroad", "fee", "lost", "limit"]


def texts(count: int, seed: int = 0) -> list[str]:
    """Made-up questions, none twice."""
    draw = Random(seed)
    return [f"{' '.join(draw.choices(WORDS, k=4))} {number}" for number in range(count)]


def asked(count: int, intents: int, variants: int | None = None) -> list[Asked]:
    """Questions with their intents in turn; every tenth once more as 不符合 to a list that lacks its intent."""
    found = []
    for k, text in enumerate(texts(count)):
        variant = None if variants is None else k % variants
        found.append(Asked(text, f"i{k % intents}", variant, k + 1))
    return found + [Asked(one.question, "不符合", one.variant, one.line) for one in found[::10]]


def catalog_of(intents: int, lists: int = 0, size: int = 3) -> Catalog:
    """A catalog; list k holds the intents from k on."""
    names = {f"i{k}": "" for k in range(intents)}
    found = [[f"i{(k + n) % intents}" for n in range(size)] for k in range(lists)]
    return Catalog("auto", wording_of("auto"), names, lists=found)


def peak(work: Callable[[], Any]) -> float:
    """MiB that are allocated at once, at most, beside what there is before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


def test_nearest_by_parts_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    known, rows = draw.normal(size=(90, 8)).astype(np.float32), draw.normal(size=(25, 8)).astype(np.float32)
    labels = draw.permutation(np.arange(90) % 7)
    own = [*range(20), -1, -1, 3, 89, 0]
    cosines = rows @ known.T
    cosines[[k for k, number in enumerate(own) if number >= 0], [number for number in own if number >= 0]] = -1
    expected = np.stack([cosines[:, labels == k].max(1) for k in range(7)], 1)
    for at_once, most in ((512, 32768), (4, 20), (4, 1)):
        monkeypatch.setattr(retrieval, "COMPARED_AT_ONCE", at_once)
        monkeypatch.setattr(retrieval, "KNOWN_AT_ONCE", most)
        for places in (np.arange(90), labels.argsort(kind="stable")):  # in any order, and in that of the classes
            mine = [int((places == number).nonzero()[0][0]) if number >= 0 else -1 for number in own]
            assert nearest(rows, known[places], labels[places], mine) == pytest.approx(expected, abs=1e-6)


def test_the_largest_are_those_of_a_stable_sort() -> None:
    draw = Random(3)
    for count in (1, 3, 9, 40):
        values = np.array([draw.randrange(6) for _ in range(40)], np.float32)
        assert largest(values, count) == (-values).argsort(kind="stable")[:count].tolist()


def test_ngrams_without_zeros_are_the_same_rows() -> None:
    found = [*texts(1100), "", "!!", "\0", "aaaa" * 40]
    dense, rows = ngram_vectors(found), NgramRows(found)
    assert rows.shape == dense.shape
    assert (rows[500:] == dense[500:]).all()
    assert (rows[np.array([7, 1103, 7])] == dense[[7, 1103, 7]]).all()


def test_a_row_with_a_short_list_is_compared_with_its_candidates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog, train = catalog_of(40, 40), asked(400, 40, 40)
    tests = [Asked(text, f"i{k}", k % 40 if k % 3 else None) for k, text in enumerate(texts(50, 1))]
    found = Neighbours(Classifiers(train, catalog, Features(None)))
    vectors = ngram_vectors([one.question for one in tests])
    cut = found.threshold()
    whole = found.answers(vectors, tests, cut)
    monkeypatch.setattr(neighbours, "LARGEST_COMPARED", 0)
    assert found.threshold() == pytest.approx(cut, abs=1e-6)  # all 440 rows are judged, by their lists
    for one, other in zip(found.answers(vectors, tests, cut), whole, strict=True):
        assert one == other | {"probability": pytest.approx(other["probability"], abs=1e-6)}


def test_values_by_parts_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Classifiers(asked(300, 12, 12), catalog_of(12, 12), Features(None))
    plain = found.threshold(found.nearest(found.vectors, leave_out=True))
    monkeypatch.setattr(retrieval, "VALUES_AT_ONCE", 1)
    monkeypatch.setattr(retrieval, "COMPARED_AT_ONCE", 32)
    assert Neighbours(found).threshold() == pytest.approx(plain, abs=1e-6)


def test_figures_of_every_intent_are_counted_once() -> None:
    draw = Random(0)
    rows = [{"reference": f"i{draw.randrange(9)}", "intent": f"i{draw.randrange(11)}"} for _ in range(300)]
    found = score.score(rows, "i10")
    for intent, figures in found["per_intent"].items():
        own = [row for row in rows if row["reference"] == intent]
        right = sum(row["intent"] == intent for row in own)
        assert figures == {"accuracy": round(right / len(own), 4), "questions": len(own)}
    said = sum(row["intent"] == "i10" for row in rows)
    assert said
    assert found["none_of_the_intents"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


def test_comparing_takes_no_memory_of_questions_times_intents(monkeypatch: pytest.MonkeyPatch) -> None:
    """6,000 rows x 3,000 intents are 69 MiB of cosines, which were there three times over."""
    monkeypatch.setattr(retrieval, "VALUES_AT_ONCE", 1)  # the least: COMPARED_AT_ONCE rows
    monkeypatch.setattr(retrieval, "COMPARED_AT_ONCE", 64)
    monkeypatch.setattr(classifiers, "too_large", lambda _features, _classes: True)
    catalog = catalog_of(3000, 3000)
    found = Classifiers(asked(6000, 3000, 3000), catalog, Features(None))
    tests = [Asked(one.question, one.intent, one.variant) for one in asked(600, 300, 3000)]
    vectors = ngram_vectors([one.question for one in tests])

    def work() -> None:
        assert not found.out_of_fold().any()
        assert Neighbours(found).answers(vectors, tests, Neighbours(found).threshold())

    assert peak(work) < 25


def test_lists_are_numbers_in_memory_and_in_the_file(tmp_path: Path) -> None:
    lists = [["a", "b"], ["b", "a"], [], ["b", "c"]]
    catalog = Catalog("auto", wording_of("auto"), {"a": "", "b": "", "c": ""}, lists=lists)
    assert catalog.lists == lists
    assert [catalog.variant_of(one) for one in (["b", "a"], ["c"], ["c"])] == [1, 4, 4]
    path = tmp_path / "intents.json"
    path.write_text(catalog.to_json(), encoding="utf-8")
    assert json.loads(catalog.to_json())["lists"] == [*lists, ["c"]]  # what rows brought has its names
    assert load_catalog(path).lists == [*lists, ["c"]]
    kept = {"candidates": 2, "embedding_model": "", "examples": {}}
    path.write_text(Catalog(**(vars(catalog) | {"retrieval": kept})).to_json(), encoding="utf-8")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["lists"] == [[0, 1], [1, 0], [], [1, 2], [2]]
    assert load_catalog(path).lists == [*lists, ["c"]]
    for wrong in ([[0, 3]], [[-1]], [[0, "a"]], [[True]], [[1 << 40]]):
        path.write_text(json.dumps(written | {"lists": wrong}), encoding="utf-8")
        with pytest.raises(UserError, match=r"is not an intents\.json"):
            load_catalog(path)


def test_a_million_lists_are_megabytes() -> None:
    found = CandidateLists(names=[str(k) for k in range(1000)])

    def work() -> None:
        for k in range(100_000):
            found.append_numbers([k % 1000] * 10)

    assert peak(work) < 10  # of strings in lists they are 140


def test_rows_are_written_as_they_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2,000 rows of 300 candidates each are 14 MiB, which no moment holds; nothing stays of a failure."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": text, "intent": f"i{k % 300} {'x' * 20}"} for k, text in enumerate(texts(2000))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "out"
    argv = ["--data_file", str(data), "--output_dir", str(out)]
    assert peak(lambda: prepare.main(argv)) < 8
    assert (out / "train.jsonl").stat().st_size > 12 * MIB
    written = (out / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(capsys.readouterr().out)["train"] == len(written)
    assert sorted(path.name for path in out.iterdir() if path.name.endswith(".new")) == []
