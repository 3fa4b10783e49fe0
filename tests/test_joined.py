"""The tuned model and the linear classifier together: their weights, what is advised, what prediction answers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from embedding_model import write_embedding_model
from test_baselines import INTENTS, questions, write, write_catalog

from faq import baselines, predict, score
from faq.joined import join
from llmops import translation
from llmops.embedding.folder import read_folder
from llmops.intents.catalog import Catalog, load_catalog, wording_of
from llmops.intents.classifiers import Asked, Classifiers
from llmops.intents.joined import logs_of, open_joint, probabilities
from llmops.intents.retrieval import Features

KEPT = {"candidates": 3, "shown": 2, "order": "random", "ranked_by": "cosine", "embedding_model": "", "examples": {}}


@pytest.fixture
def train_file(tmp_path: Path) -> str:
    """Some mislabelled training questions: the classifiers are not perfect."""
    wrong = list(INTENTS)
    return write(
        tmp_path / "train.jsonl",
        [{"question": q, "intent": wrong[k % 3] if k % 2 else i} for k, (q, i) in enumerate(questions()[:40])],
    )


def test_two_classifiers_that_know_different_things_are_better_together() -> None:
    """One tells the first half of the classes apart, the other the second; a useless one gets no weight."""
    draw = np.random.default_rng(3)
    classes = [str(k) for k in range(6)]
    truth = draw.integers(0, 6, 600)
    linear, rows = np.full((600, 6), 0.1), []
    for i, true in enumerate(truth):
        if true < 3:
            linear[i, true] = 0.5
        else:
            linear[i, 3:] = 1 / 6
        linear[i] /= linear[i].sum()
        other = (true + 1) % 3 if true < 3 else 3 + (true + 1) % 3
        said, p = (true, 0.6) if true >= 3 or draw.random() < 0.34 else (other, 0.3)
        runner = {"intent": str(other if said == true else true), "probability": 0.25}
        rows.append({"intent": str(said), "reference": str(true), "probability": p, "runner_up": runner})
    both, weights, again = join(rows, linear, classes, "5")
    right = np.mean([row["intent"] == row["reference"] for row in both])
    assert right > max((linear.argmax(1) == truth).mean(), np.mean([r["intent"] == r["reference"] for r in rows]))
    assert right > 0.95
    assert min(weights[:2]) > 0.1
    logs, names = logs_of(rows, linear, classes, "5")  # by the weights as they are kept
    by_hand = probabilities(np.array(weights), logs)
    assert [row["intent"] for row in again] == [names[k] for k in by_hand.argmax(1)]
    assert [row["probability"] for row in again] == pytest.approx(by_hand.max(1), abs=1e-6)
    noise = [{"intent": str(draw.integers(6)), "reference": row["reference"], "probability": 0.9} for row in rows]
    assert join(noise, linear, classes, "5")[1][0] < 0.05
    linear[:, 0] = -1  # a candidate that is in no list is not answered
    assert "0" not in {row["intent"] for row in join(rows, linear, classes, "5")[0]}


def test_the_none_answer_is_as_frequent_as_in_the_test() -> None:
    """A classifier that learned from 10% without an intent, asked 50%: by Bayes' rule its odds grow 9 times."""
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 2, 4000)  # 1: no intent
    seen = draw.normal(2.0 * truth)
    odds = np.exp(2.0 * seen - 2.0) / 9  # of the two densities, times the odds of training
    linear = np.stack([1 / (1 + odds), odds / (1 + odds)], 1)
    names = ["a", "none"]
    rows = [
        {
            "intent": "a",
            "reference": names[k],
            "probability": 0.5,
            "runner_up": {"intent": "none", "probability": 0.5},
        }
        for k in truth
    ]
    both, (_, weight, offset), _ = join(rows, linear, names, "none")
    assert weight == pytest.approx(1, abs=0.1)
    assert offset == pytest.approx(np.log(9), abs=0.2)
    right = np.mean([row["intent"] == row["reference"] for row in both])
    assert right == pytest.approx(0.841, abs=0.02)  # the normal distribution at 1: nobody can do better
    assert right > np.mean(linear.argmax(1) == truth) + 0.05
    known = truth == 0  # where nothing is asked that has no intent, nothing is known of how often that comes
    assert join([row for row, one in zip(rows, known, strict=True) if one], linear[known], names, "none")[1][2] == 0


