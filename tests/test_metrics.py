"""Metrics agree with independent sources: sacrebleu, rouge_score, the official scripts' rules written anew, by hand."""

import itertools
import math
import random
import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import sacrebleu
from conftest import DEMO, read_messages
from rouge_score.rouge_scorer import RougeScorer

from eval import metrics

SHORT = ["是", "A", "2019年", "三天", "?", "3.14", "上海市", "the", "-5", "《三体》", "Paris", "“", "GPT-4模型"]


def chinese_texts() -> list[str]:
    """Chinese sentences of the demo data."""
    messages = [m["content"] for c in read_messages(DEMO / "train.jsonl") for m in c]
    return [text for text in dict.fromkeys(messages) if re.search("[\u4e00-\u9fff]", text)]


def english_texts() -> list[str]:
    """English sentences made of words, numbers and punctuation."""
    draw = random.Random(3)
    text = "the model costs 3.14 dollars, but it's a well-known (and 1,000 times faster) one: why? I don't know!"
    words = text.split()
    return [" ".join(draw.choices(words, k=draw.randrange(1, 15))) + draw.choice(["", ".", "!"]) for _ in range(120)]


def corrupted(text: str, draw: random.Random) -> str:
    """A text with some characters dropped, doubled or moved: partly right."""
    parts = re.findall(r"[A-Za-z0-9.,'-]+|.", text)
    kept = [part for part in parts if draw.random() > 0.25]
    if len(kept) > 3 and draw.random() < 0.5:
        cut = draw.randrange(len(kept))
        kept = kept[cut:] + kept[:cut]
    return "".join(kept)


@pytest.mark.parametrize(
    ("text", "ours", "theirs", "tokenizer"),
    [
        *((f"a{mark}b", f"a{mark}b", f"a {mark} b", "zh") for mark in "℃①Ⅱ→≥€"),
        *((f"a{mark}b", f"a {mark} b", f"a{mark}b", "zh") for mark in "カの\u4db6\u9fbc\U00020000"),
        ("共 3.", "共 3 .", "共 3.", "zh"),
        ("a 3.", "a 3 .", "a 3 .", "13a"),
        ("&lt;a&amp;b", "& lt ; a & amp ; b", "< a & b", "13a"),
        ("a<skipped>b", "a < skipped > b", "ab", "13a"),
        ("a-\nb", "a- b", "ab", "13a"),
        ("中文“a”", "中 文 “ a ”", "中文“a”", "13a"),
    ],
)
def test_where_tokens_are_not_sacrebleus(text: str, ours: str, theirs: str, tokenizer: str) -> None:
    """What eval/README.md says of it."""
    assert " ".join(metrics.bleu_tokens(text)) == ours
    assert sacrebleu.BLEU(tokenize=tokenizer).tokenizer(text) == theirs


@pytest.mark.parametrize("tokenizer", ["zh", "13a"])
def test_bleu_is_sacrebleus(tokenizer: str) -> None:
    """200 pairs, one and two references, full, partial and no overlap: equal to sacrebleu's sentence score."""
    draw = random.Random(0)
    texts = chinese_texts() if tokenizer == "zh" else english_texts()
    compared = 0
    for _ in range(200):
        true, other = draw.sample(texts, 2)
        prediction = draw.choice([corrupted(true, draw), true, other, true + other])
        if not prediction.strip():
            continue
        references = [true, corrupted(true, draw) + "x"] if draw.random() < 0.4 else [true]
        expected = sacrebleu.sentence_bleu(
            prediction, references, smooth_method="exp", tokenize=tokenizer, use_effective_order=True
        ).score
        assert metrics.bleu(prediction, references) == pytest.approx(expected / 100, abs=1e-9), (prediction, references)
        compared += 1
    assert compared > 190


def test_bleu_by_hand() -> None:
    """Unigrams 3/4, bigrams 1/3, no trigram (1/2 of 1/2), no 4-gram (1/4 of 1/1); lengths are equal."""
    expected = math.exp(0.25 * sum(math.log(p) for p in (3 / 4, 1 / 3, 1 / 4, 1 / 4)))
    assert metrics.bleu("今天下雨", ["今天落雨"]) == pytest.approx(expected)
    assert metrics.bleu("三天", ["三天半"]) == pytest.approx(math.exp(1 - 3 / 2))  # only the brevity penalty
    assert metrics.bleu("", ["三天"]) == metrics.bleu("四", ["三天"]) == 0
    assert metrics.best_bleu("三天", ["两年", "三天"]) == 1


def all_scores(prediction: str, reference: str) -> dict[str, float]:
    """Every metric of one prediction."""
    found = {name: v for metric in metrics.METRICS.values() for name, v in metric(prediction, [reference]).items()}
    return found | {
        "keywords": metrics.keyword_bleu(prediction, reference) if metrics.split_keywords(reference) else 1.0,
        "cmrc_em": metrics.cmrc_em(prediction, [reference]),
        "cmrc_f1": metrics.cmrc_f1(prediction, [reference]) if metrics.cmrc_tokens(reference) else 1.0,
    }


