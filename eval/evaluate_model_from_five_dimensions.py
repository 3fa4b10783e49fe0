"""A chat model in five dimensions: inference, reading, Chinese, following instructions, knowledge of many subjects.

python eval/evaluate_model_from_five_dimensions.py MODEL '["inference_ability", ...]' '{"max_seq_len": 512, ...}'
Prints {"evaluation_results": {"inference_ability": 0.95, ...}, "diagnosis": {}} on stdout. diagnosis is empty when all
is well, otherwise it has, by dimension, the sentences that a reader of the scores must know.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval.dimensions import afqmc, cmrc2018, m3ke, quoref, tnews
from eval.dimensions.base import Dimension
from eval.engine import Engine, Processes, Settings, check
from eval.samples import Answer, Loaded, Sample, add_examples, draw, rows_of, spread, summarise
from llmops import files
from llmops.chat_formats import FAMILIES
from llmops.console import Parser, UserError, log, run_main, stdout_to_stderr, to_bool

DIMENSIONS: dict[str, Dimension] = {
    module.DIMENSION.name: module.DIMENSION for module in (afqmc, cmrc2018, tnews, quoref, m3ke)
}
SAMPLES = ROOT / "eval" / "eval_datasets"
ONE_CHOICE = 0.95  # a model that takes one choice so often has not read the questions


@dataclass(frozen=True)
class Options:
    """additional_parameters: every key with its default. "" and 0 mean "choose for me"."""

    max_seq_len: int = 512
    batch_size: int = 0
    num_fewshot: int = 0
    limit: int = 0
    seed: int = 0
    gpu_id: int = 0
    data_dir: str = ""
    output_path: str = ""
    adapter: str = ""
    trust_remote_code: bool = False
    chat_template: bool = True
    mode: str = "auto"
    dtype: str = "auto"
    reuse_prefix: bool = True
    compare_with: tuple[str, ...] = ()


HELP = """additional_parameters (JSON object), with their defaults:
  max_seq_len 512        tokens of prompt and answer together; longer prompts are cut, and diagnosis says so
  batch_size 0           prompts at once, 0: what memory holds; halved when it runs out; scores do not depend on it
  num_fewshot 0          solved examples before each question
  limit 0                evaluate so many samples per dimension, drawn with the seed; 0: all
  seed 0                 of the draw, the examples and the bootstrap
  gpu_id 0               number of the GPU; -1: CPU; without any GPU 0 is the CPU too
  data_dir               folder with the benchmarks' files; else mnt/datasets/eval, else the samples shipped here
  output_path            folder for eval_results.json, the answers and the radar chart; else nothing is written
  adapter                an adapter's folder, put on the model
  trust_remote_code false   run Python code that the checkpoint's folder ships
  chat_template true     false: ask in plain text, for base models
  mode auto              chat format, as --mode of chat_main.sh
  dtype auto             bf16 where the GPU has it; or bf16, fp16, fp32
  reuse_prefix true      compute what prompts share once
  compare_with           list of eval_results.json of other models to draw in the same radar chart
