"""From questions and intents to the conversations that chat_main.sh learns: train.jsonl, test.jsonl, intents.json.

python faq/prepare.py --help        every setting
Prints what it made as one JSON object on stdout; says on stderr what it read and what it left out, by line.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faq import prepared
from faq.examples import (
    Example,
    check_known,
    collect_intents,
    examples_of,
    language_of,
    own_lists,
    read_data,
    split,
    without_conflicts,
    without_tests,
)  # fmt: skip
from faq.prepared import OUTPUTS, TEST_NAME, TRAIN_NAME, VALIDATION_NAME
from llmops import files, json_text
from llmops.console import Parser, UserError, log, print_json, run_main, to_bool
from llmops.conversations.data_files import list_files, path_of
from llmops.conversations.records import Message
from llmops.formats.families import families
from llmops.intents.catalog import ORDERS, Catalog, wording_of
from llmops.intents.questions import INTENTS_NAME
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint

LENGTHS_TRIED = 20  # of the longest texts: training checks every row


@dataclass(frozen=True)
class Config:
    """What to prepare. Paths are as given; "" means "choose for me"."""

    data_file: str
    test_data_file: str
    output_dir: str
    mode: str
    model_name_or_path: str
    max_seq_len: int
    instruction: str
    test_ratio: float
    validation_ratio: float
    out_of_scope_ratio: float
    variants: int
    prompt_language: str
    candidates: str
    candidate_examples: int
    candidate_order: str
    embedding_model: str
    skip_bad_lines: bool
    overwrite: bool
    trust_remote_code: bool
    seed: int


def build_parser() -> argparse.ArgumentParser:
    """Every setting with its default."""
    parser = Parser(prog="prepare.py", description="Make the FAQ scenario's training data.", allow_abbrev=False)
    add = parser.add_argument
    add("--data_file", required=True, help="questions with intents: a file, several with commas, or a pattern")
    add("--test_data_file", default="", help="questions to test with, named likewise; empty: a part of data_file")
    add("--output_dir", default="mnt/datasets", help="folder for train.jsonl, test.jsonl, intents.json")
    add(
        "--mode",
        default="auto",
        choices=list(families()),
        help="whose prompt wording: a file of llmops/formats/templates",
    )
    add("--model_name_or_path", default="", help="base model; if given, the prompts' length is checked with it")
    add("--max_seq_len", type=int, default=2048, help="longest prompt and answer in tokens")
    add("--instruction", default="", help="instead of the template's instruction")
    add(
        "--prompt_language",
        default="auto",
        choices=["auto", "zh", "en"],
        help="of the prompt's wording; auto: the data's",
    )
    add("--test_ratio", type=float, default=0.1, help="share of each intent's questions that is held out")
    add("--validation_ratio", type=float, default=0.0, help="share of the rest to choose the best checkpoint by")
    add("--out_of_scope_ratio", type=float, default=0.1, help="questions added whose intent is left out of the list")
    add(
        "--candidates", default="all", metavar="all|K", help="list every intent, or the K most similar to each question"
    )
    add(
        "--candidate_examples", type=int, default=0, metavar="N",
        help="with --candidates K: show each with the N of its training questions that are most similar",
    )  # fmt: skip
    add(
        "--candidate_order", default="", choices=["", *ORDERS],
        help="of K candidates; empty: similarity with examples, number without; random: for faq/score --join",
    )  # fmt: skip
    add("--embedding_model", default="", help="folder of the model that finds them; empty: character n-grams")
    add("--variants", type=int, default=2, help="how many such lists; few, so that prompts stay shared")
    for name, text in (
        ("skip_bad_lines", "drop and count bad records instead of stopping"),
        ("overwrite", "replace files in output_dir that this command did not write"),
        ("trust_remote_code", "run Python code that the checkpoint's folder ships"),
    ):
        add(f"--{name}", type=to_bool, default=False, metavar="true|false", help=text)
    add("--seed", type=int, default=42, help="random seed of the split and of the variants")
    return parser


def check(config: Config) -> None:
    """Raise UserError that lists every problem of the settings."""
    problems = []
    for name in ("test_ratio", "validation_ratio", "out_of_scope_ratio"):
        if not 0 <= getattr(config, name) < 1:
            problems.append(f"--{name} is {getattr(config, name)}, expected at least 0 and less than 1")
    if config.max_seq_len < 1:
        problems.append(f"--max_seq_len is {config.max_seq_len}, expected at least 1")
    if config.variants < 1:
        problems.append(f"--variants is {config.variants}, expected at least 1")
    if config.candidate_examples < 0:
        problems.append(f"--candidate_examples is {config.candidate_examples}, expected at least 0")
    problems += check_candidates(config)
    if not config.test_data_file and config.test_ratio == 0:
        problems.append("there is no --test_data_file and --test_ratio is 0; give one of the two")
    output = Path(config.output_dir)
    results = {files.real(output / name) for name in OUTPUTS}
    given = [path for text in (config.data_file, config.test_data_file) if text for path in list_files(text)]
    problems += [
        f"{path} would be overwritten by its own result; move it out of --output_dir"
        for path in given if files.real(path) in results
    ]  # fmt: skip
    if config.model_name_or_path:
        model = Path(config.model_name_or_path)
        if not files.is_file(model / "config.json"):
            problems.append(f"the model folder {model} has no config.json; expected a Hugging Face checkpoint folder")
        else:
            Checkpoint(model, config.mode).family()  # a mode that does not fit is an error of its own
    if problems:
        raise UserError("; ".join(problems))


def check_candidates(config: Config) -> list[str]:
    """What is wrong with --candidates; raises UserError for a folder that holds no embedding model."""
    if config.candidates == "all":
        given = {"embedding_model finds": config.embedding_model, "candidate_examples shows": config.candidate_examples,
                 "candidate_order orders": config.candidate_order}  # fmt: skip
        return [f"--{flag} candidates; give their number with --candidates" for flag, value in given.items() if value]
    if not config.candidates.isdecimal() or int(config.candidates) < 2:
        return [f"--candidates is {config.candidates}, expected all or a number from 2"]
    if config.embedding_model:
        from llmops.embedding.folder import read_folder

        read_folder(Path(config.embedding_model))
    return []


def make_variants(intents: Sequence[str], config: Config) -> list[list[str]]:
    """The intents that each variant leaves out: disjoint, together at most half of all."""
    if not config.out_of_scope_ratio or len(intents) < 4:
        return []
    count = min(config.variants, len(intents) // 4)
    size = max(1, len(intents) // (2 * count))
    shuffled = Random(config.seed).sample(list(intents), count * size)
    return [shuffled[k * size : (k + 1) * size] for k in range(count)]


def make_rows(examples: Sequence[Example], catalog: Catalog, ratio: float, seed: int) -> Iterator[dict[str, Any]]:
    """One row per example, then `ratio` as many rows of questions whose intent a variant leaves out."""
    for example in examples:
        yield make_row(example, example.intent, catalog, variant_of_own(example, catalog))
    variant_of = {intent: k for k, absent in enumerate(catalog.left_out) for intent in absent}
    if variant_of and ratio:
        movable = [e for e in examples if e.intent in variant_of]
        count = min(len(movable), round(ratio * len(examples)))
        chosen = Random(seed + 1).sample(movable, count)
        for example in chosen:
            yield make_row(example, catalog.none, catalog, variant_of[example.intent])


def variant_of_own(example: Example, catalog: Catalog) -> int | None:
    """The number of the list that an example brings or that was found for it, or None."""
    if example.variant is not None:
        return example.variant
    return catalog.variant_of(example.candidates) if example.candidates else None


def make_row(example: Example, answer: str, catalog: Catalog, variant: int | None) -> dict[str, Any]:
    """A line of train.jsonl or test.jsonl: the conversation, and what predict and score want to know of it."""
    if example.messages:
        return {"messages": list(example.messages), "question": example.question, "intent": answer}
    messages = [*catalog.prompt(example.question, variant, example.shown), {"role": "assistant", "content": answer}]
    row = {"messages": messages, "question": example.question, "intent": answer}
    return row if variant is None else row | {"variant": variant}


def check_length(config: Config, parts: Sequence[Sequence[Example]], catalog: Catalog) -> None:
    """Raise UserError when the longest prompt with its answer is longer than the model or --max_seq_len allows."""
    from llmops.console import stdout_to_stderr

    model = ChatModel(Checkpoint(Path(config.model_name_or_path), config.mode, config.trust_remote_code))
    with stdout_to_stderr():
        chat = model.chat
    log(f"chat format: {chat.name}")
    length = model.checkpoint.length
    limit, whose = config.max_seq_len, f"--max_seq_len {config.max_seq_len}"
    if length and length < limit:
        limit, whose = length, f"the model's length of {length}"
    longest, tokens = parts[0][0], 0

    def written(example: Example) -> list[Message]:
        return make_row(example, example.intent, catalog, variant_of_own(example, catalog))["messages"]

    def size(example: Example) -> int:
        return sum(len(message["content"]) for message in written(example))

    for example in nlargest(LENGTHS_TRIED, chain(*parts), key=size):
        length = len(chat.conversation(written(example))[-1].ids)
        if length > tokens:
            longest, tokens = example, length
    if tokens > limit:
        candidates = catalog.candidates(variant_of_own(longest, catalog))
        raise UserError(
            f"{longest.place}: this question's prompt with its {len(candidates)} candidate intents has {tokens} "
            f"tokens, more than {whose}; shorten intents and instruction, have fewer intents, or take a model or "
            "--max_seq_len that is longer"
        )
    log(f"the longest prompt with its answer has {tokens} tokens of {limit}")


def run(config: Config) -> dict[str, Any]:
    """Read, check, split, write; what was made, as printed."""
    # 1. read every record
    check(config)
    data = read_data(config.data_file, config.skip_bad_lines)
    path, records = path_of([one.path for one in data]), [record for one in data for record in one.records]
    if not config.overwrite:
        prepared.complete(Path(config.output_dir))
        prepared.refuse_foreign(Path(config.output_dir), names_of(config))
    examples = examples_of(data)
    made, asked = (next((e for e in examples if bool(e.messages) == whole), None) for whole in (True, False))
    if made and asked:
        raise UserError(
            f"{made.place} has 'messages' and {asked.place} a question with its intent; expected one of the two"
        )
    none = wording_of(config.mode).none
    language = language_of(records, none) if config.prompt_language == "auto" else config.prompt_language
    wording = None if made else wording_of(config.mode, config.instruction, language)
    own = {record.instruction for record in records} - {""}
    if own and not config.instruction and wording:
        log(f"the records' own instruction ({sorted(own)[0]!r}) is not used; --instruction sets another one")
    examples = without_conflicts(examples, config.skip_bad_lines)
    intents, none_reply = collect_intents(data, none)
    if len(intents) < 2:
        raise UserError(f"{path} has {len(intents)} intent beside {none!r}; expected at least two to choose from")
    # 2. training, test, validation
    tested = read_tests(config) if config.test_data_file else None
    lists = own_lists([*examples, *(tested or [])], intents, none)
    if tested is not None:
        tested = check_known(tested, intents, none, config.skip_bad_lines)
    parts = parts_of(config, examples, tested)
    # 3. prompts
    del data, records, tested
    left_out = make_variants(list(intents), config) if wording and not lists else []
    catalog = Catalog(config.mode, wording, intents, left_out, none_reply, lists)
    recall: dict[str, Any] = {}
    if config.candidates != "all":
        if lists or not wording:
            raise UserError(f"{path} brings its own candidates or prompts; leave --candidates out")
        from faq.retrieval import retrieve

        parts, catalog, recall = retrieve(config, parts, catalog)
    if config.model_name_or_path:
        check_length(config, [*parts.values()], catalog)
    rows = {name: make_rows(part, catalog, ratio_of(config, name), config.seed) for name, part in parts.items()}
    # 4. all files, or none
    written = write_outputs(config, rows, catalog, none)
    counts = {name.partition(".")[0]: written[name].total() for name in rows}
    none_rows = written[TRAIN_NAME][True]
    summary = f"{counts['train']} rows to train on ({none_rows} of them {none}), {counts['test']} to test"
    log(f"{config.output_dir}: {summary}")
    if config.validation_ratio:
        log(f"{config.output_dir}: {counts['validation']} rows of {VALIDATION_NAME} to choose the best checkpoint by")
    return counts | {"intents": len(intents), "output_dir": config.output_dir} | recall


def parts_of(config: Config, examples: list[Example], tested: list[Example] | None) -> "dict[str, Sequence[Example]]":
    """The examples of every file; `tested`: those of a given test file. Raises UserError for a part that is empty."""
    if tested is None:
        examples, test = split(examples, config.test_ratio, config.seed)
    else:
        examples, test = without_tests(examples, tested), tested
    found: dict[str, Sequence[Example]] = {TRAIN_NAME: examples, TEST_NAME: test}
    if config.validation_ratio:
        found[TRAIN_NAME], found[VALIDATION_NAME] = split(examples, config.validation_ratio, config.seed, fewest=2)
    for (_, part), name in zip(found.items(), ("training", "the test", "validation"), strict=False):
        if not part:
            raise UserError(f"0 rows left for {name}; give more questions per intent")
    return found


def ratio_of(config: Config, name: str) -> float:
    """How many rows without their intent a file has beside the others; a given test file is not changed."""
    return 0 if name == TEST_NAME and config.test_data_file else config.out_of_scope_ratio


def names_of(config: Config) -> list[str]:
    """The files that are written."""
    return [name for name in OUTPUTS if name != VALIDATION_NAME or config.validation_ratio]


def read_tests(config: Config) -> list[Example]:
    """The examples of a given test file, which is not changed."""
    tested = read_data(config.test_data_file, config.skip_bad_lines)
    return without_conflicts(examples_of(tested), config.skip_bad_lines, repeats_stay=True)


def write_outputs(
    config: Config, rows: dict[str, Iterator[dict[str, Any]]], catalog: Catalog, none: str
) -> dict[str, Counter[bool]]:
    """Write all files, or none, row by row. By name, how many rows are answered with `none` (True) and how many not."""
    counts = {name: Counter[bool]() for name in rows}

    def lines(name: str) -> Iterator[str]:
        for row in rows[name]:
            counts[name][row["intent"] == none] += 1
            yield json_text.dumps(row) + "\n"

    texts = {name: lines(name) for name in rows}
    prepared.write(Path(config.output_dir), texts | {INTENTS_NAME: catalog.json_parts()}, config.overwrite)
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""

    def body() -> int:
        print_json(run(Config(**vars(build_parser().parse_args(argv)))))
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
