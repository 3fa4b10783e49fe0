"""BLEU, ROUGE, accuracy and F1 that are right for Chinese, English and text that mixes them.

Every score of a prediction lies in [0, 1]; against several references the best counts unless said otherwise. A
prediction that equals a reference scores 1 in every metric, also when it is one character long, or empty (as in SQuAD
v2.0, where no answer is the right one).
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from llmops.imports import quick_imports

# what is written without blanks between words: CJK ideographs, kana, full-width forms, CJK punctuation. Together with
# the general punctuation this is what sacrebleu's `zh` takes apart (its own tables reach further by a quirk)
CJK = (
    "\u2e80-\u2fdf\u2ff0-\u303f\u3040-\u30ff\u3100-\u312f\u31a0-\u31ef\u3200-\u33ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"
)
APART = re.compile(f"([{CJK}\u2010-\u2027\u2030-\u205e\u2600-\u27bf])")
CJK_CHARACTER = re.compile(f"[{CJK}]")
# mteval-v13a, as in sacrebleu's tokenizer_re: punctuation apart, but 3.14 and 1,000 whole
WESTERN = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
MAX_ORDER = 4
CONFIDENCE = 0.95
RESAMPLES = 1000


# --- tokens ----------------------------------------------------------------------------------------------------------


def bleu_tokens(text: str) -> list[str]:
    """Chinese per character, the rest as mteval-v13a does; case is kept. Source: sacrebleu's `zh` and `13a`.

    eval/README.md, "What the scores are", lists where they differ.
    """
    text = " " + APART.sub(r" \1 ", text) + " "
    for pattern, replacement in WESTERN:
        text = pattern.sub(replacement, text)
    return text.split()


@lru_cache(maxsize=2**14)
def word_tokens(text: str) -> tuple[str, ...]:
    """Lower case, Chinese per character, otherwise runs of letters and digits; punctuation is dropped.

    For English it is rouge_score's default. A text of nothing but punctuation keeps it: an answer may be a "?".
    """
    lowered = text.lower()
    found = tuple(
        token
        for token in re.findall(f"[{CJK}]|[^\\W_{CJK}]+", lowered)
        if unicodedata.category(token[0])[0] not in "PSZ"
    )
    return found or tuple(lowered.split())


# --- BLEU ------------------------------------------------------------------------------------------------------------


def bleu(prediction: str, references: Sequence[str]) -> float:
    """Sentence BLEU with all references at once, smoothed and of effective order.

    nltk's sentence_bleu; n-gram orders without a match are smoothed geometrically (its method 3, which is NIST's and
    sacrebleu's `exp`), and orders that the prediction is too short for are left out (sacrebleu's effective order), so
    on the same tokens it is sacrebleu's sentence score with `effective_order=True` divided by 100. Source:
    Papineni et al. 2002; Chen & Cherry 2014.
    """
    return _bleu(bleu_tokens(prediction), [bleu_tokens(reference) for reference in references])


@lru_cache(maxsize=1)
def _import_nltk() -> None:
    """Import nltk, which rouge_score does, too, without the classifiers that it would import: over a second."""
    with quick_imports("sklearn", "scipy"):
        import nltk  # noqa: F401


def _bleu(predicted: list[str], references: list[list[str]]) -> float:
    _import_nltk()
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    if not predicted:
        return float(any(not reference for reference in references))
    order = min(MAX_ORDER, len(predicted))
    smooth = SmoothingFunction().method3
    return float(sentence_bleu(references, predicted, weights=(1 / order,) * order, smoothing_function=smooth))


def best_bleu(prediction: str, references: Sequence[str]) -> float:
    """The best of the sentence BLEU scores against each reference by itself."""
    return max(bleu(prediction, [reference]) for reference in references)


def split_keywords(text: str) -> list[str]:
    """Keywords of an answer, without blanks around them, each once: separated by commas, semicolons, 、 or lines."""
    parts = (part.strip(" \t.。:：\"'“”") for part in re.split(r"[,，、;；\n|]+", text))
    return list(dict.fromkeys(part for part in parts if part))


def keyword_bleu(prediction: str, reference: str) -> float:
    """BLEU of predicted keywords against the true ones, whose order carries no meaning.

    Each predicted keyword takes the place of the true one that it is most like (equal ones first, then by shared
    tokens), what is left over follows in alphabetical order; then BLEU of the lists without their commas. Every
    permutation of either side scores the same, and the true keywords in any order score 1.
    """
    true, predicted = sorted(split_keywords(reference)), sorted(split_keywords(prediction))
    tokens = {keyword: bleu_tokens(keyword) for keyword in {*true, *predicted}}
    pairs = sorted(
        ((p, t) for p in predicted for t in true if _overlap(tokens[p], tokens[t]) > 0),
        key=lambda pair: (pair[0] != pair[1], -_overlap(tokens[pair[0]], tokens[pair[1]]), pair),
    )
    place: dict[str, str] = {}
    for p, t in pairs:
        if p not in place and t not in place.values():
            place[p] = t
    ordered = sorted(predicted, key=lambda keyword: (keyword not in place, place.get(keyword, ""), keyword))
    return _bleu([token for p in ordered for token in tokens[p]], [[token for t in true for token in tokens[t]]])


def keyword_f1(prediction: str, reference: str) -> float:
    """F1 of whole keywords as sets, in lower case: how many of the true ones were named, and of the named ones true."""
    true = {keyword.casefold() for keyword in split_keywords(reference)}
    predicted = {keyword.casefold() for keyword in split_keywords(prediction)}
    return 2 * len(true & predicted) / (len(true) + len(predicted)) if true & predicted else 0.0


# --- ROUGE -----------------------------------------------------------------------------------------------------------


class WordTokenizer:
    """`word_tokens` in the shape that rouge_score asks for; its own drops every character that is not a-z or 0-9."""

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text."""
        return list(word_tokens(text))


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    _import_nltk()
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=WordTokenizer())


