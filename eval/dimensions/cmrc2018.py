"""reading_comprehension: CMRC2018, short answers from a passage. Source: Cui et al. 2019."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eval import metrics
from eval.dimensions.base import Asked, Dimension, Official, Scores, clean, mean, read_json, read_rows, text_of
from eval.samples import Loaded, Sample
from llmops import json_text
from llmops.console import UserError

BEFORE = "阅读短文，用短文中的原话简短地回答问题，只写答案。\n短文："


def read(path: Path) -> Loaded:
    """The native format (a list of passages), the SQuAD style, and the hub's parquet; a number is read as its text."""
    if path.suffix == ".parquet":
        rows = read_flat(path)
    else:
        found = read_json(path)
        native = isinstance(found, list)
        if not native and not (isinstance(found, dict) and isinstance(found.get("data"), list)):
            raise UserError(f"{path}: expected CMRC2018's list of passages or an object with 'data' (SQuAD style)")
        rows = read_native(found, path) if native else read_squad(found["data"], path)
    samples = [
        Sample(BEFORE, answers, passage, f"\n问题：{question}\n答案：", id=name, spans=True)
        for name, passage, question, answers in rows
        if answers
    ]
    return Loaded(samples)


def read_native(passages: list[Any], path: Path) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """(id, passage, question, answers) of `{context_text, qas: [{query_id, query_text, answers}]}`."""
    for number, passage in enumerate(passages, 1):
        where = f"{path}, passage {number}"
        for question in list_of(passage, "qas", where):
            answers = [text_of({"answer": answer}, "answer", where) for answer in list_of(question, "answers", where)]
            yield (
                str(question.get("query_id", "")),
                text_of(passage, "context_text", where),
                text_of(question, "query_text", where),
                tuple(dict.fromkeys(answers)),
            )


def read_squad(articles: list[Any], path: Path) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """(id, passage, question, answers) of `{paragraphs: [{context, qas: [{id, question, answers: [{text}]}]}]}`.

    An answer may be its text alone, too.
    """
    for number, article in enumerate(articles, 1):
        where = f"{path}, article {number}"
        for paragraph in list_of(article, "paragraphs", where):
            for question in list_of(paragraph, "qas", where):
                listed = list_of(question, "answers", where)
                whole = [answer if isinstance(answer, dict) else {"text": answer} for answer in listed]
                answers = [text_of(answer, "text", where) for answer in whole]
                yield (
                    str(question.get("id", "")),
                    text_of(paragraph, "context", where),
                    text_of(question, "question", where),
                    tuple(dict.fromkeys(answers)),
                )


def read_flat(path: Path) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """(id, passage, question, answers) of rows `{id, context, question, answers: {text: [...]}}`."""
    for number, record in read_rows(path):
        where = f"{path}:{number}"
        answers = [text_of({"text": text}, "text", where) for text in list_of(record.get("answers"), "text", where)]
        passage, question = (text_of(record, key, where) for key in ("context", "question"))
        yield str(record.get("id", "")), passage, question, tuple(dict.fromkeys(answers))


def list_of(record: Any, key: str, where: str) -> list[Any]:
    """A list in an object. Raises UserError when it is not there."""
    if not isinstance(record, dict) or not isinstance(record.get(key), list):
        raise UserError(f"{where}: expected an object with the list {key!r}")
    return record[key]


def score(prediction: str, sample: Sample) -> Scores:
    """BLEU against the best reference; the official F1 and EM beside it."""
    text = clean(prediction)
    return {
        "BLEU": metrics.best_bleu(text, sample.references),
        "F1": metrics.cmrc_f1(text, sample.references),
        "EM": metrics.cmrc_em(text, sample.references),
    }


def ceiling(samples: Sequence[Sample]) -> tuple[str, list[float | None]]:
    """One reference copied from the passage scores 1."""
    return "a perfect reader of what the prompts hold", [1.0] * len(samples)


def predictions(asked: Asked) -> str:
    """What cmrc2018_evaluate.py and CLUE read: `{query_id: answer}`."""
    return json_text.dumps({sample.id: clean(answer.text) for sample, answer in asked}, indent=1) + "\n"


def baselines(samples: Sequence[Sample], seed: int) -> Scores:
    """BLEU of the passage's first sentence."""
    firsts = (re.split("(?<=[。！？])", sample.passage, maxsplit=1)[0] for sample in samples)
    return {"first sentence": mean([score(text, sample)["BLEU"] for text, sample in zip(firsts, samples, strict=True)])}


DIMENSION = Dimension(
    name="reading_comprehension",
    dataset="CMRC2018",
    files=(
        "cmrc2018/cmrc2018_dev.json", "cmrc2018*/dev.json", "cmrc2018*/*dev*.json", "cmrc2018*/*/*dev*.json",
        "*cmrc2018*dev*.json", "cmrc2018*/**/validation*.parquet", "cmrc2018*/*trial*.json",
    ),
    get="CMRC2018: cmrc2018_dev.json (native or SQuAD style) in a folder cmrc2018",
    read=read,
    metric="BLEU",
    score=score,
    baselines=baselines,
    ceiling=ceiling,
    max_new_tokens=64,
    official=Official("cmrc2018_predict.json", predictions),
)  # fmt: skip