@pytest.mark.parametrize("text", SHORT)
def test_a_short_right_answer_scores_one(text: str) -> None:
    assert all_scores(text, text) == pytest.approx(dict.fromkeys(all_scores(text, text), 1.0))


def test_right_answers_score_one() -> None:
    for text in chinese_texts()[:150] + english_texts()[:50]:
        assert all_scores(text, text) == pytest.approx(dict.fromkeys(all_scores(text, text), 1.0)), text


def test_no_answer_is_right_where_none_is_the_reference() -> None:
    """As in SQuAD v2.0; every other pair with an empty side is wrong."""
    scored = list(metrics.METRICS.values())
    both, answer, silence = ([v for metric in scored for v in metric(*pair).values()] for pair in (
        ("", [""]), ("a b", [""]), ("", ["a b"])
    ))  # fmt: skip
    assert set(both) == {1.0}
    assert set(answer) == set(silence) == {0.0}
    assert metrics.f1("", ["a", ""]) == metrics.best_bleu("", ["a", ""]) == 1


def test_rouge_of_english_is_rouge_scores_own() -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for one, other in itertools.pairwise(english_texts()):
        expected = {name: score.fmeasure for name, score in scorer.score(other, one).items()}
        if len(metrics.word_tokens(one)) > 1:
            assert metrics.rouge(one, [other]) == pytest.approx(expected), (one, other)


def test_rouge_of_chinese() -> None:
    """By hand; and the two traps of the library's own tokeniser, which gives 0.0 and 1.0 here."""
    found = metrics.rouge("模型GPT很好", ["模型GPT真差"])  # 模 型 gpt shared, of 5 tokens each
    assert found == pytest.approx({"rouge1": 3 / 5, "rouge2": 2 / 4, "rougeL": 3 / 5})
    unrelated = metrics.rouge("今天股市大跌，投资者纷纷离场。", ["猫喜欢睡在窗台上晒太阳。"])
    assert max(unrelated.values()) < 0.1
    texts = chinese_texts()
    draw = random.Random(1)
    pairs = [draw.sample(texts, 2) for _ in range(200)]
    assert np.mean([metrics.rouge(a, [b])["rouge2"] for a, b in pairs]) < 0.1


def test_keywords_have_no_order() -> None:
    reference = "人工智能,芯片,华为,发布会"
    for order in itertools.permutations(reference.split(",")):
        assert metrics.keyword_bleu("、".join(order), reference) == pytest.approx(1)
    partly = {
        round(metrics.keyword_bleu("，".join(order), reference), 9)
        for order in itertools.permutations(["智能", "芯片", "手机", "发布会"])
    }
    assert len(partly) == 1
    assert 0.2 < partly.pop() < 0.9
    # by hand: 芯片 alone is right, of 10 characters: precision 1, brevity exp(1 - 11/2)
    assert metrics.keyword_bleu("芯片", reference) == pytest.approx(math.exp(1 - 11 / 2))
    assert metrics.keyword_bleu("足球", reference) == 0
    # equal ones first, whatever the alphabet says: of 上 海 北 海 上 only the first two characters are missing
    found = [metrics.keyword_bleu(order, "上海,北,海上") for order in ("海上,北", "北,海上")]
    assert found == pytest.approx([math.exp(1 - 5 / 3)] * 2)
    assert metrics.split_keywords(" 李 娜 , 网球,网球;\n") == ["李 娜", "网球"]


def squad_f1(prediction: str, truth: str) -> float:
    """SQuAD v1.1 from its rule, for English."""

    def tokens(text: str) -> list[str]:
        bare = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", bare).split()

    common = Counter(tokens(prediction)) & Counter(tokens(truth))
    same = sum(common.values())
    if same == 0:
        return 0.0
    precision, recall = same / len(tokens(prediction)), same / len(tokens(truth))
    return 2 * precision * recall / (precision + recall)


def test_f1_is_squads() -> None:
    draw = random.Random(2)
    for text in english_texts():
        prediction = corrupted(text, draw)
        if squad_f1(text, text) and squad_f1(prediction, prediction):  # else nothing but articles: see the docstring
            assert metrics.f1(prediction, [text]) == pytest.approx(squad_f1(prediction, text)), (prediction, text)
    assert metrics.f1("在北京市，2008年", ["北京市2008年"]) == pytest.approx(2 * 5 / (6 + 5))
    assert metrics.f1("2019年", ["2018年", "2019 年"]) == 1


