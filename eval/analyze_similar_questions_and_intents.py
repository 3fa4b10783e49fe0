"""Which questions of FAQ data are alike and have different intents: mislabelled, or two names for one intent.

python eval/analyze_similar_questions_and_intents.py --help        every setting
Prints one JSON object on stdout: {"code": 0, "msg": "Success", "data": {"mismatched_intents": [{"questionPair",
"intent1", "intent2", "answer1", "answer2", "lineNumbers"}], "similar_intents": [{"intentPair", "lineNumbers"}]}}. When
something is wrong the code is not 0, msg says what, and the exit code is the same: 2 for what the user can mend, 1 for
everything else.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmops import files
from llmops.console import (
    FailureJson,
    Parser,
    RunStopped,
    UserError,
    check_packages,
    has_gpu,
    log,
    print_json,
    run_main,
    stdout_to_stderr,
    to_bool,
)  # fmt: skip
from llmops.embedding import ngrams
from llmops.machine import cpu_kernels, devices
from llmops.machine.sharing import Processes

if TYPE_CHECKING:
    import numpy as np

    from eval.similar.findings import Findings
    from llmops.embedding.encoder import Encoder


@dataclass(frozen=True)
class Config:
    """What to compare and how."""

    data_file_path: Path
    model_path: str
    similarity_threshold: float
    intent_similarity_threshold: float
    report: Path | None
    plot: Path | None
    cache_dir: str
    gpu_id: int
    dtype: str
    cpu_kernels: str
    max_pairs: int
    skip_bad_lines: bool
    trust_remote_code: bool
    output_file: Path | None


def build_parser() -> argparse.ArgumentParser:
    """Every setting with its default."""
    parser = Parser(
        prog="analyze_similar_questions_and_intents.py", allow_abbrev=False,
        description="Find similar questions with different intents.",
    )  # fmt: skip
    add = parser.add_argument
    add("--data_file_path", "--dataset", required=True, help="questions with intents: a JSON array, JSON lines or csv")
    add("--dataset_type", default="faq", choices=["faq"], help="the kind of data; faq is the only one")
    add("--output_file", default="", metavar="FILE.json", help="write what is printed there, too")
    add("--model_path", "--model_name", required=True,
        help=f"folder of a sentence-transformers model or a BERT; {ngrams.NAME}: wording only, no model")  # fmt: skip
    add("--similarity_threshold", type=float, default=0.91, help="questions this similar are compared by intent")
    add("--intent_similarity_threshold", type=float, default=0.86, help="intents this similar probably mean the same")
    add("--report", default="", metavar="FILE.html", help="a page for people; empty: none")
    add("--plot", default="", metavar="FILE.png", help="heat map of the most confused intents; empty: none")
    add("--cache_dir", default="", help="folder for vectors that were computed; empty: ~/.cache/llmops/embeddings")
    add("--gpu_id", type=int, default=0, help="number of the GPU; -1: CPU; without any GPU 0 is the CPU too")
    add("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="of the model's weights")
    add("--cpu_kernels", default="auto", choices=cpu_kernels.SETTINGS, help=cpu_kernels.HELP)
    add("--max_pairs", type=int, default=10_000_000, help="more pairs than this are an error, never left out silently")
    add("--skip_bad_lines", type=to_bool, default=False, metavar="true|false", help="drop and count bad lines")
    add("--trust_remote_code", type=to_bool, default=False, metavar="true|false",
        help="run Python code that the model's folder ships")  # fmt: skip
    return parser


def parse(argv: Sequence[str] | None) -> Config:
    """The configuration that command line arguments describe; all that is wrong with it in one sentence."""
    given = build_parser().parse_args(argv)
    problems = []
    for name in ("similarity_threshold", "intent_similarity_threshold"):
        value = getattr(given, name)
        if not 0 <= value <= 1:
            problems.append(f"--{name} is {value}, expected a number from 0 to 1")
    if given.gpu_id < -1:
        problems.append(f"--gpu_id is {given.gpu_id}, expected a GPU's number, or -1 for the CPU")
    if given.gpu_id > 0 and not has_gpu():
        problems.append(f"--gpu_id {given.gpu_id} does not exist: no GPU is visible here; 0 and -1 run on the CPU")
    if given.max_pairs < 1:
        problems.append(f"--max_pairs is {given.max_pairs}, expected 1 or more")
    if given.model_path.startswith("builtin:") and given.model_path != ngrams.NAME:
        problems.append(f"--model_path is {given.model_path}, expected a folder or {ngrams.NAME}")
    for name in ("report", "plot", "output_file"):
        problem = files.target_problem(Path(getattr(given, name))) if getattr(given, name) else None
        problems += [f"--{name} {problem}"] if problem else []
    if problems:
        raise UserError("; ".join(problems))
    refuse_others(given.report, given.plot)
    return Config(
        Path(given.data_file_path), given.model_path, given.similarity_threshold, given.intent_similarity_threshold,
        Path(given.report) if given.report else None, Path(given.plot) if given.plot else None, given.cache_dir,
        given.gpu_id, given.dtype, given.cpu_kernels, given.max_pairs, given.skip_bad_lines, given.trust_remote_code,
        Path(given.output_file) if given.output_file else None,
    )  # fmt: skip


def refuse_others(report: str, plot: str) -> None:
    """Raise UserError where the page or the picture would replace a file that is neither."""
    if report:
        from eval.similar import html_report

        html_report.refuse_other(Path(report))
    if plot:
        from llmops import pictures

        pictures.refuse_other(Path(plot))


def choose_device(gpu_id: int, processes: Processes) -> str:
    """The device as torch names it: the GPU asked for, or one per process. torch is not imported where no GPU is."""
    if gpu_id < 0 or not has_gpu():
        return "cpu"
    return str(devices.choose_device(gpu_id, processes, "--gpu_id"))


def vectors_of(config: Config, texts: list[str], device: str, processes: Processes) -> "np.ndarray | None":
    """Unit vectors (n, d) float32 of different texts; None in every process but the first.

    Several processes compute a part each and meet in the cache; the first one reads all of them there.
    """
    if config.model_path == ngrams.NAME:
        if not processes.first:
            return None
        log(f"{ngrams.NAME} compares wording, not meaning; name a sentence embedding model with --model_path")
        return ngrams.ngram_vectors(texts)
    from llmops.embedding.cache import Cache, default_cache, embed
    from llmops.embedding.folder import read_folder

    folder = read_folder(Path(config.model_path), config.trust_remote_code)
    place = Path(config.cache_dir) if config.cache_dir else default_cache()

    def load() -> "Encoder":
        from llmops.embedding.encoder import Encoder

        return Encoder(folder, device, config.dtype, config.trust_remote_code)

    cache = Cache(place, folder, config.dtype, bool(config.cache_dir))
    if processes.count > 1:
        mine = processes.share(range(len(texts)))
        if mine:
            embed([texts[k] for k in mine], cache, load)
        processes.from_first(bool)  # all parts are there
    return embed(texts, cache, load) if processes.first else None


def run(config: Config, processes: Processes) -> "Findings | None":
    """Read, embed, compare, write the page and the picture; None in every process but the first."""
    started = time.monotonic()
    cpu_kernels.settle(config.cpu_kernels)
    # 1. everything that can be wrong without the model
    from eval.similar.questions import read_questions

    if config.model_path != ngrams.NAME:
        from llmops.embedding.folder import read_folder

        read_folder(Path(config.model_path), config.trust_remote_code)
    check_packages("numpy", "torch")
    questions = read_questions(config.data_file_path, config.skip_bad_lines)
    # 2. one vector per different text, intents included
    device = choose_device(config.gpu_id, processes)
    own = set(questions.texts)
    texts = questions.texts + [intent for intent in questions.intents if intent not in own]
    vectors = vectors_of(config, texts, device, processes)
    if vectors is None:
        return None
    place = {text: i for i, text in enumerate(texts)}
    intent_vectors = vectors[[place[intent] for intent in questions.intents]]
    # 3. the pairs
    from eval.similar.findings import find
    from eval.similar.search import similar_pairs

    compared = time.monotonic()
    count = len(questions.texts)
    pairs = similar_pairs(
        vectors[:count], config.similarity_threshold, questions.text_intent, config.max_pairs, device
    )  # fmt: skip
    found = find(questions, pairs, intent_vectors, config.intent_similarity_threshold, config.max_pairs)
    merge, seconds = int(found.merge.sum()), time.monotonic() - compared
    log(f"{len(found.a)} pairs reach {config.similarity_threshold} and differ in their intents ({seconds:.1f} s):")
    log(f"  {len(found.a) - merge} with different intents (mismatched_intents), {merge} with similar_intents")
    if len(found.a):
        log("  lineNumbers count records from 0; a file's lines count from 1")
    # 4. for people
    present(found, config)
    log(f"done in {time.monotonic() - started:.1f} s")
    return found


def present(found: "Findings", config: Config) -> None:
    """Write the page and the picture that were asked for."""
    if config.report:
        from eval.similar.html_report import write_report

        write_report(found, config.report, str(config.data_file_path), config.model_path,
                     config.similarity_threshold, config.intent_similarity_threshold)  # fmt: skip
        log(f"page in {config.report}")
    if config.plot:
        from eval.similar.heatmap import draw

        draw(found, config.plot)
        log(f"heat map in {config.plot}")


def say(found: "Findings", output_file: Path | None = None) -> int:
    """Print the documented JSON; the exit code: 1 when its reader (head, say) closed the pipe before the end."""
    from eval.similar.findings import json_parts

    code = 0
    try:
        sys.stdout.writelines(json_parts(found))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again at its end
        code = 1
    except OSError as error:
        raise RunStopped(f"stdout cannot be written ({error.strerror})") from error
    if output_file:
        with files.writing(output_file) as stream:
            stream.writelines(json_parts(found))
    return code


def failure(code: int, message: str) -> None:
    """The documented JSON for what went wrong."""
    data: dict[str, list[str]] = {"mismatched_intents": [], "similar_intents": []}
    print_json({"code": code, "msg": message, "data": data})


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""

    speaks = True

    def fail(code: int, message: str) -> None:
        if speaks:
            failure(code, message)

    def body() -> int:
        nonlocal speaks
        with FailureJson(fail):
            processes = Processes()
            speaks = processes.first
            config = parse(argv)
            with stdout_to_stderr(), processes.connected():
                found = run(config, processes)
        return say(found, config.output_file) if found else 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
