"""chinese_language_skill: TNEWS, the keywords of a news title. Source: CLUE (Xu et al. 2020)."""

from collections.abc import Sequence
from pathlib import Path

from eval import metrics
from eval.dimensions.base import Dimension, Scores, clean, mean, read_jsonl, text_of
from eval.samples import Loaded, Sample

BEFORE = "写出下面新闻标题的关键词，用逗号隔开，只写关键词。\n标题："


def read(path: Path) -> Loaded:
    """jsonl `{"label", "label_desc", "sentence", "keywords": "a,b,c"}`; titles without keywords are left out."""
    samples, without = [], 0
    for number, record in read_jsonl(path):
        where = f"{path}:{number}"
        keywords = text_of(record, "keywords", where)
        title = text_of(record, "sentence", where)
        if not metrics.split_keywords(keywords):
            without += 1
            continue
        samples.append(Sample(BEFORE, (keywords,), title, "\n关键词："))
    notes = [f"{without} titles without keywords are left out"] if without else []
    return Loaded(samples, notes=notes)


def score(prediction: str, sample: Sample) -> Scores:
    """BLEU against the true keywords, which have no order."""
    return {"BLEU": metrics.keyword_bleu(clean(prediction), sample.references[0])}


def baselines(samples: Sequence[Sample], seed: int) -> Scores:
    """BLEU of the title itself."""
    return {"the title": mean([score(sample.passage, sample)["BLEU"] for sample in samples])}


DIMENSION = Dimension(
    name="chinese_language_skill",
    dataset="TNEWS",
    files=("tnews/dev.json", "tnews*/dev.json*", "tnews*/*dev*.json*", "*tnews*dev*.json*"),
    get="TNEWS of the CLUE benchmark: dev.json in a folder tnews",
    read=read,
    metric="BLEU",
    score=score,
    baselines=baselines,
    max_new_tokens=64,
)