def rouge(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, each the best over the references.

    rouge_score with a tokeniser for Chinese. Where one side has no bigram, ROUGE-2 is 1 for equal tokens, else 0.
    Source: Lin 2004.
    """
    if not prediction.strip():
        return dict.fromkeys(("rouge1", "rouge2", "rougeL"), float(any(not text.strip() for text in references)))
    found = {}
    scored = [(reference, _rouge_scorer().score(reference, prediction)) for reference in references]
    for name in ("rouge1", "rouge2", "rougeL"):
        found[name] = max(score[name].fmeasure for _, score in scored)
    if len(word_tokens(prediction)) == 1 and any(word_tokens(prediction) == word_tokens(r) for r in references):
        found["rouge2"] = 1.0
    return found


# --- accuracy and F1 -------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """What exact match compares: NFKC, case folded, blanks single and none beside Chinese characters.

    Quotes and brackets around the whole and punctuation at its end are dropped; `3.14` and `-5` keep theirs.
    """
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    text = re.sub(f"(?<=[{CJK}]) | (?=[{CJK}])", "", text)
    stripped = text.strip(" \"'“”‘’「」『』《》").rstrip(" .。!?,、;:…~\"'“”‘’」』》")
    return stripped or text


def accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 when the normalised prediction equals a normalised reference, else 0 (exact match)."""
    return float(normalise(prediction) in {normalise(reference) for reference in references})


ARTICLES = re.compile(r"\b(a|an|the)\b")


@lru_cache(maxsize=2**14)
def f1_tokens(text: str) -> tuple[str, ...]:
    """SQuAD's normalisation (lower case, no punctuation, no a/an/the), Chinese per character, else per blank.

    A text that has nothing but punctuation and articles keeps them.
    """
    lowered = text.lower()
    kept = "".join(
        c for c in lowered if c not in string.punctuation and not (unicodedata.category(c)[0] == "P" and ord(c) > 127)
    )
    kept = re.sub(f"([{CJK}])", r" \1 ", ARTICLES.sub(" ", kept))
    return tuple(kept.split()) or tuple(lowered.split())


def f1(prediction: str, references: Sequence[str]) -> float:
    """Token overlap: harmonic mean of precision and recall of tokens as bags, best over references.

    Source: the SQuAD v1.1 evaluation script (Rajpurkar et al. 2016); per character in Chinese.
    """
    return max(_overlap(f1_tokens(prediction), f1_tokens(reference)) for reference in references)


def _overlap(a: Sequence[str], b: Sequence[str]) -> float:
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b)) if shared else float(not a and not b)


# --- CMRC2018's own --------------------------------------------------------------------------------------------------

