"""Which of the known intents does a question have: one question, or a file of them.

python faq/predict.py --help        every setting
Prints one JSON object per question on stdout, or writes them to --output_file.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faq.orders import as_one, in_orders, took
from faq.queries import Query, read_queries
from llmops import files, json_text
from llmops.console import Parser, UserError, log, progress, run_main, stdout_to_stderr, to_bool, write_stdout
from llmops.formats.chat_format import ChatFormat
from llmops.formats.families import families
from llmops.imports import quick_imports
from llmops.intents.catalog import Catalog, load_catalog
from llmops.intents.prediction import candidate_tokens, decide, prediction, top_prediction
from llmops.intents.questions import INTENTS_NAME
from llmops.machine import cpu_kernels, devices
from llmops.machine.kept import Kept, fingerprint
from llmops.machine.sharing import Processes
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint

if TYPE_CHECKING:
    from llmops.generation.generator import Generator
    from llmops.intents.joined import Joint


QUERIES_AT_ONCE = 8192  # whose prompts and candidates are held as tokens


@dataclass(frozen=True)
class Config:
    """What to predict and how. "" and 0 mean "choose for me"."""

    model_name_or_path: str
    intents_file: str
    input_file: str
    question: tuple[str, ...]
    output_file: str
    unconstrained_file: str
    embedding_model: str
    join_file: str
    mode: str
    constrain: bool
    use_threshold: bool
    orders: int
    reuse_prefix: bool
    batch_size: int
    max_new_tokens: int
    dtype: str
    cpu_kernels: str
    trust_remote_code: bool


def build_parser() -> argparse.ArgumentParser:
    """Every setting with its default."""
    parser = Parser(prog="predict.py", description="Tell the intents of questions.", allow_abbrev=False)
    add = parser.add_argument
    add("--model_name_or_path", default="mnt/output_path", help="trained adapter, merged model or whole model")
    add("--intents_file", default="", help=f"{INTENTS_NAME} of faq/prepare.py; empty: the one in the model's folder")
    add("--input_file", default="", help="questions: test.jsonl of prepare.py, or JSON or csv as prepare.py reads it")
    add("--question", action="append", default=[], help="a question; may be given several times")
    add("--output_file", default="", help="write the predictions there instead of to stdout")
    add("--unconstrained_file", default="", help="answer without constraint, too, and write that there")
    add("--embedding_model", default="", help="what finds candidates, if it was moved; with --join_file faq/score's")
    add("--join_file", default="", help="join with a linear classifier on these questions, as faq/score --join kept")
    add("--mode", default="", choices=["", *families()], help="chat format; empty: the mode in the intents file")
    add("--constrain", type=to_bool, default=True, metavar="true|false", help="answer known intents only")
    add("--use_threshold", type=to_bool, default=True, metavar="true|false",
        help="hold to what faq/score kept, a threshold and --join; false: what the model alone says")  # fmt: skip
    add("--orders", type=int, default=0,
        help="random-order candidates: ask in N orders, join the answers; 0: as faq/score kept, else one")  # fmt: skip
    add("--reuse_prefix", type=to_bool, default=True, metavar="true|false",
        help="compute what all prompts share once; false: each prompt anew")  # fmt: skip
    add("--batch_size", type=int, default=0, help="questions per pass; 0: as the mode's template says")
    add("--max_new_tokens", type=int, default=0, help="length limit without constraint; 0: as the template says")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="auto: bf16 where the GPU has it")
    add("--cpu_kernels", default="auto", choices=cpu_kernels.SETTINGS, help=cpu_kernels.HELP)
    add("--trust_remote_code", type=to_bool, default=False, metavar="true|false",
        help="run Python code that the checkpoint's folder ships")  # fmt: skip
    return parser


def check(config: Config) -> Path:
    """The intents file. Raises UserError for paths that are not there and numbers that cannot be."""
    for name in ("orders", "batch_size", "max_new_tokens"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name} is {getattr(config, name)}, expected 0 or more")
    if config.orders > 1 and not config.constrain:
        raise UserError("--orders goes with --constrain true; leave it out")
    model = Path(config.model_name_or_path)
    if not Checkpoint(model).is_whole and not Checkpoint(model).is_adapter:
        raise UserError(f"{model} holds no model; expected the output_path of chat_main.sh or a checkpoint folder")
    if bool(config.input_file) == bool(config.question):
        raise UserError("give either --input_file or --question")
    for name in ("output_file", "unconstrained_file"):
        check_output(f"--{name}", getattr(config, name), config, model)
    if config.unconstrained_file:
        if not (config.constrain and config.output_file):
            raise UserError("--unconstrained_file goes with --output_file and --constrain true; leave it out")
        if files.real(Path(config.unconstrained_file)) == files.real(Path(config.output_file)):
            raise UserError(f"--unconstrained_file is the --output_file {config.output_file}; choose another one")
    if config.intents_file:
        return Path(config.intents_file)
    beside = model / INTENTS_NAME
    return beside if files.is_file(beside) or model.name != "merged" else model.parent / INTENTS_NAME


def check_output(flag: str, name: str, config: Config, model: Path) -> None:
    """Raise UserError for a file to write that is the input, or would replace a part of the model."""
    if not name:
        return
    path = Path(name)
    if config.input_file and files.real(path) == files.real(Path(config.input_file)):
        raise UserError(f"{flag} is the input file {config.input_file}; choose another one")
    replaces = files.is_folder(path) or (os.path.exists(path) and path.suffix != ".jsonl")
    if replaces and files.same_or_inside(path, model):
        raise UserError(f"{flag} {path} is a part of the model; choose another name, such as predictions.jsonl")


def check_length(prompts: Sequence[int], answers: Sequence[int], queries: Sequence[Query], length: int | None) -> None:
    """Raise UserError when a prompt with its longest answer, both in tokens, is longer than the model was made for."""
    worst = max(range(len(prompts)), key=lambda i: prompts[i] + answers[i], default=None)
    if worst is not None and length and prompts[worst] + answers[worst] > length:
        raise UserError(
            f"the question {files.shown(queries[worst].question, 40)} makes {prompts[worst]} prompt tokens and up "
            f"to {answers[worst]} of answer, more than the model's {length}; shorten it, or train with fewer candidates"
        )


def most_written(config: Config, chat: ChatFormat) -> int:
    """The most tokens of an answer without constraint."""
    return int(config.max_new_tokens or chat.family.generation["max_new_tokens"])


def longest_answers(config: Config, catalog: Catalog, queries: Sequence[Query], chat: ChatFormat) -> list[int]:
    """The most tokens that the answer to each query can have."""
    if not config.constrain:
        return [most_written(config, chat)] * len(queries)
    sizes, longest = dict[str, int](), dict[int | None, int]()
    for query in queries:
        if query.variant not in longest:
            answers = catalog.answers(query.variant)
            new = [answer for answer in answers if answer not in sizes]
            sizes.update(zip(new, map(len, candidate_tokens(chat, query.prompt, new)), strict=True))
            longest[query.variant] = max(sizes[answer] for answer in answers)
    return [longest[query.variant] for query in queries]


def predict(
    config: Config, catalog: Catalog, queries: Sequence[Query], model: ChatModel, generator: "Generator"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, prediction without its question) for every query."""
    from llmops.generation.choice_search import Tree

    chat, length = model.chat, model.checkpoint.length
    if len(queries) > QUERIES_AT_ONCE:  # all lengths are checked now, and nobody waits for the last part to learn it
        sizes = [len(chat.prompt(query.prompt)) for query in queries]
        check_length(sizes, longest_answers(config, catalog, queries, chat), queries, length)
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            part = predict(config, catalog, queries[start : start + QUERIES_AT_ONCE], model, generator)
            for i, predicted in part:
                yield start + i, predicted
        return
    prompts = [chat.prompt(query.prompt) for query in queries]
    if config.constrain:
        variants = {query.variant: query.prompt for query in queries}
        tokens = {v: candidate_tokens(chat, prompt, catalog.answers(v)) for v, prompt in variants.items()}
        trees = {v: Tree(found) for v, found in tokens.items()}
        longest = {v: max(map(len, found)) for v, found in tokens.items()}
        check_length([*map(len, prompts)], [longest[query.variant] for query in queries], queries, length)
        answers = {v: catalog.answers(v) for v in variants}
        best = catalog.retrieval.get("candidates", 1) + 1  # of a found list all, for --join
        for i, choice in generator.choose(prompts, [trees[query.variant] for query in queries], max(2, best)):
            named = [(answers[queries[i].variant][k], p) for k, p in choice.ranked]
            shares = {"probabilities": {name: round(p, 6) for name, p in named}} if catalog.retrieval else {}
            yield i, top_prediction(catalog, named) | shares
        return
    limit = most_written(config, chat)
    check_length([*map(len, prompts)], [limit] * len(queries), queries, length)
    for i, answer in generator.generate(prompts, limit, chat.stop_ids()):
        text = chat.tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
        known = text in catalog.answers(queries[i].variant)
        yield i, prediction(catalog, (text, answer.probability), None, known) | {"constrained": False}