Exit codes: 0 done, 1 stopped on the way, 2 something you can mend (one sentence on stderr, stdout empty)."""


@dataclass(frozen=True)
class Outcome:
    """What is known of one dimension after it was asked."""

    score: float
    report: dict[str, Any]
    notes: list[str]


def build_parser() -> argparse.ArgumentParser:
    """Three positional arguments."""
    parser = Parser(
        prog="evaluate_model_from_five_dimensions.py", description="Evaluate a chat model in five dimensions.",
        epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("model", help="whole model, merged model or adapter folder")
    parser.add_argument("dimensions", nargs="?", default="", help=f"JSON list of {', '.join(DIMENSIONS)}; default: all")
    parser.add_argument("options", nargs="?", default="", help="JSON object {'additional_parameters': {...}}")
    parser.add_argument(
        "--output_path", default="", help="where to write when additional_parameters has no output_path"
    )
    return parser


def read_dimensions(text: str) -> list[Dimension]:
    """The dimensions of a JSON list, each once, in its order; all for an empty text."""
    if not text.strip():
        return list(DIMENSIONS.values())
    names = read_json_argument(text, list, '["inference_ability"]')
    unknown = [name for name in names if not isinstance(name, str) or name not in DIMENSIONS]
    if unknown or not names:
        found = ", ".join(map(repr, unknown)) or "an empty list"
        raise UserError(f"dimensions: found {found}, expected some of {', '.join(DIMENSIONS)}")
    return [DIMENSIONS[name] for name in dict.fromkeys(names)]


def read_options(text: str) -> Options:
    """The options of `{"additional_parameters": {...}}`, or of the inner object by itself."""
    if not text.strip():
        return Options()
    found = read_json_argument(text, dict, '{"additional_parameters": {"max_seq_len": 512}}')
    if "additional_parameters" in found:
        others = [key for key in found if key != "additional_parameters"]
        if others:
            raise UserError(f"unknown key {others[0]!r} beside additional_parameters; put it inside")
        found = found["additional_parameters"]
        if not isinstance(found, dict):
            raise UserError('additional_parameters is no object; expected {"max_seq_len": 512, ...}')
    defaults = vars(Options())
    unknown = [key for key in found if key not in defaults]
    if unknown:
        raise UserError(f"additional_parameters: unknown key {unknown[0]!r}; expected some of {', '.join(defaults)}")
    options = Options(**{key: as_kind(key, value, defaults[key]) for key, value in found.items()})
    if options.limit < 0 or options.num_fewshot < 0:
        raise UserError("additional_parameters: limit and num_fewshot must be 0 or more")
    if options.mode not in FAMILIES:
        raise UserError(f"additional_parameters: mode {options.mode!r}, expected one of {', '.join(FAMILIES)}")
    if options.dtype not in ("auto", "bf16", "fp16", "fp32"):
        raise UserError(f"additional_parameters: dtype {options.dtype!r}, expected auto, bf16, fp16 or fp32")
    return options


def read_json_argument(text: str, kind: type, example: str) -> Any:
    """A JSON argument of the kind that is expected."""
    try:
        found = files.parse_json(text)
    except files.BadJson as error:
        raise UserError(f"{files.shown(text)} is not JSON ({error}); expected for example {example}") from error
    if not isinstance(found, kind):
        raise UserError(f"found {files.kind_of(found)} ({files.shown(text)}), expected for example {example}")
    return found


def as_kind(key: str, value: Any, default: Any) -> Any:
    """A value of the kind its default has; on and off, true and false as text are switches too."""
    wrong = UserError(f"additional_parameters: {key} is {value!r}, expected a value like {json.dumps(default)}")
    if isinstance(default, tuple):
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            raise wrong
        return tuple(listed)
    if isinstance(default, bool) and isinstance(value, str):
        try:
            return to_bool({"on": "true", "off": "false"}.get(value.lower(), value))
        except argparse.ArgumentTypeError as error:
            raise wrong from error
    if isinstance(default, bool) != isinstance(value, bool) or not isinstance(value, type(default)):
        if isinstance(default, int) and not isinstance(default, bool) and isinstance(value, str) and is_whole(value):
            return int(value)
        raise wrong
    return value


def is_whole(text: str) -> bool:
    """Whether a text is a whole number."""
    return text.strip().removeprefix("-").isdecimal()


def find_data(dimension: Dimension, data_dir: str) -> tuple[Path, bool]:
    """(where the data is, whether it is the shipped sample)."""
    if data_dir:
        found = dimension.find(Path(data_dir))
        if found:
            return found, SAMPLES.resolve() in found.resolve().parents
        raise UserError(f"{data_dir} has no {dimension.dataset}; put there {dimension.get}")
    mounted = Path(os.environ.get("MOUNT_PATH") or ROOT / "mnt") / "datasets" / "eval"
    found = dimension.find(mounted)
    if found:
        return found, False
    shipped = dimension.find(SAMPLES)
    if not shipped:
        raise UserError(f"{SAMPLES} has no {dimension.dataset}; copy the project again")
    return shipped, True


def load_data(dimension: Dimension, options: Options) -> tuple[Loaded, Path, bool]:
    """The samples to ask, with their few-shot examples; where they are from; whether they are the shipped ones."""
    path, shipped = find_data(dimension, options.data_dir)
    loaded = dimension.read(path)
    if not loaded.samples:
        raise UserError(f"{path} holds no sample of {dimension.dataset} that can be evaluated")
    loaded = add_examples(loaded, options.num_fewshot, options.seed)
    loaded.samples = draw(loaded.samples, options.limit, options.seed)
    return loaded, path, shipped


def judge(
    dimension: Dimension, loaded: Loaded, path: Path, shipped: bool, answers: Sequence[Answer],
    scores: Sequence[dict[str, float]], seed: int,
) -> Outcome:  # fmt: skip
    """Score, report and notes of a dimension."""
    samples = loaded.samples
    figures = summarise(scores, seed)
    score = figures[dimension.metric]["mean"]
    baselines = dimension.baselines(samples, seed)
    cut = sum(answer.cut for answer in answers)
    unread = sum(dimension.unread(sample, answer) for sample, answer in zip(samples, answers, strict=True))
    report: dict[str, Any] = {
        "dataset": dimension.dataset, "path": str(path), "shipped_sample": shipped, "metric": dimension.metric,
        "score": round(score, 4), "metrics": figures, "baselines": {k: round(v, 4) for k, v in baselines.items()},
        "counts": {"samples": len(samples), "prompts_cut": cut, "answers_not_read": unread},
    }  # fmt: skip
    if samples[0].choices:
        report["spread"] = spread(samples, answers)
    if dimension.by_group:
        report["by_group"] = group_means(samples, [row[dimension.metric] for row in scores])
    notes = list(loaded.notes)
    if shipped:
        notes.insert(
            0,
            f"scored on {len(samples)} samples that ship with the toolkit, which is no {dimension.dataset} score; for "
            f"one, put {dimension.get} into mnt/datasets/eval or data_dir",
        )
    if cut:
        notes.append(f"{cut} of {len(samples)} prompts were longer than max_seq_len allows and were cut")
    if unread:
        notes.append(f"{unread} of {len(samples)} answers could not be read (nothing in them) and count as wrong")
    if samples[0].choices and len(samples) >= 10:
        letter, count = max(report["spread"]["predictions"].items(), key=lambda pair: pair[1])
        if count >= ONE_CHOICE * len(samples) and report["spread"]["references"].get(letter, 0) < count:
            notes.append(f"the model answered {letter!r} in {count} of {len(samples)} cases, whatever was asked")
    name, best = max(baselines.items(), key=lambda pair: pair[1])
    if score <= best:
        notes.append(f"{dimension.metric} {score:.3f} is not above the baseline {name!r} ({best:.3f})")
    report["notes"] = notes
    return Outcome(round(score, 4), report, notes)


def group_means(samples: Sequence[Sample], values: Sequence[float]) -> dict[str, dict[str, float]]:
    """Mean and count by group."""
    grouped: dict[str, list[float]] = {}
    for sample, value in zip(samples, values, strict=True):
        grouped.setdefault(sample.group, []).append(value)
    return {
        group: {"score": round(sum(found) / len(found), 4), "samples": len(found)} for group, found in grouped.items()
    }


def run(model: str, dimensions: Sequence[Dimension], options: Options, processes: Processes) -> dict[str, Any]:
    """Ask every dimension, score, write the reports; what is printed."""
    started = time.monotonic()
    settings = Settings(
        model=model, adapter=options.adapter, max_seq_len=options.max_seq_len, batch_size=options.batch_size,
        gpu_id=options.gpu_id, mode=options.mode, dtype=options.dtype, chat_template=options.chat_template,
        reuse_prefix=options.reuse_prefix, trust_remote_code=options.trust_remote_code,
        output_path=options.output_path,
    )  # fmt: skip
    # 1. everything that can be wrong without the model
    check(settings)
    others = read_others(options.compare_with)
    data = [load_data(dimension, options) for dimension in dimensions]
    # 2. dimension by dimension: answers, scores, the per-sample file
    engine = Engine(settings, processes)
    outcomes: dict[str, Outcome] = {}
    for dimension, (loaded, path, shipped) in zip(dimensions, data, strict=True):
        samples = loaded.samples
        answers = engine.answer(dimension.name, samples, [dimension.max_new_tokens] * len(samples))
        if not processes.first:
            continue
        scores = [dimension.score(answer.text, sample) for sample, answer in zip(samples, answers, strict=True)]
        outcomes[dimension.name] = judge(dimension, loaded, path, shipped, answers, scores, options.seed)
        engine.finish(dimension.name, rows_of(samples, answers, scores))
        log(f"{dimension.name}: {dimension.metric} {outcomes[dimension.name].score:.4f} on {len(samples)} samples")
    # 3. what is printed, and the reports
    printed = {
        "evaluation_results": {name: outcome.score for name, outcome in outcomes.items()},
        "diagnosis": {name: outcome.notes for name, outcome in outcomes.items() if outcome.notes},
    }
    if options.output_path and processes.first:
        write_reports(engine, time.monotonic() - started, printed, outcomes, options, others)
    return printed


def read_others(paths: Sequence[str]) -> list[tuple[str, dict[str, float]]]:
    """Name and scores of the models to compare with."""
    if not paths:
        return []
    from eval.report import read_scores

    return [read_scores(Path(path)) for path in paths]


def write_reports(
    engine: Engine, seconds: float, printed: Mapping[str, Any], outcomes: Mapping[str, Outcome], options: Options,
    others: Sequence[tuple[str, dict[str, float]]],
) -> None:  # fmt: skip
    """eval_results.json and the radar chart."""
    from eval.report import RADAR_NAME, draw_radar, write_results

    more = {
        **printed,
        "limit": options.limit,
        "seed": options.seed,
        "num_fewshot": options.num_fewshot,
        "dimensions": {name: outcome.report for name, outcome in outcomes.items()},
    }
    write_results(engine, "evaluate_model_from_five_dimensions", seconds, more)
    path = Path(options.output_path) / RADAR_NAME
    own = Path(options.adapter or engine.settings.model).name
    draw_radar([(own, printed["evaluation_results"]), *others], list(outcomes), path)
    log(f"drawn in {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""

    def body() -> int:
        given = build_parser().parse_args(argv)
        options = read_options(given.options)
        if given.output_path and not options.output_path:
            options = Options(**(vars(options) | {"output_path": given.output_path}))
        dimensions = read_dimensions(given.dimensions)
        processes = Processes()
        with stdout_to_stderr(), processes.connected():
            printed = run(given.model, dimensions, options, processes)
        if processes.first:
            print(json.dumps(printed, ensure_ascii=False), flush=True)
        return 0

    return run_main(body, speaks=os.environ.get("RANK", "0") == "0")


if __name__ == "__main__":
    sys.exit(main())