# the characters that the official script drops; its two-character ellipsis can equal no single character
CMRC_DROPPED = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")


def cmrc_tokens(text: str) -> list[str]:
    """The official segmentation without punctuation: per Chinese character, word_tokenize between them.

    The script's sentence splitter, which needs a download, is left out: it only matters inside a run of several
    English sentences.
    """
    _import_nltk()
    from nltk.tokenize import NLTKWordTokenizer

    kept = "".join(c for c in text.lower().strip() if c not in CMRC_DROPPED)
    found: list[str] = []
    for part in re.split("([\u4e00-\u9fa5])", kept):
        found += [part] if re.fullmatch("[\u4e00-\u9fa5]", part) else NLTKWordTokenizer().tokenize(part)
    return found


def cmrc_f1(prediction: str, references: Sequence[str]) -> float:
    """CMRC2018's F1: over the longest common run of tokens, best over references. Source: cmrc2018_evaluate.py v5."""
    predicted = cmrc_tokens(prediction)
    best = 0.0
    for reference in map(cmrc_tokens, references):
        run = longest_common_run(reference, predicted)
        best = max(best, 2 * run / (len(predicted) + len(reference)) if run else 0.0)
    return best


def cmrc_em(prediction: str, references: Sequence[str]) -> float:
    """CMRC2018's exact match: equal in lower case without the dropped punctuation."""

    def bare(text: str) -> str:
        return "".join(c for c in text.lower().strip() if c not in CMRC_DROPPED)

    return float(bare(prediction) in {bare(reference) for reference in references})


def longest_common_run(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest run of tokens that both sequences have."""
    best = 0
    above = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else 0)
        best, above = max(best, *row), row
    return best


# --- languages -------------------------------------------------------------------------------------------------------


def language(text: str) -> str:
    """`zh` for a text with at least one Chinese character or kana to four other letters, else `other`."""
    cjk = sum(bool(CJK_CHARACTER.match(c)) for c in text)
    letters = sum(c.isalpha() for c in text)
    return "zh" if cjk and cjk * 5 >= letters else "other"


# --- the table of metrics that a user can name, and summaries --------------------------------------------------------


def rouge_with_headline(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """`Rouge` is ROUGE-L; the other two stand beside it."""
    found = rouge(prediction, references)
    return {"Rouge": found["rougeL"], "rouge1": found["rouge1"], "rouge2": found["rouge2"]}


METRICS: dict[str, Callable[[str, Sequence[str]], dict[str, float]]] = {
    "Acc": lambda prediction, references: {"Acc": accuracy(prediction, references)},
    "F1": lambda prediction, references: {"F1": f1(prediction, references)},
    "BLEU": lambda prediction, references: {"BLEU": best_bleu(prediction, references)},
    "Rouge": rouge_with_headline,
}


def summary(values: Iterable[float], seed: int = 0) -> dict[str, Any]:
    """Mean of per-sample scores, its standard error, and its 95% interval.

    The interval is Wilson's (1927) where every score is 0 or 1, because it holds for few samples and for all right,
    too; otherwise the percentile bootstrap. That knows no spread where all scores are equal, as those of one sample
    are: there Wilson's is wide enough, because no score in [0, 1] spreads more than right and wrong do.

    Raises ValueError for no values or one that is not finite: neither can be a score.
    """
    import numpy as np

    scores = np.asarray(list(values), dtype=np.float64)
    if not scores.size or not np.isfinite(scores).all():
        raise ValueError("a score needs at least one value, and finite ones")
    if np.isin(scores, (0.0, 1.0)).all() or scores.min() == scores.max():
        low, high = wilson(float(scores.mean()), scores.size)
    else:
        draw = np.random.default_rng(seed)
        means = [scores[draw.integers(0, scores.size, scores.size)].mean() for _ in range(RESAMPLES)]
        low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    error = float(scores.std(ddof=1)) / math.sqrt(scores.size) if scores.size > 1 else None
    return {
        "mean": float(scores.mean()),
        "standard_error": error,
        "interval_95": [float(low), float(high)],
        "samples": int(scores.size),
    }


def wilson(mean: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion `mean` of `count`."""
    z = 1.959964
    middle = mean + z * z / (2 * count)
    width = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    whole = 1 + z * z / count
    return max(0.0, (middle - width) / whole), min(1.0, (middle + width) / whole)