def read_joint(config: Config, catalog: Catalog) -> "Joint | None":
    """The linear classifier that predictions are joined with, None without --join_file. Raises UserError where
    faq/score kept weights and it is missing, or the other way round."""
    joins = "linear" in catalog.decision
    if config.join_file and not config.use_threshold:
        raise UserError("--use_threshold false asks for what the model alone says; leave out --join_file")
    if joins != bool(config.join_file) and config.constrain:
        raise UserError(
            "the intents file keeps weights for model and linear classifier together; pass --join_file (and the same "
            "--embedding_model as to faq/score)" if joins else
            "--join_file needs weights in the intents file: faq/score.sh --join true --keep_threshold true keeps them"
        )  # fmt: skip
    if not joins or not config.constrain:
        return None
    from llmops.intents.joined import open_joint

    return open_joint(catalog, config.join_file, config.embedding_model)


def keys_of(config: Config, catalog: Catalog, queries: Sequence[Query], model: ChatModel, dtype: str) -> list[str]:
    """What each prediction depends on, as a hash: model, list of intents, prompt, settings."""
    checkpoint = model.checkpoint
    name = fingerprint([checkpoint.folder, checkpoint.base.folder, *checkpoint.adapters], dtype)
    shared = [name, catalog.to_json(), config.mode, config.constrain, config.max_new_tokens]
    before = hashlib.sha256(json.dumps(shared).encode())

    def key(query: Query) -> str:
        digest = before.copy()
        digest.update(json.dumps([query.prompt, catalog.answers(query.variant)]).encode())
        return digest.hexdigest()[:32]

    return [key(query) for query in queries]


