"""A chat model in five dimensions: inference, reading, Chinese, following instructions, knowledge of many subjects.

python eval/evaluate_model_from_five_dimensions.py MODEL '["inference_ability", ...]' '{"max_seq_len": 512, ...}'
Prints {"evaluation_results": {"inference_ability": 0.95, ...}, "diagnosis": {}} on stdout. diagnosis is empty when all
is well, otherwise it has, by dimension, the sentences that a reader of the scores must know.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval.answers import FIVE, RADAR_NAME
from eval.dimensions import afqmc, cmrc2018, m3ke, quoref, tnews
from eval.dimensions.base import Dimension
from eval.engine import Engine, Settings, check, owned
from eval.interrupts import Interrupts
from eval.judging import Data, Outcome, judge, score_answers
from eval.options import HELP, Options, read_json_argument, read_options
from eval.prompts import Prepared, nothing_fits
from eval.samples import Answer, add_examples, draw, rows_of
from llmops import files
from llmops.console import Parser, Terminated, UserError, log, print_json, run_main, stdout_to_stderr, to_bool
from llmops.machine.sharing import Processes

DIMENSIONS: dict[str, Dimension] = {
    module.DIMENSION.name: module.DIMENSION for module in (afqmc, cmrc2018, tnews, quoref, m3ke)
}
SAMPLES = ROOT / "eval" / "eval_datasets"
OFFICIAL = "official"  # folder in output_path for what benchmarks' own scripts and submissions want


def build_parser() -> argparse.ArgumentParser:
    """Three positional arguments."""
    parser = Parser(
        prog=f"{FIVE}.py", description="Evaluate a chat model in five dimensions.",
        epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("model", nargs="?", default="", help="whole model, merged model or adapter folder")
    parser.add_argument("dimensions", nargs="?", default="", help=f"JSON list of {', '.join(DIMENSIONS)}; default: all")
    parser.add_argument("options", nargs="?", default="", help="JSON object {'additional_parameters': {...}}")
    parser.add_argument(
        "--output_path", default="", help="where to write when additional_parameters has no output_path"
    )
    parser.add_argument(
        "--export_official", type=to_bool, nargs="?", const=True, default=False, metavar="true|false",
        help="as the key of additional_parameters",
    )  # fmt: skip
    names = parser.add_argument_group("the same under the names of the platform that these commands come from")
    same = argparse.SUPPRESS
    names.add_argument("--model_name_or_path", dest="named_model", default=same, metavar="MODEL", help="the model")
    names.add_argument(
        "--evaluation_dimensions", dest="named_dimensions", default=same, metavar="JSON", help="the list"
    )
    names.add_argument("--options", dest="named_options", default=same, metavar="JSON", help="the object")
    names.add_argument("--output_file", default="", metavar="FILE.json", help="write what is printed there, too")
    names.add_argument("--gpu_nums", type=int, default=None, metavar="N",
        help="0: the CPU; several share the samples when the .sh starts so many processes (NUM_PROCESSES)")  # fmt: skip
    names.add_argument("--local_rank", type=int, help=same)  # which DeepSpeed's launcher adds
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, by position or by name."""
    given = build_parser().parse_args(argv)
    for name in ("model", "dimensions", "options"):
        setattr(given, name, getattr(given, f"named_{name}", getattr(given, name)))
    if not given.model:
        raise UserError("no model is given; pass its folder as the first argument or with --model_name_or_path")
    if given.gpu_nums is not None and given.gpu_nums < 0:
        raise UserError(f"--gpu_nums is {given.gpu_nums}; expected 0 for the CPU, or the number of GPUs")
    return given


def read_dimensions(text: str) -> list[Dimension]:
    """The dimensions of a JSON list, each once, in its order; all for an empty text."""
    if not text.strip():
        return list(DIMENSIONS.values())
    names = read_json_argument(text, list, '["inference_ability"]')
    unknown = [name for name in names if not isinstance(name, str) or name not in DIMENSIONS]
    if unknown or not names:
        found = ", ".join(map(files.shown, unknown)) or "an empty list"
        raise UserError(f"dimensions: found {found}, expected some of {', '.join(DIMENSIONS)}")
    return [DIMENSIONS[name] for name in dict.fromkeys(names)]


def find_data(dimension: Dimension, data_dir: str) -> tuple[Path, bool]:
    """(where the data is, whether it is the shipped sample)."""
    if data_dir:
        found = dimension.find(Path(data_dir)) if files.is_folder(Path(data_dir)) else None
        if found:
            return found, SAMPLES.resolve() in found.resolve().parents
        raise UserError(f"{files.plain(data_dir, 200)} has no {dimension.dataset}; put there {dimension.get}")
    mounted = Path(os.environ.get("MOUNT_PATH") or ROOT / "mnt") / "datasets" / "eval"
    found = dimension.find(mounted)
    if found:
        return found, False
    shipped = dimension.find(SAMPLES)
    if not shipped:
        raise UserError(f"{SAMPLES} has no {dimension.dataset}; copy the project again")
    return shipped, True