def test_both_together_are_advised_when_they_are_better_than_each() -> None:
    """Counted by hand: 9 questions that one way alone has right, against 2, are 7 > 2 * sqrt(11); 8 and 2 are not."""
    theirs = [True] * 2 + [False] * 9 + [True] * 89
    ours = [False] * 2 + [True] * 9 + [True] * 89
    assert baselines.beyond_chance(ours, theirs) == 1
    assert baselines.beyond_chance(theirs, ours) == -1
    assert baselines.beyond_chance([False, *ours[1:10], False, *ours[11:]], theirs) == 0
    rows = [{"intent": "a" if right else "b", "reference": "a"} for right in theirs]
    best = baselines.Baseline("linear classifier", "n-grams", rows, 0.1)
    figures = {"accuracy": 0.91, "seconds_per_question": 0.001}
    alone = [False] * 30 + [True] * 70
    found = baselines.advice(alone, best, figures, ours)
    assert found.startswith("Use the tuned model and the linear classifier together (--join true): their 98.0% are")
    assert baselines.advice(alone, best, figures, theirs).startswith("Use the linear classifier on n-grams (91.0%")
    assert baselines.advice(alone, best, figures).endswith("so it is not worth its training here.")


def test_the_best_way_is_named_in_both_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is: on features or none, with the seconds that it takes or without."""
    rows = [{"intent": "a", "reference": "a"}] * 10
    figures = {"accuracy": 1.0, "seconds_per_question": 0.002}
    for name, features, seconds, english, chinese in (
        ("linear classifier", "character n-grams", 0.02, "the linear classifier on character n-grams (100.0%, in 2 ms "
         "a question)", "线性分类器（字符 n-gram，100.0%，每个问题 2 毫秒）"),
        ("nearest neighbour", "all-MiniLM-L6-v2", 0.02, "the nearest neighbour on all-MiniLM-L6-v2 (100.0%, in 2 ms a "
         "question)", "最近邻（all-MiniLM-L6-v2，100.0%，每个问题 2 毫秒）"),
        ("untuned model", "the same prompts", None, "the untuned model on the same prompts (100.0%)",
         "未微调的模型（同样的提示词，100.0%）"),
        ("most frequent intent", "", 0.0, "the most frequent intent (100.0%)", "最常见的意图（100.0%）"),
    ):  # fmt: skip
        best = baselines.Baseline(name, features, rows, seconds)
        assert baselines.named(best, figures) == english
        for right in ([True] * 10, [False] * 10):
            assert f"建议用{chinese}：" in translation.in_chinese(baselines.advice(right, best, figures))


def test_several_orders_are_named_where_they_may_help() -> None:
    """A model that was asked in one random order and is no more than the measured 10.7 points below the best."""
    rows = [{"intent": "a", "reference": "a"}] * 100
    best = baselines.Baseline("linear classifier", "n-grams", rows[:88] + [{"intent": "b", "reference": "a"}] * 12, 0.1)
    random, model = Catalog("auto", wording_of("auto"), INTENTS, retrieval=KEPT), {"intent": "a", "orders": 1}
    far, near, same, above = ([True] * count + [False] * (100 - count) for count in (77, 78, 90, 100))

    def told(right: list[bool], *joined: bool, catalog: Catalog = random, **more: object) -> str:
        return baselines.more_orders([model | more] * 100, right, best, joined, catalog)

    assert told(near).startswith("Each question was asked in one order of its candidates: predict.sh --orders 3 asks")
    assert told(near) == told(same)
    two = replace(random, retrieval=KEPT | {"candidates": 2})
    assert "predict.sh --orders 2 asks" in told(near, catalog=two)  # as many as there are candidates
    numbered = replace(random, retrieval=KEPT | {"order": "number"})
    plain = replace(random, retrieval={})
    assert {told(far), told(above), told(near, *[True] * 100)} == {""}
    assert {told(near, catalog=numbered), told(near, catalog=plain)} == {""}
    assert {told(near, orders=3), told(near, model_intent="a")} == {""}


def test_what_is_kept_is_for_the_model_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], train_file: str
) -> None:
    """Probabilities of free text, or of model and classifier joined, are of another kind."""
    intents = tmp_path / "intents.json"
    write_catalog(intents)
    rows = [
        {"question": q, "intent": i, "reference": i, "probability": 0.5 + k / 100, "constrained": True}
        for k, (q, i) in enumerate(questions()[40:])
    ]
    common = ["--intents_file", str(intents), "--keep_threshold", "true"]
    for bad, how in (({"constrained": False}, "--constrain"), ({"model_intent": "退款"}, "--join_file")):
        path = write(tmp_path / "bad.jsonl", [*rows[:-1], rows[-1] | bad])
        assert score.main([path, *common]) == 2
        said = capsys.readouterr().err
        assert f"bad.jsonl:32: made with another {how} than the threshold to keep is for: what the model alone" in said
        assert load_catalog(intents).decision == {}
        assert score.main([path, *common[:2]]) == 0  # scored they can be
    assert score.main([write(tmp_path / "good.jsonl", rows), *common]) == 0
    assert load_catalog(intents).decision["threshold"] > 0
    # of joined predictions the model's own answers are what the model has right
    wrong = next(name for name in INTENTS if name != rows[0]["reference"])
    joined = write(tmp_path / "joined.jsonl", [row | {"model_intent": wrong} for row in rows])
    capsys.readouterr()
    assert score.main([joined, *common[:2], "--train_file", train_file]) == 0
    own = np.mean([row["reference"] == wrong for row in rows])
    assert f"the model alone ({own:.1%})" in json.loads(capsys.readouterr().out)["recommendation"]


def test_joined_predictions(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: dict[str, Path],
) -> None:
    """A model that knows nothing and a classifier: what score keeps is what predict answers."""
    train = write(tmp_path / "train.jsonl", [{"question": q, "intent": i} for q, i in questions()[:40]])
    asked = write(tmp_path / "asked.jsonl", [{"question": q, "intent": i} for q, i in questions()[40:]])
    intents = tmp_path / "intents.json"
    write_catalog(intents)
    common = ["--model_name_or_path", str(checkpoints["llama"]), "--intents_file", str(intents), "--input_file", asked]
    alone, both = str(tmp_path / "alone.jsonl"), str(tmp_path / "both.jsonl")
    assert predict.main([*common, "--join_file", train]) == 2
    assert "--join_file needs weights in the intents file" in capsys.readouterr().err
    assert predict.main([*common, "--output_file", alone]) == 0
    kept = ["--intents_file", str(intents), "--train_file", train, "--keep_threshold", "true", "--join", "true"]
    assert score.main([alone, *kept, "--automate", "0.8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["joined"]["accuracy"] > found["results"][0]["accuracy"] + 0.3
    assert predict.main([*common, "--output_file", both]) == 2
    assert "pass --join_file" in capsys.readouterr().err
    assert predict.main([*common, "--use_threshold", "false", "--output_file", str(tmp_path / "alone.jsonl")]) == 0
    plain = [json.loads(line) for line in (tmp_path / "alone.jsonl").read_text(encoding="utf-8").splitlines()]
    assert not any("proposed" in row or "model_intent" in row for row in plain)
    assert predict.main([*common, "--use_threshold", "false", "--join_file", train, "--output_file", both]) == 2
    assert "leave out --join_file" in capsys.readouterr().err
    assert predict.main([*common, "--join_file", train, "--output_file", both]) == 0
    rows = score.read_predictions(Path(both))
    assert np.mean([row["proposed"] == row["reference"] for row in rows]) == pytest.approx(
        found["joined"]["accuracy"], abs=0.1
    )
    # other questions, or the same with other intents, are not those of the weights; their order does not matter
    learned = [{"question": q, "intent": i} for q, i in questions()[:40]]
    for others in (learned[:-1], [*learned[:-1], learned[-1] | {"intent": learned[0]["intent"]}]):
        other = write(tmp_path / "other.jsonl", others)
        assert predict.main([*common, "--join_file", other, "--output_file", str(tmp_path / "no.jsonl")]) == 2
        assert "faq/score used another --embedding_model or other questions" in capsys.readouterr().err
    catalog = load_catalog(intents)
    assert open_joint(catalog, write(tmp_path / "other.jsonl", learned[::-1]), "").weights[1] > 0
    del catalog.decision["learned"]  # kept before there was such a name
    assert open_joint(catalog, write(tmp_path / "other.jsonl", learned[:-1]), "").weights[1] > 0
    joint = open_joint(catalog, train, "")
    texts, variants = [row["question"] for row in plain], [None] * len(plain)
    whole = joint.join(plain, texts, catalog, variants)
    sizes, values = list[int](), joint.values
    monkeypatch.setattr("llmops.intents.joined.ROWS_AT_ONCE", 7)
    monkeypatch.setattr(joint, "values", lambda asked, *more: sizes.append(len(asked)) or values(asked, *more))
    assert joint.join(plain, texts, catalog, variants) == whole
    assert sizes == [7, 7, 7, 7, 4]
    sure = [row for row in rows if row["intent"] != "不符合"]
    assert len(sure) == int(0.8 * len(rows))  # the threshold belongs to the weights that are kept
    assert all(row["reply"] == "好的" for row in sure)
    assert [row["model_intent"] for row in rows] == [row["intent"] for row in score.read_predictions(Path(alone))]


def test_what_is_learned_has_a_name(tmp_path: Path) -> None:
    """Of questions with their intents and of the model's contents, not of its folder or the questions' order."""
    train = [Asked(q, i, None, k) for k, (q, i) in enumerate(questions()[:20], 1)]
    catalog = Catalog("auto", wording_of("auto"), INTENTS)
    folders = [write_embedding_model(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    folders.append(Path(shutil.copytree(folders[0], tmp_path / "c")))
    a, b, c = (Classifiers(train, catalog, Features(read_folder(folder))) for folder in folders)
    assert a.inputs.shape == b.inputs.shape
    plain, turned = (Classifiers(asked, catalog, Features(None)) for asked in (train, train[::-1]))
    assert a.digest == c.digest
    assert plain.digest == turned.digest
    assert len({a.digest, b.digest, plain.digest}) == 3
