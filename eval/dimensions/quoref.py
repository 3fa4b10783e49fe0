"""command_compliance: write a question for a passage, as the task says.

Source: BIG-bench (Srivastava et al. 2022), natural_instructions, subtask001_quoref_question_generation.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from eval import metrics
from eval.dimensions.base import Dimension, Scores, clean, mean, read_json, text_of
from eval.samples import Loaded, Sample
from llmops.console import UserError

INSTRUCTION = (
    "Write a question about the passage that asks which person, place or thing a mention in it refers to. "
    "Write only the question."
)


def read(path: Path) -> Loaded:
    """json `{..., "task_prefix", "examples": [{"input": "Passage: ...", "target": ["...", ...]}]}`."""
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("examples"), list):
        raise UserError(f"{path}: expected BIG-bench's object with the list 'examples'")
    prefix = str(found.get("task_prefix") or "").strip() or INSTRUCTION
    samples = []
    for number, example in enumerate(found["examples"], 1):
        where = f"{path}, example {number}"
        if not isinstance(example, dict):
            raise UserError(f"{where}: found a JSON {type(example).__name__}, expected an object")
        targets = example.get("target")
        listed = targets if isinstance(targets, list) else [targets]
        references = tuple(dict.fromkeys(text_of({"target": t}, "target", where).strip() for t in listed))
        if not references or "" in references:
            raise UserError(f"{where}: 'target' has no text; expected a question or a list of them")
        passage = text_of(example, "input", where).strip()
        samples.append(Sample(f"{prefix}\n\n", references, passage, "\nQuestion:", id=str(number - 1)))
    return Loaded(samples)


def score(prediction: str, sample: Sample) -> Scores:
    """BLEU with all targets as references: there is more than one good question."""
    return {"BLEU": metrics.bleu(clean(prediction), sample.references)}


def ceiling(samples: Sequence[Sample]) -> tuple[str, list[float | None]]:
    """BLEU of a question that another person wrote for the same passage, where there is one.

    Another sample's question meets the references that the model meets; a passage with one sample has none such, and
    there each reference meets the others, one fewer than the model does.
    """
    by_passage: dict[str, list[str]] = {}
    for sample in samples:
        by_passage.setdefault(sample.passage, []).extend(sample.references)
    what, found = "another person's question", list[float | None]()
    for sample in samples:
        own = sample.references
        others = [question for question in dict.fromkeys(by_passage[sample.passage]) if question not in own]
        scores = [metrics.bleu(one, own) for one in others]
        if not scores and len(own) > 1:
            scores = [metrics.bleu(one, [q for q in own if q != one]) for one in own]
            what = "another person's question, against one reference fewer where a passage has one sample"
        found.append(mean(scores) if scores else None)
    return what, found


def baselines(samples: Sequence[Sample], seed: int) -> Scores:
    """BLEU of another sample's question."""
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    if len(order) < 2:
        return {"a random question": 0.0}
    pairs = zip(order, [*order[1:], order[0]], strict=True)  # nobody is paired with itself
    return {"a random question": mean([score(samples[j].references[0], samples[i])["BLEU"] for i, j in pairs])}


TASK = "subtask001_quoref_question_generation"
CHECKOUT = "bigbench/benchmark_tasks/natural_instructions"  # ** enters no linked folder, so its place is said
DIMENSION = Dimension(
    name="command_compliance",
    dataset=f"BIG-bench {TASK}",
    files=(
        f"bigbench/{TASK}/task.json", f"*/{CHECKOUT}/{TASK}/task.json", f"**/{TASK}/task.json", f"**/*{TASK}*.json",
    ),
    get=f"BIG-bench's natural_instructions task {TASK}: its task.json in a folder bigbench/{TASK}",
    read=read,
    metric="BLEU",
    score=score,
    baselines=baselines,
    ceiling=ceiling,
    max_new_tokens=48,
)  # fmt: skip
