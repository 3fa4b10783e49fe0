"""inference_ability: AFQMC, whether two questions to a help desk mean the same. Source: CLUE (Xu et al. 2020)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.dimensions.base import Asked, Dimension, Official, Scores, all_right, read_jsonl, read_rows, text_of
from eval.samples import Loaded, Sample, accuracy_baselines
from llmops import json_text
from llmops.console import UserError

ANSWERS = {"1": "是", "0": "否"}


def read(path: Path) -> Loaded:
    """jsonl or parquet `{"sentence1", "sentence2", "label": "0" or "1"}`; the test file has no labels: refused."""
    samples: list[Sample] = []
    for number, record in read_rows(path):
        where = f"{path}:{number}"
        if "label" not in record:
            raise UserError(f"{where}: no 'label'; this is the test file, take the dev file")
        label = text_of(record, "label", where)
        if label not in ANSWERS:
            raise UserError(f"{where}: label {label!r}, expected '0' or '1'")
        samples.append(ask(record, where, (ANSWERS[label],), len(samples)))
    return Loaded(samples)


def ask(record: dict[str, Any], where: str, references: tuple[str, ...], number: int) -> Sample:
    """The question about one pair; its id is the file's own, or its place from 0."""
    one, other = (text_of(record, key, where) for key in ("sentence1", "sentence2"))
    before = f"下面两个句子的意思相同吗？请只回答“是”或“否”。\n句子一：{one}\n句子二：{other}\n答案："
    return Sample(before, references, choices=tuple(ANSWERS.values()), id=str(record.get("id", number)))


def unlabelled(path: Path) -> list[Sample]:
    """The pairs of the test file beside the dev file, which CLUE's submission is about; none where it is not."""
    test = path.with_name(path.name.replace("dev", "test"))
    if test == path or path.suffix == ".parquet" or not test.is_file():
        return []
    return [ask(record, f"{test}:{number}", (), number - 1) for number, record in read_jsonl(test)]


def submission(asked: Asked) -> str:
    """CLUE's afqmc_predict.json: a line `{"id": 0, "label": "1"}` per pair, in the order of the test file."""
    labels = {answer: label for label, answer in ANSWERS.items()}
    rows = ({"id": whole(sample.id), "label": labels[answer.text]} for sample, answer in asked)
    return "".join(json_text.dumps(row) + "\n" for row in rows)


def whole(text: str) -> int | str:
    """An id as a number where it is one, as in the official files."""
    return int(text) if text.isdecimal() else text


def score(prediction: str, sample: Sample) -> Scores:
    """Accuracy."""
    return {"accuracy": float(prediction == sample.references[0])}


def baselines(samples: Sequence[Sample], seed: int) -> Scores:
    """The official dev set is 69.0% "0": an accuracy below that says nothing good."""
    return accuracy_baselines(samples)


DIMENSION = Dimension(
    name="inference_ability",
    dataset="AFQMC",
    files=(
        "afqmc/dev.json", "afqmc*/dev.json*", "afqmc*/*dev*.json*", "*afqmc*dev*.json*", "*/afqmc/validation*.parquet",
    ),
    get="AFQMC of the CLUE benchmark: dev.json in a folder afqmc",
    unscored=("afqmc*/test.json",),
    read=read,
    metric="accuracy",
    score=score,
    baselines=baselines,
    ceiling=all_right,
    official=Official("afqmc_predict.json", submission, unlabelled),
)  # fmt: skip
