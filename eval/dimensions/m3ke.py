"""innovation_capacity: M3KE, multiple choice in 71 subjects, zero- or few-shot. Source: Liu et al. 2023."""

from collections.abc import Sequence
from pathlib import Path

from eval.dimensions.base import Dimension, Scores, read_jsonl, text_of
from eval.samples import Loaded, Sample, accuracy_baselines
from llmops import files
from llmops.console import UserError

LETTERS = "ABCD"


def read(path: Path) -> Loaded:
    """A folder of `<Subject>-<Cluster>-<Level>.jsonl` with the keys question, A, B, C, D, answer; or one such file.

    For data/test the examples of data/dev serve as few-shot examples. Blank answers are an error: the public test set
    has none, and a score of 0 would be wrong. An empty option is not offered as a choice.
    """
    paths = [path] if files.is_file(path) else sorted(path.glob("*.jsonl"))
    samples, empty = [], 0
    for file in paths:
        found, without = read_subject(file)
        samples += found
        empty += without
    examples: dict[str, list[Sample]] = {}
    if path.name == "test" and files.is_folder(path.with_name("dev")):
        for file in sorted(path.with_name("dev").glob("*.jsonl")):
            examples[file.stem] = read_subject(file)[0]
    notes = [f"{empty} questions have an empty option, which is not offered"] if empty else []
    return Loaded(samples, examples, notes)


def read_subject(path: Path) -> tuple[list[Sample], int]:
    """(questions of one file, how many of them have an empty option)."""
    subject = path.stem.split("-")[0].replace("_", " ")
    before = f"以下是关于“{subject}”的单项选择题，请只写出正确答案的字母。\n"
    samples, empty = [], 0
    for number, record in read_jsonl(path):
        where = f"{path}:{number}"
        answer = text_of(record, "answer", where).strip().upper()
        if not answer:
            raise UserError(
                f"{where}: the answer is blank; M3KE's public test questions have none, so leave only data/dev there, "
                "or fill the answers in"
            )
        options = {letter: text_of(record, letter, where).strip() for letter in LETTERS}
        choices = tuple(letter for letter in LETTERS if options[letter])
        if answer not in choices:
            raise UserError(f"{where}: answer {answer!r}, expected one of {', '.join(choices) or 'A to D'} with text")
        empty += len(choices) < len(LETTERS)
        lines = "".join(f"\n{letter}. {options[letter]}" for letter in choices)
        question = text_of(record, "question", where).strip()
        samples.append(Sample(before, (answer,), question, f"{lines}\n答案：", choices=choices, group=path.stem))
    return samples, empty


def score(prediction: str, sample: Sample) -> Scores:
    """Accuracy."""
    return {"accuracy": float(prediction == sample.references[0])}


def baselines(samples: Sequence[Sample], seed: int) -> Scores:
    """Always the most frequent letter, and a letter at random."""
    return accuracy_baselines(samples)


DIMENSION = Dimension(
    name="innovation_capacity",
    dataset="M3KE",
    files=(
        "m3ke/data/test",
        "m3ke/data/dev",
        "[mM]3[kK][eE]*/**/test",
        "[mM]3[kK][eE]*/**/dev",
        "data/test",
        "data/dev",
    ),
    get="M3KE: its folder data (with dev, and test where you have its answers) in a folder m3ke",
    read=read,
    metric="accuracy",
    score=score,
    baselines=baselines,
    by_group=True,
)
