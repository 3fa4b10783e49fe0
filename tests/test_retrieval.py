"""faq/prepare --candidates K: lists by similarity, in rows and for bare questions; against counting in the files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_jsonl
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from faq import predict, prepare
from faq.retrieval import lists_of
from llmops.embedding.ngrams import ngram_vectors
from llmops.intents.catalog import COSINE, JOINT, load_catalog
from llmops.intents.linear import FOLDS, STRENGTH
from llmops.intents.retrieval import LINEAR_WEIGHT, Retriever, candidates_of, retriever_of

THINGS = ["退款", "物流", "发票", "密码", "优惠券", "地址", "积分", "会员", "安装", "维修"]
ACTS = ["怎么办理{}", "{}要多久", "取消{}", "{}在哪里看"]
INTENTS = [act.format(thing) for thing in THINGS for act in ACTS]
FORMS = ["请问{}", "{}呢", "我想{}", "帮我看看{}", "{}可以吗", "急，{}"]
Row = dict[str, Any]


def records(intents: list[str], count: int = 6) -> list[Row]:
    """Questions of each intent."""
    return [{"question": form.format(intent), "intent": intent} for intent in intents for form in FORMS[:count]]


def prepared(folder: Path, rows: list[Row], *arguments: str) -> tuple[list[Row], list[Row]]:
    """(training rows, test rows)."""
    data = write_jsonl(folder / "data.jsonl", [])
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert prepare.main(["--data_file", str(data), "--output_dir", str(folder / "out"), *arguments]) == 0
    train, test = (
        [json.loads(line) for line in (folder / "out" / name).read_text(encoding="utf-8").splitlines()]
        for name in ("train.jsonl", "test.jsonl")
    )
    return train, test


def test_rows_list_what_is_similar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = prepared(tmp_path, records(INTENTS), "--candidates", "7", "--test_ratio", "0.3")
    printed = json.loads(capsys.readouterr().out)
    catalog = load_catalog(tmp_path / "out" / "intents.json")
    assert catalog.retrieval["candidates"] == 7
    held, right = 0, 0
    for row in [*train, *test]:
        listed = catalog.candidates(row["variant"])
        assert len(listed) == 7
        assert listed == [intent for intent in catalog.intents if intent in listed]  # in the order of all
        assert "\n".join(listed) in row["messages"][0]["content"]
        assert row["messages"][-1]["content"] == row["intent"]
    for row in train:
        assert row["intent"] == "不符合" or row["intent"] in catalog.candidates(row["variant"])
    plain = {row["question"]: row["intent"] for row in test if row["intent"] != "不符合"}
    for row in test:
        listed = catalog.candidates(row["variant"])
        if row["intent"] == "不符合":
            assert plain[row["question"]] not in listed
        else:
            held, right = held + 1, right + (row["intent"] in listed)
    assert printed["recall"] == round(right / held, 4)
    assert printed["recall"] > 0.8
    dropped = sum(row["intent"] == "不符合" for row in train)
    assert dropped == round(0.1 * (len(train) - dropped))
    # a bare question gets the list of its row
    rows = [row for row in test if row["intent"] != "不符合"]
    found = candidates_of(catalog, [row["question"] for row in rows], retriever_of(catalog))
    assert [catalog.candidates(k) for k, _ in found] == [catalog.candidates(row["variant"]) for row in rows]


def test_candidates_are_shown_with_their_most_similar_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand: of each intent the question that shares most with the one asked; never that question itself."""
    rows = [
        {"question": question, "intent": intent}
        for intent, questions in {
            "card_lost": ["I lost my card", "my card is gone", "I lost my card yesterday"],
            "pin": ["I forgot my pin", "change the pin code", "what is my pin"],
            "rate": ["which rate do I get", "exchange rate today", "is the rate fixed"],
        }.items()
        for question in questions
    ]
    asked = write_jsonl(tmp_path / "asked.jsonl", [])
    asked.write_text('{"question": "is my card lost", "intent": "card_lost"}\n', encoding="utf-8")
    train, test = prepared(
        tmp_path, rows, "--candidates", "2", "--candidate_examples", "1", "--test_data_file", str(asked),
        "--out_of_scope_ratio", "0",
    )  # fmt: skip
    prompts = {row["question"]: row["messages"][0]["content"] for row in [*train, *test]}
    assert "Which intent does the question have?" in prompts["what is my pin"]  # no Chinese character in the data
    assert "\ncard_lost (I lost my card yesterday)\n" in prompts["I lost my card"]
    assert "\ncard_lost (I lost my card)\n" in prompts["I lost my card yesterday"]
    assert "\ncard_lost (I lost my card)\n" in prompts["is my card lost"]
    for question, prompt in prompts.items():
        assert prompt.count(" (") == 2
        assert f"({question})" not in prompt
    catalog = load_catalog(tmp_path / "out" / "intents.json")
    for row in train:  # the most similar intent comes first, whatever its number
        texts = [(name.replace("_", " "), name) for name in catalog.intents]
        texts += [(other["question"], other["intent"]) for other in train if other is not row]
        vectors = ngram_vectors([row["question"], *(text for text, _ in texts)])
        nearest = int((vectors[1:] @ vectors[0]).argmax())
        assert catalog.candidates(row["variant"])[0] == texts[nearest][1]
    # a bare question is asked as its row is
    found = candidates_of(catalog, [row["question"] for row in test], retriever_of(catalog))
    for row, (variant, shown) in zip(test, found, strict=True):
        assert catalog.prompt(row["question"], variant, shown) == row["messages"][:1]