def official_cmrc(answers: Sequence[str], prediction: str) -> tuple[float, float]:
    """(F1, EM) from the official script's rule: runs of English by blanks, so for texts without English punctuation."""
    dropped = [*"-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』", "……"]

    def segments(text: str) -> list[str]:
        found, run = [], ""
        for c in text.lower().strip():
            if c in dropped:
                continue
            if "\u4e00" <= c <= "\u9fa5":
                found += [*run.split(), c]
                run = ""
            else:
                run += c
        return found + run.split()

    best = 0.0
    for answer in answers:
        a, p = segments(answer), segments(prediction)
        runs = [n for n in range(1, min(len(a), len(p)) + 1) for i in range(len(a) - n + 1)
                for j in range(len(p) - n + 1) if a[i : i + n] == p[j : j + n]]  # fmt: skip
        if runs:
            precision, recall = max(runs) / len(p), max(runs) / len(a)
            best = max(best, 2 * precision * recall / (precision + recall))
    bare = ["".join(c for c in text.lower().strip() if c not in dropped) for text in answers]
    exact = "".join(c for c in prediction.lower().strip() if c not in dropped) in bare
    return best, float(exact)


def test_cmrc_is_the_official_rule() -> None:
    draw = random.Random(5)
    texts = [re.sub(r"[^\u4e00-\u9fa5A-Za-z0-9 ，。！？《》、-]", "", text)[:30] for text in chinese_texts()]
    texts = [text for text in texts if len(text.strip()) > 1]
    for _ in range(200):
        text = draw.choice(texts)
        answers = [text, corrupted(text, draw), corrupted(text, draw)]
        prediction = draw.choice([text + "。", corrupted(text, draw), draw.choice(texts), "《" + text])
        f1, em = official_cmrc(answers, prediction)
        assert metrics.cmrc_f1(prediction, answers) == pytest.approx(f1), (prediction, answers)
        assert metrics.cmrc_em(prediction, answers) == em
    # by hand: the longest common run is 2008年 of 奥运会2008年 (4 tokens + ...): 2008, 年 = 2 of 5 and 2 of 4
    assert metrics.cmrc_f1("北京2008年", ["奥运会2008年"]) == pytest.approx(2 * 2 / (4 + 5))


def test_exact_match_normalises() -> None:
    for prediction, reference in [
        ("北京。", "北京"), (" Ａ ", "a"), ("“是”", "是"), ("New  York.", "new york"), ("2019 年", "2019年"),
    ]:  # fmt: skip
        assert metrics.accuracy(prediction, [reference]) == 1, prediction
    for prediction, reference in [("-5", "5"), ("3.14", "314"), ("不是", "是"), ("", "是"), ("newyork", "new york")]:
        assert metrics.accuracy(prediction, [reference]) == 0, prediction


def test_summary_by_hand() -> None:
    found = metrics.summary([1, 0, 1, 1] * 25)
    assert found["mean"] == 0.75
    assert found["standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 99))
    low, high = found["interval_95"]
    assert low == pytest.approx(0.75 - 1.96 * 0.0433, abs=0.02)
    assert high == pytest.approx(0.75 + 1.96 * 0.0433, abs=0.02)
    for bad in ([], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="at least one value"):
            metrics.summary(bad)


def test_intervals_of_few_right_answers() -> None:
    """Wilson's interval by its closed forms: all right n / (n + z^2), none z^2 / (n + z^2), and a printed case."""
    z2 = 1.959964**2
    assert metrics.summary([1] * 12)["interval_95"] == pytest.approx([12 / (12 + z2), 1])
    assert metrics.summary([0] * 5)["interval_95"] == pytest.approx([0, z2 / (5 + z2)])
    # 81 of 263: Newcombe 1998, table I, method 3
    assert metrics.summary([1] * 81 + [0] * 182)["interval_95"] == pytest.approx([0.2553, 0.3662], abs=5e-5)
    # equal scores have no spread to draw from: the interval is that of as many right answers, never of no width
    assert metrics.summary([0.75] * 4)["interval_95"] == metrics.summary([1, 1, 1, 0])["interval_95"]
    low, high = metrics.summary([0.3])["interval_95"]
    assert (low, high) == pytest.approx(metrics.wilson(0.3, 1))
    assert (low < 0.03, high > 0.85) == (True, True)
    low, high = metrics.summary([0.5, 0.25] * 50)["interval_95"]  # no proportion: the bootstrap
    assert 0.34 < low < 0.375 < high < 0.41


def test_keyword_f1_and_language_by_hand() -> None:
    assert metrics.keyword_f1("甲，乙、丙", "丙,丁") == pytest.approx(2 / 5)
    assert metrics.keyword_f1("NBA，姚明", "姚明,nba") == 1
    assert metrics.keyword_f1("", "甲") == metrics.keyword_f1("乙", "甲") == 0
    for text, expected in [
        ("图书馆", "zh"), ("GPT是什么", "zh"), ("H2O", "other"), ("Where is 北京?", "zh"), ("12", "other"),
        ("A long English sentence that names 北京 once.", "other"), ("ラーメン", "zh"), ("", "other"),
    ]:  # fmt: skip
        assert metrics.language(text) == expected, text
