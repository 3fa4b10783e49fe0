"""inference_ability: AFQMC, whether two questions to a help desk mean the same. Source: CLUE (Xu et al. 2020)."""

from collections.abc import Sequence
from pathlib import Path

from eval.dimensions.base import Dimension, Scores, read_jsonl, text_of
from eval.samples import Loaded, Sample, accuracy_baselines
from llmops.console import UserError

ANSWERS = {"1": "是", "0": "否"}


def read(path: Path) -> Loaded:
    """jsonl `{"sentence1", "sentence2", "label": "0" or "1"}`; the test file has no labels and is refused."""
    samples = []
    for number, record in read_jsonl(path):
        where = f"{path}:{number}"
        if "label" not in record:
            raise UserError(f"{where}: no 'label'; this is the test file, take the dev file")
        label = text_of(record, "label", where)
        if label not in ANSWERS:
            raise UserError(f"{where}: label {label!r}, expected '0' or '1'")
        one, other = (text_of(record, key, where) for key in ("sentence1", "sentence2"))
        before = f"下面两个句子的意思相同吗？请只回答“是”或“否”。\n句子一：{one}\n句子二：{other}\n答案："
        samples.append(Sample(before, (ANSWERS[label],), choices=tuple(ANSWERS.values())))
    return Loaded(samples)


def score(prediction: str, sample: Sample) -> Scores:
    """Accuracy."""
    return {"accuracy": float(prediction == sample.references[0])}


def baselines(samples: Sequence[Sample], seed: int) -> Scores:
    """The official dev set is 69.0% "0": an accuracy below that says nothing good."""
    return accuracy_baselines(samples)


DIMENSION = Dimension(
    name="inference_ability",
    dataset="AFQMC",
    files=("afqmc/dev.json", "afqmc*/dev.json*", "afqmc*/*dev*.json*", "*afqmc*dev*.json*"),
    get="AFQMC of the CLUE benchmark: dev.json in a folder afqmc",
    read=read,
    metric="accuracy",
    score=score,
    baselines=baselines,
)