def kept_prediction(value: Any) -> dict[str, Any] | None:
    """The prediction in a line that an earlier run kept."""
    good = isinstance(value, dict) and isinstance(value.get("key"), str) and isinstance(value.get("prediction"), dict)
    return value if good and isinstance(value["prediction"].get("intent"), str) else None


@dataclass(frozen=True)
class Opened:
    """What is asked, the same in several orders of the candidates, and the model that answers."""

    catalog: Catalog
    queries: list[Query]
    turned: list[Query]
    model: ChatModel
    generator: "Generator"
    dtype: str


def open_all(config: Config, processes: Processes) -> tuple[Opened, "Joint | None"]:
    """Read the questions, load the model; and the classifier that it is joined with."""
    cpu_kernels.settle(config.cpu_kernels)
    # 1. what is asked
    catalog = load_catalog(check(config))
    if not config.use_threshold:
        catalog = replace(catalog, decision={})
    queries = read_queries(config, catalog)
    turned, orders = queries, 1
    if config.constrain:
        turned, orders = in_orders(catalog, queries, config.orders, config.embedding_model)
    joint = read_joint(config, catalog) if processes.first else None
    # 2. from here on the heavy libraries
    devices.tune_cpu()
    with quick_imports():
        import torch  # noqa: F401
        import transformers

    device = devices.choose_device(0, processes)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(config.model_name_or_path)
    model = ChatModel(Checkpoint(folder, config.mode or catalog.mode, config.trust_remote_code))
    chat = model.chat
    size = config.batch_size or chat.family.generation["batch_size"]
    dtype = devices.choose_dtype(config.dtype)
    generator = model.generator(dtype, device, size, config.reuse_prefix)
    how = f"prompts computed anew each time, because {generator.plain_because}" if generator.plain_because else ""
    if processes.first:
        log(f"{chat.name}; {len(queries)} questions, {len(catalog.intents)} intents" + (f"; {how}" if how else ""))
        if orders > 1:
            log(f"each question is asked in {orders} orders of its candidates")
    return Opened(catalog, queries, turned, model, generator, str(dtype)), joint