def load_data(dimension: Dimension, options: Options) -> Data:
    """The samples to ask, with their few-shot examples."""
    path, shipped = find_data(dimension, options.data_dir)
    loaded = dimension.read(path)
    if not loaded.samples:
        raise UserError(f"{path} holds no sample of {dimension.dataset} that can be evaluated")
    read = len(loaded.samples)
    loaded = add_examples(loaded, options.num_fewshot, options.seed)
    drawn = draw(loaded.samples, options.limit, options.seed)
    loaded = replace(loaded, samples=drawn, total=len(loaded.samples), read=read)
    return Data(dimension, loaded, loaded.path or path, shipped)


class Evaluation:
    """One run: what is asked, what is finished, and what is said of it, however it ends.

    A context: on the way out the reports of what is finished are written. `printed` is what stdout gets: nothing when
    there is something to mend and no dimension was finished.
    """

    def __init__(self, model: str, dimensions: Sequence[Dimension], options: Options, processes: Processes) -> None:
        self.started = time.monotonic()
        self.options, self.processes = options, processes
        self.settings = Settings(
            model=model, adapter=options.adapter, max_seq_len=options.max_seq_len, batch_size=options.batch_size,
            gpu_id=options.gpu_id, mode=options.mode, dtype=options.dtype, chat_template=options.chat_template,
            reuse_prefix=options.reuse_prefix, cpu_kernels=options.cpu_kernels,
            trust_remote_code=options.trust_remote_code, output_path=options.output_path,
            enable_thinking=options.enable_thinking,
        )  # fmt: skip
        if options.export_official and not options.output_path:
            raise UserError("export_official writes into output_path, which is not given; name a folder")
        # everything that can be wrong without the model
        check(self.settings)
        self.others = read_others(options.compare_with)
        self.data = [load_data(dimension, options) for dimension in dimensions]
        self.outcomes: dict[str, Outcome] = {}
        self.engine: Engine | None = None
        self.prepared: dict[str, Prepared] = {}
        self.tests: dict[str, Prepared] = {}  # files without answers that a submission is about
        self.asking = False
        self.ended_by = "before it began"
        self.silent = True

    def __enter__(self) -> "Evaluation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.ended_by = how_it_ended(error) if error else ""
        self.silent = isinstance(error, UserError) and not self.outcomes
        if self.asking and self.engine and self.options.output_path and self.processes.first:
            self._write_reports(self.engine)

    def run(self, interrupts: Interrupts) -> None:
        """Tokenise and check every prompt of every dimension, then ask dimension by dimension."""
        engine = self.engine = Engine(self.settings, self.processes)
        with interrupts.computing():
            for data in self.data:
                name = data.dimension.name
                self.prepared[name] = engine.prepare(name, data.loaded.samples, data.dimension.max_new_tokens)
                if self.options.export_official:
                    self._prepare_test(engine, data)
        asked = [data for data in self.data if self.prepared[data.dimension.name].samples]
        if not asked:
            least = min(self.prepared.values(), key=lambda prepared: prepared.least)
            raise nothing_fits(least, max(found.length for found in self.prepared.values()))
        with interrupts.computing():
            log(f"{sum(len(found.samples) for found in self.prepared.values())} prompts are ready")
            engine.generator  # noqa: B018  the weights are loaded at the first look
            self.asking = True
        for data in asked:
            with interrupts.computing():
                answers = engine.answer(self.prepared[data.dimension.name])
            if self.processes.first:
                self._finish(engine, data, answers)
            if self.options.export_official:
                self._export(engine, data, answers, interrupts)

    def printed(self) -> dict[str, Any] | None:
        """The documented JSON: the scores of what is finished, and what a reader must know, by dimension."""
        if self.silent:
            return None
        diagnosis = {}
        for data in self.data:
            name = data.dimension.name
            notes = self.outcomes[name].notes if name in self.outcomes else [self._why_not(data)]
            if notes:
                diagnosis[name] = notes
        return {
            "evaluation_results": {name: outcome.score for name, outcome in self.outcomes.items()},
            "diagnosis": diagnosis,
        }

    def _why_not(self, data: Data) -> str:
        """Why a dimension has no score."""
        name = data.dimension.name
        prepared = self.prepared.get(name)
        if prepared and not prepared.samples:
            cure = prepared.too_short(prepared.least) or f"give a max_seq_len of {prepared.least} or more"
            return f"no score: none of its {len(prepared.left_out)} prompts fits into {prepared.length} tokens; {cure}"
        far = self.engine.how_far(prepared) if self.engine else "none of its answers was there yet"
        return f"not finished, {self.ended_by}: {far}"

    def _finish(self, engine: Engine, data: Data, answers: Sequence[Answer]) -> None:
        """Scores and the per-sample file of one dimension."""
        name, prepared = data.dimension.name, self.prepared[data.dimension.name]
        scores = score_answers(data.dimension, prepared.samples, answers)
        self.outcomes[name] = outcome = judge(data, prepared, answers, scores, self.options.seed)
        engine.finish(name, rows_of(prepared.samples, answers, scores))
        log(f"{name}: {data.dimension.metric} {outcome.score:.4f} on {len(answers)} samples")
        for note in outcome.notes:
            log(f"  {note}")

    def _prepare_test(self, engine: Engine, data: Data) -> None:
        """The test file without answers, if a submission is about one."""
        official, name = data.dimension.official, data.dimension.name
        test = official.unlabelled(data.path) if official and official.unlabelled else []
        if test and not self.options.limit:
            examples = {sample.group: sample.history for sample in data.loaded.samples}
            test = [replace(sample, history=examples.get(sample.group, ())) for sample in test]
            self.tests[name] = engine.prepare(f"{name}.test", test, data.dimension.max_new_tokens)
        elif official and official.unlabelled:
            why = "limit is given" if self.options.limit else f"there is no test file beside {data.path}"
            log(f"{official.name} will hold the scored samples and be no submission, because {why}")

    def _export(self, engine: Engine, data: Data, answers: Sequence[Answer], interrupts: Interrupts) -> None:
        """What the benchmark's own script or submission wants; for a submission its test file is asked, too."""
        official, name = data.dimension.official, data.dimension.name
        if official is None:
            return
        samples = self.prepared[name].samples
        if name in self.tests:
            prepared = self.tests[name]
            if prepared.left_out:
                log(f"{official.name} is not written: {len(prepared.left_out)} of its prompts do not fit")
                return
            with interrupts.computing():
                answers = engine.answer(prepared)
            samples = prepared.samples
            engine.finish(prepared.name, rows_of(samples, answers, [{} for _ in samples]))
        if self.processes.first:
            folder = Path(self.options.output_path) / OFFICIAL
            files.make_folder(folder)
            files.write_text(folder / official.name, official.text(list(zip(samples, answers, strict=True))))
            log(f"official form in {folder / official.name}")
            lacking = data.loaded.read - len(samples) if name not in self.tests else 0
            if lacking:
                log(
                    f"{official.name} lacks {lacking} of {data.loaded.read} samples: those that "
                    "limit drops, that serve as few-shot examples, and whose prompts do not fit"
                )

    def _write_reports(self, engine: Engine) -> None:
        """eval_results.json and the radar chart."""
        from eval.report import draw_radar, write_results

        printed = self.printed() or {}
        more = {
            **printed,
            "finished": not self.ended_by,
            "limit": self.options.limit,
            "seed": self.options.seed,
            "num_fewshot": self.options.num_fewshot,
            "dimensions": {name: outcome.report for name, outcome in self.outcomes.items()},
        }
        write_results(engine, FIVE, time.monotonic() - self.started, more)
        if not self.outcomes:
            return
        path = Path(self.options.output_path) / RADAR_NAME
        own = Path(self.options.adapter or self.settings.model).name
        bounds = {
            name: (outcome.report["floor"]["score"], outcome.report["ceiling"]["score"])
            for name, outcome in self.outcomes.items()
        }
        draw_radar([(own, printed["evaluation_results"]), *self.others], list(self.outcomes), path, bounds)
        log(f"drawn in {path}")