def test_random_order_is_a_questions_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every place has the right intent about as often, and a bare question is asked as its row is."""
    train, test = prepared(
        tmp_path, records(INTENTS), "--candidates", "4", "--candidate_examples", "1", "--candidate_order", "random",
        "--test_ratio", "0.3", "--out_of_scope_ratio", "0",
    )  # fmt: skip
    catalog = load_catalog(tmp_path / "out" / "intents.json")
    assert catalog.retrieval["order"] == "random"
    places = [catalog.candidates(row["variant"]).index(row["intent"]) for row in train]
    assert all(places.count(k) > 0.15 * len(train) for k in range(4))
    found = candidates_of(catalog, [row["question"] for row in test], retriever_of(catalog))
    for row, (variant, shown) in zip(test, found, strict=True):
        assert catalog.prompt(row["question"], variant, shown) == row["messages"][:1]


def test_a_linear_classifier_helps_to_find_candidates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against scikit-learn called here: log probabilities beside cosines; unseen ones of known questions."""
    examples = {intent: [form.format(intent) for form in FORMS] for intent in INTENTS[:6]}
    plain, both = Retriever(examples, ""), Retriever(examples, "", JOINT)
    texts = [text for questions in examples.values() for text in questions]
    labels = np.repeat(np.arange(6), len(FORMS))
    asked = ["退款多久能到", texts[8]]
    vectors = ngram_vectors(asked)
    model = LogisticRegression(C=STRENGTH).fit(ngram_vectors(texts), labels)
    logs = model.predict_log_proba(vectors)
    assert np.allclose(both.scores(asked, vectors), plain.scores(asked, vectors) + LINEAR_WEIGHT * logs, atol=1e-5)
    alone = plain.scores(asked, vectors, itself=False)
    assert alone[1].max() < 0.999  # not compared with itself
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(texts, labels)
    seen = next(seen for seen, unseen in folds if 8 in unseen)
    unseen = LogisticRegression(C=STRENGTH).fit(ngram_vectors([texts[k] for k in seen]), labels[seen])
    logs[1] = unseen.predict_log_proba(vectors[1:])[0]
    assert np.allclose(both.scores(asked, vectors, itself=False), alone + LINEAR_WEIGHT * logs, atol=1e-5)


