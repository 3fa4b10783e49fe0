"""innovation_capacity: M3KE, multiple choice in 71 subjects, zero- or few-shot. Source: Liu et al. 2023."""

from collections.abc import Sequence
from pathlib import Path

from eval.dimensions.base import Dimension, Scores, all_right, read_jsonl, text_of
from eval.samples import Loaded, Sample, accuracy_baselines
from llmops import files
from llmops.console import UserError

LETTERS = "ABCD"


def read(path: Path) -> Loaded:
    """A folder of `<Subject>-<Cluster>-<Level>.jsonl` with the keys question, A, B, C, D, answer; or one such file.

    For data/test the examples of data/dev serve as few-shot examples. The public test questions have blank answers and
    cannot be scored: data/dev is scored then, and without it that is an error. An empty option is no choice.
    """
    dev = path.with_name("dev") if path.name == "test" and files.is_folder(path.with_name("dev")) else None
    samples, empty, blank = read_folder(path)
    notes = []
    if blank and samples:
        notes.append(f"{len(blank)} questions without an answer are left out")
    if blank and not samples:
        if dev is None:
            raise UserError(
                f"{blank[0]}: the answer is blank; M3KE's public test questions have none, so put data/dev beside "
                "them, or fill the answers in"
            )
        notes.append(f"the {len(blank)} questions of {path.name} have no answers, so those of dev are scored")
        path, dev = dev, None
        samples, empty, blank = read_folder(path)
    examples: dict[str, list[Sample]] = {}
    for sample in read_folder(dev)[0] if dev else []:
        examples.setdefault(sample.group, []).append(sample)
    if empty:
        notes.append(f"{empty} questions have an empty option, which is not offered")
    return Loaded(samples, examples, notes, path)


def read_folder(path: Path) -> tuple[list[Sample], int, list[str]]:
    """(questions with an answer, how many of them have an empty option, where those without an answer are)."""
    samples, empty, blank = [], 0, []
    for file in [path] if files.is_file(path) else sorted(path.glob("*.jsonl")):
        found, few, unanswered = read_subject(file)
        samples += found
        empty += few
        blank += unanswered
    return samples, empty, blank


def read_subject(path: Path) -> tuple[list[Sample], int, list[str]]:
    """`read_folder` of one file."""
    subject = path.stem.split("-")[0].replace("_", " ")
    about = "" if path.stem == DIMENSION.name else f"关于“{subject}”的"
    before = f"以下是{about}单项选择题，请只写出正确答案的字母。\n"
    samples, empty, blank = [], 0, []
    for number, record in read_jsonl(path):
        where = f"{path}:{number}"
        answer = text_of(record, "answer", where).strip().upper()
        if not answer:
            blank.append(where)
            continue
        options = {letter: text_of(record, letter, where).strip() for letter in LETTERS}
        choices = tuple(letter for letter in LETTERS if options[letter])
        if answer not in choices:
            raise UserError(f"{where}: answer {answer!r}, expected one of {', '.join(choices) or 'A to D'} with text")
        empty += len(choices) < len(LETTERS)
        lines = "".join(f"\n{letter}. {options[letter]}" for letter in choices)
        question = text_of(record, "question", where).strip()
        name = str(record.get("id", number - 1))
        samples.append(
            Sample(before, (answer,), question, f"{lines}\n答案：", choices=choices, group=path.stem, id=name)
        )
    return samples, empty, blank


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
    ceiling=all_right,
    by_group=True,
)