def answer(config: Config, processes: Processes, opened: Opened, what: str = "questions") -> list[dict[str, Any]]:
    """The predictions in the order of the questions, in the first process; `what` progress counts.

    Each is kept beside --output_file as soon as it is known; the same command goes on there.
    """
    catalog, queries, model = opened.catalog, opened.queries, opened.model
    output = Path(config.output_file)
    keeper = Kept(output.parent if config.output_file else None, processes.rank, kept_prediction)
    keys, name = keys_of(config, catalog, queries, model, opened.dtype), f".{output.name}"

    def earlier() -> dict[int, dict[str, Any]]:
        kept = keeper.kept(name)
        return {i: kept[key]["prediction"] for i, key in enumerate(keys) if key in kept}

    found = processes.from_first(earlier)
    if found and processes.first:
        log(f"{len(found)} of {len(queries)} predictions are beside {config.output_file} already")
    started, fresh = time.monotonic(), {}
    mine = processes.share([i for i in range(len(queries)) if i not in found])
    todo = predict(config, catalog, [queries[i] for i in mine], model, opened.generator) if mine else iter(())
    with keeper.appender(name) as keep:
        for k, predicted in progress(todo, "predicting", len(mine), what, not processes.first):
            fresh[mine[k]] = predicted
            keep({"key": keys[mine[k]], "prediction": predicted})
            processes.look()
    fresh = processes.gather(fresh)
    if not processes.first:
        return []
    log(took(len(fresh), time.monotonic() - started, what))
    found |= fresh
    return [{"question": query.question} | found[i] | query.known for i, query in enumerate(queries)]


def lines_of(predictions: list[dict[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json_text.dumps(found) + "\n" for found in predictions)


def write(output: Path, text: str) -> None:
    """Write the file of predictions and drop what was kept beside it."""
    files.write_text(output, text)
    Kept(output.parent, 0, kept_prediction).drop(f".{output.name}")
    log(f"predictions in {output}")


def run(config: Config, processes: Processes) -> Iterator[tuple[Config, list[dict[str, Any]]]]:
    """(settings, predictions) of what is asked; then of the same without holding to known intents, if that is, too."""
    opened, joint = open_all(config, processes)
    several = len(opened.turned) > len(opened.queries)
    rows = answer(config, processes, replace(opened, queries=opened.turned), "prompts" if several else "questions")
    if len(rows) > len(opened.queries):
        rows = as_one(opened.catalog, rows, opened.queries)
    if joint:
        texts, variants = [query.question for query in opened.queries], [query.variant for query in opened.queries]
        rows = joint.join(rows, texts, opened.catalog, variants)
    yield config, [decide(opened.catalog, row) for row in rows]
    if config.unconstrained_file:
        config = replace(config, constrain=False, output_file=config.unconstrained_file)
        yield config, [decide(opened.catalog, row) for row in answer(config, processes, opened)]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print or write."""

    def body() -> int:
        options = vars(build_parser().parse_args(argv))
        config = Config(**(options | {"question": tuple(options["question"])}))
        processes = Processes()
        with stdout_to_stderr(), processes.connected():
            for asked, predictions in run(config, processes):
                if processes.first and asked.output_file:
                    write(Path(asked.output_file), lines_of(predictions))
        if processes.first and not config.output_file:
            write_stdout(lines_of(predictions))
        return 0

    return run_main(body, speaks=os.environ.get("LOCAL_RANK", "0") == "0")


if __name__ == "__main__":
    sys.exit(main())