def test_the_better_ranking_is_chosen_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wording that crosses intents: the nearest question belongs to another intent, and one word tells them apart."""
    words = {"refund": "退", "invoice": "票", "address": "址"}
    rows = [
        {"question": f"{form}{word}{form[::-1]}", "intent": intent}
        for form in ("请问一下怎么办", "麻烦帮我看看", "这个可以吗呢", "我想要了解下", "急急急快一点", "你好在吗客服")
        for intent, word in words.items()
    ]
    train, _ = prepared(tmp_path, rows, "--candidates", "2", "--test_ratio", "0.2")
    said = capsys.readouterr().err
    catalog = load_catalog(tmp_path / "out" / "intents.json")
    assert catalog.retrieval["ranked_by"] == JOINT
    assert "candidates are found by similarity and a linear classifier" in said
    examples = catalog.retrieval["examples"]
    ranks = {}
    for kind in (COSINE, JOINT):
        retriever = Retriever(examples, "", kind)
        found = [
            retriever.ranked([text], ngram_vectors([text]), 2, itself=False)[0]
            for questions in examples.values()
            for text in questions
        ]
        truth = [k for k, questions in enumerate(examples.values()) for _ in questions]
        ranks[kind] = np.mean([1 / (f.index(t) + 1) if t in f else 0 for t, f in zip(truth, found, strict=True)])
    assert f"mean reciprocal rank {ranks[JOINT]:.3f} on training questions, otherwise {ranks[COSINE]:.3f}" in said
    # what was kept finds the same lists again
    asked = [row["question"] for row in train[:4]]
    assert retriever_of(catalog).linear is not None
    assert [k for k, _ in candidates_of(catalog, asked, retriever_of(catalog))]


def test_lists_by_hand() -> None:
    assert lists_of(5, [5, 2, 9], 2, learned=True, dropped=True) == [(True, [5, 2]), (False, [2, 9])]
    assert lists_of(4, [5, 2, 9], 2, learned=True, dropped=False) == [(True, [5, 4])]
    assert lists_of(4, [5, 2, 9], 2, learned=False, dropped=True) == [(True, [5, 2]), (False, [5, 2])]
    assert lists_of(-1, [5, 2, 9], 2, learned=True, dropped=True) == [(True, [5, 2])]
    assert lists_of(1, [1, 0], 2, learned=True, dropped=True) == [(True, [1, 0]), (False, [0])]  # all there are


def test_two_thousand_intents(tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoints: dict[str, Path]) -> None:
    """Prompts stay short, and a model answers a bare question among its candidates."""
    many = [f"{intent}第{k}号" for k in range(50) for intent in INTENTS]
    train, _ = prepared(tmp_path, records(many, 2), "--candidates", "10", "--test_ratio", "0.5")
    assert json.loads(capsys.readouterr().out)["intents"] == 2000
    assert max(len(row["messages"][0]["content"]) for row in train) < 400  # all 2,000 names have 20,000 characters
    asked = ["请问怎么办理退款第3号", "取消会员第49号呢"]
    arguments = [value for text in asked for value in ("--question", text)]
    intents = str(tmp_path / "out" / "intents.json")
    assert predict.main(["--model_name_or_path", str(checkpoints["llama"]), "--intents_file", intents, *arguments]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    catalog = load_catalog(Path(intents))
    for row, (number, _) in zip(found, candidates_of(catalog, asked, retriever_of(catalog)), strict=True):
        assert row["variant"] == number
        assert row["intent"] in catalog.answers(number)
        assert row["runner_up"]["intent"] in catalog.answers(number)
    assert asked[0][2:] in catalog.candidates(found[0]["variant"])


def test_one_question_an_intent(tmp_path: Path) -> None:
    test = write_jsonl(tmp_path / "test.jsonl", [])
    test.write_text('{"question": "退款怎么办", "intent": "取消退款"}\n', encoding="utf-8")
    train, rows = prepared(tmp_path, records(INTENTS, 1), "--candidates", "5", "--test_data_file", str(test))
    assert len(train) == 44
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["--candidates", "0"], "--candidates is 0, expected all or a number from 2"),
        (["--candidates", "1"], "--candidates is 1, expected all or a number from 2"),
        (["--candidates", "some"], "--candidates is some, expected all or a number"),
        (["--candidates", "41"], "--candidates is 41 and there are 40 intents"),
        (["--candidate_order", "random"], "give their number with --candidates"),
        (["--embedding_model", "x"], "give their number with --candidates"),
        (["--candidates", "5", "--embedding_model", "/no/model"], "the model folder /no/model does not exist"),
        (["--candidates", "5", "--data_file", "MESSAGES"], "brings its own candidates or prompts"),
        (["--candidates", "5", "--test_data_file", "OTHER"], "have intents that no training question has"),
    ],
)
def test_wrong_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], phrase: str) -> None:
    made = {
        "DATA": records(INTENTS), "OTHER": [{"question": "下雨吗", "intent": "天气"}],
        "MESSAGES": [
            {"messages": [{"role": "user", "content": f"{k}"}, {"role": "assistant", "content": f"{k % 3}"}]}
            for k in range(9)
        ],
    }  # fmt: skip
    for name, rows in made.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
    given = [str(tmp_path / argument) if argument in made else argument for argument in arguments]
    data = ["--data_file", str(tmp_path / "DATA")] if "--data_file" not in given else []
    assert prepare.main([*data, *given, "--output_dir", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert phrase in printed.err
    assert printed.out == ""
    assert not (tmp_path / "out").exists()
