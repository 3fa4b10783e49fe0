"""How well does a model answer a data set of conversations: exact match, F1, BLEU, ROUGE.

python eval/model_performance_evaluation.py --help        every setting
Every assistant turn of the data is a reference for the turns before it. Prints one JSON object on stdout:
{"code": 0, "msg": "Success", "data": {"evaluation_results": {"Rouge": 0.88}}}. When something is wrong the code is not
0, msg says what, and the exit code is the same: 2 for what the user can mend, 130 and 143 when Ctrl-C or SIGTERM ended
it, 1 for everything else.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.answers import PERFORMANCE
from eval.engine import Engine, Settings, check, owned
from eval.interrupts import Interrupts
from eval.metrics import METRICS, language
from eval.prompts import Prepared, nothing_fits
from eval.samples import Answer, Sample, draw, rows_of, summarise
from eval.thoughts import after_thought, thought_note
from llmops import files, json_text
from llmops.console import (
    FailureJson,
    Parser,
    Terminated,
    UserError,
    log,
    print_json,
    run_main,
    stdout_to_stderr,
    to_bool,
)
from llmops.conversations import data_files
from llmops.conversations.data_files import list_files, read_chunks, read_conversations
from llmops.conversations.records import Problem, problems_error
from llmops.formats.families import families
from llmops.keyboard import instead
from llmops.machine import cpu_kernels
from llmops.machine.sharing import Processes

NAME = "model_performance"
PREDICTION = {"answer", "gold"}  # keys of a row that holds a prediction


@dataclass(frozen=True)
class Config:
    """What to evaluate and how."""

    dataset_path: str
    metrics: tuple[str, ...]
    max_new_tokens: int
    limit: int
    seed: int
    settings: Settings


def build_parser() -> argparse.ArgumentParser:
    """Every setting with its default."""
    parser = Parser(
        prog="model_performance_evaluation.py", description="Score a model on a data set.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_name_or_path", default="mnt/output_path", help="whole model, merged model or adapter folder")
    add("--adapter", default="", help="an adapter's folder, put on the model")
    add(
        "--dataset_path",
        default="mnt/datasets/test.jsonl",
        help="conversations, as for training; or rows of answer and gold, which are scored without a model",
    )
    add("--evaluation_metrics", action="append", default=[],
        help=f'some of {", ".join(METRICS)}: "Acc,Rouge", repeated, or a JSON list; default: Rouge')  # fmt: skip
    add("--max_seq_len", type=to_length, default=0, metavar="N|auto",
        help="prompt and answer together; longer prompts are cut and counted; auto: what the data needs, as far as "
        "the model can")  # fmt: skip
    add("--max_new_tokens", type=int, default=256, help="longest answer; those that run into it are counted")
    add("--per_device_batch_size", type=int, default=10, help="prompts per pass; halved when memory runs out")
    add("--gpu_id", type=int, default=0, help="number of the GPU; -1: CPU; without any GPU 0 is the CPU too")
    add("--output_path", default="", help="folder for eval_results.json and the answers; empty: nothing is written")
    add("--limit", type=int, default=0, help="evaluate so many samples, drawn with the seed; 0: all")
    add("--seed", type=int, default=0, help="of the draw and the bootstrap")
    add("--mode", default="auto", choices=list(families()), help="chat format; auto: the checkpoint's own")
    add("--chat_template", type=to_bool, default=True, metavar="true|false", help="false: ask in plain text")
    add("--enable_thinking", default="auto", choices=["auto", "true", "false"],
        help="what a thinking model's chat template is told; auto: as in its training")  # fmt: skip
    add("--reuse_prefix", type=to_bool, default=True, metavar="true|false",
        help="compute what prompts share once; false: each prompt anew")  # fmt: skip
    add("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="auto: bf16 where the GPU has it")
    add("--cpu_kernels", default="auto", choices=cpu_kernels.SETTINGS, help=cpu_kernels.HELP)
    add("--trust_remote_code", type=to_bool, default=False, metavar="true|false",
        help="run Python code that the checkpoint's folder ships")  # fmt: skip
    return parser


def to_length(text: str) -> int:
    """A number of tokens from 1, or 0 for `auto`."""
    if text.strip().lower() == "auto":
        return 0
    try:
        length = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of tokens or auto") from None
    if length < 1:
        raise argparse.ArgumentTypeError(f"max_seq_len is {length}; expected a whole number from 1, or auto")
    return length


def parse(argv: Sequence[str] | None) -> Config:
    """The configuration that command line arguments describe."""
    given = build_parser().parse_args(argv)
    for name, least in (("limit", 0), ("max_new_tokens", 1), ("seed", 0)):
        if getattr(given, name) < least:
            raise UserError(f"--{name} is {getattr(given, name)}; expected {least} or more")
    settings = Settings(
        model=given.model_name_or_path, adapter=given.adapter, max_seq_len=given.max_seq_len,
        batch_size=given.per_device_batch_size, gpu_id=given.gpu_id, mode=given.mode, dtype=given.dtype,
        cpu_kernels=given.cpu_kernels, chat_template=given.chat_template, reuse_prefix=given.reuse_prefix,
        trust_remote_code=given.trust_remote_code, output_path=given.output_path,
        enable_thinking=given.enable_thinking,
    )  # fmt: skip
    return Config(
        given.dataset_path, read_metrics(given.evaluation_metrics), given.max_new_tokens, given.limit, given.seed,
        settings,
    )  # fmt: skip


def read_metrics(texts: Sequence[str]) -> tuple[str, ...]:
    """The metrics asked for, each once, in the order asked: `Acc,Rouge`, several texts, or a JSON list."""
    names: list[str] = []
    for text in texts or ["Rouge"]:
        if text.lstrip().startswith("["):
            try:
                listed = json_text.parse_json(text)
            except json_text.BadJson as error:
                raise UserError(f"--evaluation_metrics {text!r} is no JSON list ({error})") from error
        else:
            listed = text.split(",")
        names += [name.strip() if isinstance(name, str) else repr(name) for name in listed]
    known = {name.lower(): name for name in METRICS}
    unknown = [name for name in names if name.lower() not in known]
    if unknown or not names:
        found = ", ".join(map(repr, unknown)) or "nothing"
        raise UserError(f"--evaluation_metrics: found {found}, expected some of {', '.join(METRICS)}{instead(found)}")
    return tuple(dict.fromkeys(known[name.lower()] for name in names))


def read_samples(path: Path) -> list[Sample]:
    """One sample per assistant turn. Raises UserError for a file that is not there, empty, or has a bad line."""
    missing = [one for one in list_files(str(path)) if not os.path.lexists(one)]
    if missing:
        raise UserError(f"the data set {missing[0]} does not exist; expected a file of conversations")
    samples: list[Sample] = []
    problems = []
    rows = 0
    for read in read_conversations(list_files(str(path))):
        rows += 1
        if isinstance(read, Problem):
            problems.append(read)
            continue
        if not read.conversation.plain:
            problems.append(
                Problem(read.path, read.number, "it has tools, and answers are scored without; take it out")
            )
            continue
        messages = read.conversation.messages
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = tuple(messages[: i - 1])
                question, reference = messages[i - 1]["content"], after_thought(message["content"])
                if not reference and message["content"]:
                    problems.append(Problem(read.path, read.number, "an answer is only a thought; take it out"))
                samples.append(Sample("", (reference,), passage=question, history=before))
    if problems:
        text = str(problems_error(path, problems, rows))
        raise UserError(text.replace(" or pass --skip_bad_lines true to drop and count them", ""))
    if not samples:
        raise UserError(f"{path} has no assistant turn to compare with; expected conversations with 'messages'")
    return samples


def read_predictions(path: Path) -> list[tuple[str, str]]:
    """(answer, gold) of every row of a file of predictions; empty for a file of conversations.

    Raises UserError that names every row that is none, where the first one is.
    """
    pairs: list[tuple[str, str]] = []
    problems: list[Problem] = []
    count = 0
    for chunk in read_chunks(list_files(str(path))):
        for number, value, unreadable in data_files.rows_of(chunk):
            count += 1
            row = value if isinstance(value, dict) else {}
            if count == 1 and not row.keys() >= PREDICTION:
                return []
            if unreadable or not all(isinstance(row.get(key), str) for key in PREDICTION):
                found = unreadable or 'found no texts under "answer" and "gold"'
                problems.append(Problem(chunk.path, number, f"{found}; expected them as in the other rows"))
            else:
                pairs.append((after_thought(row["answer"]), after_thought(row["gold"])))
    if problems:
        text = str(problems_error(path, problems, count))
        raise UserError(text.replace(" or pass --skip_bad_lines true to drop and count them", ""))
    return pairs


def score_predictions(config: Config, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """The score by metric of answers that another program gave; no model is asked."""
    log(f"{config.dataset_path}: {len(pairs):,} answers with their gold; they are scored, no model is asked")
    pairs = draw(pairs, config.limit, config.seed)
    if config.settings.output_path:
        log("--output_path has no effect: no report is written of answers that another program gave")
    scores = [
        {name: value for metric in config.metrics for name, value in METRICS[metric](answer, [gold]).items()}
        for answer, gold in pairs
    ]
    figures = summarise(scores, config.seed)
    return {metric: round(figures[metric]["mean"], 4) for metric in config.metrics}


def run(config: Config, processes: Processes, interrupts: Interrupts) -> dict[str, float]:
    """Answer every prompt, score the answers, write the reports; score by metric."""
    started = time.monotonic()
    if files.is_file(Path(config.dataset_path)):
        pairs = read_predictions(Path(config.dataset_path))
        if pairs:
            return score_predictions(config, pairs)
    # 1. everything that can be wrong without the weights
    check(config.settings)
    samples = draw(read_samples(Path(config.dataset_path)), config.limit, config.seed)
    with owned(config.settings.output_path, [NAME], processes):
        engine = Engine(config.settings, processes)
        prepared: Prepared | None = None
        try:
            with interrupts.computing():
                prepared = prepare(engine, samples, config.max_new_tokens)
                # 2. the answers
                answers = engine.answer(prepared)
        except Terminated as ended:
            raise Ended(ended.code, engine.how_far(prepared)) from ended
        if not processes.first:
            return {}
        # 3. the scores and reports
        return report(config, engine, prepared, answers, started)


class Ended(Terminated):
    """Ended by a signal; `message` says how far it was."""

    def __init__(self, code: int, far: str) -> None:
        super().__init__(code)
        self.message = f"ended by {'Ctrl-C' if code == 130 else 'SIGTERM'}: {far}"


def prepare(engine: Engine, samples: Sequence[Sample], max_new_tokens: int) -> Prepared:
    """The prompts as tokens. Raises UserError when none fits."""
    prepared = engine.prepare(NAME, samples, max_new_tokens)
    if not prepared.samples:
        raise nothing_fits(prepared, prepared.length)
    return prepared


def report(
    config: Config, engine: Engine, prepared: Prepared, answers: Sequence[Answer], started: float
) -> dict[str, float]:
    """The score by metric, rounded, after the reports were written."""
    samples = prepared.samples
    scores = [
        {name: value for metric in config.metrics
         for name, value in METRICS[metric](answer.text, sample.references).items()}
        for sample, answer in zip(samples, answers, strict=True)
    ]  # fmt: skip
    figures = summarise(scores, config.seed)
    results = {metric: round(figures[metric]["mean"], 4) for metric in config.metrics}
    languages = by_language(samples, scores, config.metrics)
    counts = {
        "samples": len(samples), "left_out": len(prepared.left_out), "prompts_cut": sum(a.cut for a in answers),
        "empty_answers": sum(not a.text for a in answers), "answers_at_the_limit": sum(not a.ended for a in answers),
        "answers_in_thought": sum(a.in_thought for a in answers),
    }  # fmt: skip
    tell(counts, prepared, languages)
    seconds = time.monotonic() - started
    log(f"{len(samples)} answers in {seconds:.1f} s; " + ", ".join(f"{k} {v:.4f}" for k, v in results.items()))
    engine.finish(NAME, rows_of(samples, answers, scores))
    if config.settings.output_path:
        from eval.report import write_results

        more = {
            "dataset_path": config.dataset_path, "limit": config.limit, "seed": config.seed,
            "max_new_tokens": config.max_new_tokens, "max_seq_len": prepared.length,
            "evaluation_results": results, "metrics": figures, "by_language": languages,
            "baselines": {"echo of the question": echo_baseline(samples, config.metrics)}, "counts": counts,
        }  # fmt: skip
        write_results(engine, PERFORMANCE, seconds, more)
    return results


def tell(counts: dict[str, int], prepared: Prepared, languages: dict[str, dict[str, float]]) -> None:
    """What a reader of the scores must know, on stderr."""
    asked = counts["samples"]
    if counts["left_out"]:
        cure = prepared.too_short(prepared.needed) or f"with max_seq_len {prepared.needed} none is"
        log(
            f"{counts['left_out']} of {asked + counts['left_out']} prompts do not fit into {prepared.length} tokens "
            f"even without their question and are left out of the score; {cure}"
        )
    if counts["prompts_cut"]:
        log(f"{counts['prompts_cut']} of {asked} prompts were longer than max_seq_len allows and were cut")
    if counts["empty_answers"]:
        log(f"{counts['empty_answers']} of {asked} answers are empty")
    if counts["answers_in_thought"]:
        log(thought_note(counts["answers_in_thought"], asked))
    if counts["answers_at_the_limit"]:
        log(f"{counts['answers_at_the_limit']} of {asked} answers ran into the limit of tokens (--max_new_tokens)")
    for name, found in languages.items():
        log(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found.items()))


def by_language(
    samples: Sequence[Sample], scores: Sequence[dict[str, float]], metrics: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Scores by the references' language (`zh` or `other`) where a set has both; else nothing."""
    rows: dict[str, list[dict[str, float]]] = {}
    for sample, row in zip(samples, scores, strict=True):
        rows.setdefault(language(sample.references[0]), []).append(row)
    if len(rows) < 2:
        return {}
    return {
        name: {"samples": len(found)} | {m: round(sum(row[m] for row in found) / len(found), 4) for m in metrics}
        for name, found in sorted(rows.items(), reverse=True)
    }


def echo_baseline(samples: Sequence[Sample], metrics: Sequence[str]) -> dict[str, float]:
    """What a program would score that says the question again: a model must do better."""
    scores = [[METRICS[metric](sample.passage, sample.references)[metric] for metric in metrics] for sample in samples]
    return {metric: round(sum(row[k] for row in scores) / len(scores), 4) for k, metric in enumerate(metrics)}


def answer_json(code: int, message: str, results: dict[str, float]) -> dict[str, Any]:
    """The documented shape."""
    return {"code": code, "msg": message, "data": {"evaluation_results": results}}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    speaks = True

    def say(code: int, message: str, results: dict[str, float] | None = None) -> None:
        if speaks:
            print_json(answer_json(code, message, results or {}))

    def body() -> int:
        nonlocal speaks
        with FailureJson(say):
            processes = Processes()
            speaks = processes.first
            config = parse(argv)
            try:
                with stdout_to_stderr(), processes.connected(), Interrupts() as interrupts:
                    results = run(config, processes, interrupts)
            except Ended as ended:
                say(ended.code, ended.message)
                raise
        say(0, "Success", results)
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