def how_it_ended(error: BaseException) -> str:
    """The end of a run in words."""
    if isinstance(error, Terminated):
        return "ended by Ctrl-C" if error.code == 130 else "ended by SIGTERM"
    return f"stopped ({type(error).__name__}: {error})"


def read_others(paths: Sequence[str]) -> list[tuple[str, dict[str, float]]]:
    """Name and scores of the models to compare with."""
    if not paths:
        return []
    from eval.report import read_scores

    return [read_scores(Path(path)) for path in paths]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""

    def body() -> int:
        given = parse(argv)
        options = read_options(given.options)
        options = replace(
            options,
            gpu_id=-1 if given.gpu_nums == 0 else options.gpu_id,
            output_path=options.output_path or given.output_path,
            export_official=options.export_official or given.export_official,
        )
        dimensions = read_dimensions(given.dimensions)
        problem = files.target_problem(Path(given.output_file)) if given.output_file else None
        if problem:
            raise UserError(f"--output_file {problem}")
        processes = Processes()
        names = [name for d in dimensions for name in (d.name, f"{d.name}.test")]
        official = [f"{OFFICIAL}/{d.official.name}" for d in dimensions if d.official and options.export_official]
        evaluation = Evaluation(given.model, dimensions, options, processes)
        try:
            with ExitStack() as stack:
                stack.enter_context(stdout_to_stderr())
                stack.enter_context(processes.connected())
                stack.enter_context(owned(options.output_path, names, processes, [RADAR_NAME], official))
                interrupts = stack.enter_context(Interrupts())
                stack.enter_context(evaluation)
                evaluation.run(interrupts)
        finally:
            printed = evaluation.printed() if processes.first else None  # it reads files that the first deletes
            if printed is not None:
                print_json(printed)
                if given.output_file:
                    files.write_json(Path(given.output_file), printed)
        return 0

    return run_main(body, speaks=os.environ.get("RANK", "0") == "0")


if __name__ == "__main__":
    sys.exit(main())
