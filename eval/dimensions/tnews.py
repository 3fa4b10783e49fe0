"""chinese_language_skill: TNEWS, the keywords of a news title. Source: CLUE (Xu et al. 2020)."""

from collections.abc import Sequence
from pathlib import Path

from eval import metrics
from eval.dimensions.base import Dimension, Scores, clean, mean, read_jsonl, text_of
from eval.samples import Loaded, Sample
from llmops.console import UserError

BEFORE = "写出下面新闻标题的关键词，用逗号隔开，只写关键词。\n标题："


def read(path: Path) -> Loaded:
    """jsonl `{"label", "label_desc", "sentence", "keywords": "a,b,c"}`; titles without keywords are left out."""
    samples, without = [], 0
    for number, record in read_jsonl(path):
        where = f"{path}:{number}"
        if "label" not in record:  # its keywords are of another kind, too
            raise UserError(f"{where}: no 'label'; this is the test file, take the dev file")
        keywords = text_of(record, "keywords", where)
        title = text_of(record, "sentence", where)
        if not metrics.split_keywords(keywords):
            without += 1
            continue
        samples.append(Sample(BEFORE, (keywords,), title, "\n关键词：", id=str(record.get("id", number - 1))))
    notes = [f"{without} titles without keywords are left out"] if without else []
    return Loaded(samples, notes=notes)


def score(prediction: str, sample: Sample) -> Scores:
    """BLEU against the true keywords, which have no order; the F1 of whole keywords beside it."""
    text = clean(prediction)
    return {
        "BLEU": metrics.keyword_bleu(text, sample.references[0]),
        "keyword_F1": metrics.keyword_f1(text, sample.references[0]),
    }


def ceiling(samples: Sequence[Sample]) -> tuple[str, list[float | None]]:
    """BLEU of the keywords that stand in the title: most of the true ones came from the article, which nobody sees."""
    found: list[float | None] = []
    for sample in samples:
        inside = [word for word in metrics.split_keywords(sample.references[0]) if word in sample.passage]
        found.append(metrics.keyword_bleu(",".join(inside), sample.references[0]))
    return "the true keywords that stand in the title", found


def baselines(samples: Sequence[Sample], seed: int) -> Scores:
    """BLEU of the title itself."""
    return {"the title": mean([score(sample.passage, sample)["BLEU"] for sample in samples])}


DIMENSION = Dimension(
    name="chinese_language_skill",
    dataset="TNEWS",
    files=("tnews/dev.json", "tnews*/dev.json*", "tnews*/*dev*.json*", "*tnews*dev*.json*"),
    get="TNEWS of the CLUE benchmark: dev.json in a folder tnews",
    unscored=("tnews*/test*.json",),
    read=read,
    metric="BLEU",
    score=score,
    baselines=baselines,
    ceiling=ceiling,
    max_new_tokens=64,
)
