"""What a training log tells: overfitting, underfitting, catastrophic forgetting, each High, Medium or Low.

python eval/diagnosis_monitoring.py mnt/output_path/log.txt            judge a log, of this project or of others
python eval/diagnosis_monitoring.py mnt/output_path --explain          a folder; what was seen, on stderr
python eval/diagnosis_monitoring.py mnt/output_path/log.txt --watch    follow a running training
Prints one JSON object: {"code": 0, "msg": "Monitoring Report", "data": {"current_risks": {...}, "recommendations":
{...}}}. When something is wrong the code is not 0, msg says what, and the exit code is the same: 1 for a log without a
readable loss (and for faults of ours), 2 for what the user can mend.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.diagnosis.criteria import HIGH, LOW, MEDIUM, RISKS, Finding, Thresholds
from eval.diagnosis.judge import Diagnosis, judge
from eval.diagnosis.log_reader import LogReader
from eval.diagnosis.refusal import no_loss
from eval.diagnosis.sources import read_log
from eval.diagnosis.training_run import LOSSES, TrainingRun
from llmops import files, json_text, pictures
from llmops.console import FailureJson, Parser, UserError, log, print_json, run_main, to_bool

SWITCHES = ("--explain", "--watch")
LOG_NAMES = (
    "log.txt", "trainer_state.json", "trainer_log.jsonl", "logging.jsonl", "metrics.csv", "results.csv", "summary.csv",
)  # fmt: skip
RECOMMENDATIONS = {
    ("overfitting", HIGH): "建议停止训练，降低学习率，增大dropout，增大数据量，降低训练周期数，并重新训练。",
    ("overfitting", MEDIUM): "建议继续观察评估损失，若仍不下降则提前停止训练，并使用评估损失最低的检查点。",
    ("underfitting", HIGH): "建议增大训练周期数，提高学习率，增大模型容量或LoRA秩，检查数据质量，并重新训练。",
    ("underfitting", MEDIUM): "建议适当增加训练周期数或提高学习率，并继续观察训练损失。",
    ("catastrophic_forgetting", HIGH): "建议回退到上个版本并调整参数。",
    ("catastrophic_forgetting", MEDIUM): "建议降低学习率，用--replay_ratio混入通用数据，并继续观察保留集损失。",
}
MORE_OF_IT = {  # underfitting, where the model forgets as well: a higher rate would cost more of what it knew
    HIGH: "建议增大训练周期数，增大模型容量或LoRA秩，检查数据质量，不要提高学习率，并重新训练。",
    MEDIUM: "建议适当增加训练周期数，不要提高学习率，并继续观察训练损失和保留集损失。",
}
DIVERGED = "建议降低学习率，检查数据和数值精度（fp16可换成bf16），并重新训练：损失没有下降。"


class NoLossError(UserError):
    """The log was read and holds no loss: one sentence, exit code 1."""

    code = 1


@dataclass(frozen=True)
class Config:
    """What to read and what to tell."""

    log_path: str
    explain: bool
    plot: str
    details: str
    watch: bool
    watch_interval: float
    watch_until_idle: float
    thresholds: Thresholds


def build_parser() -> argparse.ArgumentParser:
    """Every setting with its default."""
    parser = Parser(
        prog="diagnosis_monitoring.py", allow_abbrev=False,
        description="Judge the risks of a training from its log: overfitting, underfitting, catastrophic forgetting.",
    )  # fmt: skip
    add = parser.add_argument
    add("log_path", nargs="?", default="mnt/output_path/log.txt",
        help="a training log, a folder that holds one, or - for stdin (default: %(default)s)")  # fmt: skip
    add("--log_path", dest="named_log_path", default="", metavar="LOG", help="the same as a flag")
    switch: dict[str, Any] = {"type": to_bool, "default": False, "metavar": "true|false"}
    add("--explain", **switch, help="tell on stderr what was seen: the numbers against the thresholds")
    add("--plot", default="", metavar="FILE.png", help="draw the curves with the findings marked")
    add("--details", default="", metavar="FILE.json", help="write reasons, numbers and missing evidence there as JSON")
    add("--watch", **switch, help="follow a running training; a new JSON line whenever a risk changes")
    add("--watch_interval", type=float, default=1.0, help="seconds between two looks (default: %(default)s)")
    add("--watch_until_idle", type=float, default=0.0,
        help="end when the log has not grown for so many seconds; 0: never (default: %(default)s)")  # fmt: skip
    limits = parser.add_argument_group("thresholds")
    for item in fields(Thresholds):
        limits.add_argument(
            f"--{item.name}", type=type(item.default), default=item.default,
            help=f"{item.metadata['help']} (default: {item.default})".replace("%", "%%"),
        )  # fmt: skip
    return parser


def spell_out(argv: Sequence[str]) -> list[str]:
    """Switches that stand alone get their value, so that what follows them is not taken for it."""
    following = [*argv[1:], ""]
    return [
        f"{argument}=true" if argument in SWITCHES and after.lower() not in ("true", "false") else argument
        for argument, after in zip(argv, following, strict=True)
    ]


def parse(argv: Sequence[str] | None) -> Config:
    """The configuration that command line arguments describe; all problems at once."""
    given = vars(build_parser().parse_args(spell_out(sys.argv[1:] if argv is None else argv)))
    limits = {item.name: given.pop(item.name) for item in fields(Thresholds)}
    given["log_path"] = given.pop("named_log_path") or given["log_path"]
    problems = [f"--{name} is {value}, expected 0 or more" for name, value in limits.items() if not value >= 0]
    problems += [
        f"--{risk}_medium is {limits[f'{risk}_medium']}, which is {side} --{risk}_high ({limits[f'{risk}_high']})"
        for risk, side, wrong in (
            ("gl", "over", limits["gl_medium"] > limits["gl_high"]),
            ("late", "over", limits["late_medium"] > limits["late_high"]),
            ("retention", "over", limits["retention_medium"] > limits["retention_high"]),
            ("gain", "under", limits["gain_medium"] < limits["gain_high"]),
        )
        if wrong
    ]
    if limits["gl_slight"] > limits["gl_medium"]:
        problems.append(f"--gl_slight is {limits['gl_slight']}, which is over --gl_medium ({limits['gl_medium']})")
    for name in ("min_evaluations", "min_points"):
        if 0 <= limits[name] < 2:
            problems.append(f"--{name} is {limits[name]}, expected 2 or more")
    if not given["watch_interval"] > 0:
        problems.append(f"--watch_interval is {given['watch_interval']}, expected more than 0")
    if not given["watch_until_idle"] >= 0:
        problems.append(f"--watch_until_idle is {given['watch_until_idle']}, expected 0 or more")
    if given["watch"] and given["log_path"] == "-":
        problems.append("--watch follows a file, found - (stdin); pass the log's path")
    if given["plot"] and not Path(given["plot"]).absolute().parent.is_dir():
        problems.append(f"--plot: the folder of {given['plot']} does not exist; make it or choose another")
    if given["details"] and (problem := files.target_problem(Path(given["details"]))):
        problems.append(f"--details {problem}")
    if problems:
        raise UserError("; ".join(problems))
    if given["plot"]:
        pictures.refuse_other(Path(given["plot"]))
    return Config(**given, thresholds=Thresholds(**limits))


def find_log(path: Path) -> Path:
    """The log itself: `path`, or in a folder (or its newest checkpoint) the first that is there of LOG_NAMES."""
    if not os.path.isdir(path):  # False for every path that cannot be, too
        return path
    checkpoints = sorted(path.glob("checkpoint-*"), key=age)
    for folder in (path, *checkpoints):
        for name in LOG_NAMES:
            if (folder / name).is_file():
                log(f"reading {folder / name}")
                return folder / name
    raise UserError(f"the folder {path} holds none of {', '.join(LOG_NAMES)}; pass the log's own path")


def age(path: Path) -> float:
    """Sorts the newest first; what cannot be looked at (a dangling link) last."""
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


def read(path: str) -> LogReader:
    """Read a log from its beginning to its end."""
    reader = LogReader()
    for piece in read_log(path if path == "-" else str(find_log(Path(path)))):
        reader.feed(piece)
    reader.finish()
    return reader


def has_loss(run: TrainingRun) -> bool:
    """Whether there is anything to judge."""
    return any(len(run.curves[name]) or run.nonfinite[name] for name in LOSSES)


def check_losses(path: str, reader: LogReader) -> None:
    """Raises NoLossError when there is nothing to judge."""
    if not has_loss(reader.run):
        raise NoLossError(no_loss(path, reader))


def answer_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """The documented shape."""
    levels = {risk: diagnosis.findings[risk].level for risk in RISKS}
    forgets = levels["catastrophic_forgetting"] != LOW
    advice = {risk: advice_for(diagnosis.findings[risk], forgets) for risk in RISKS}
    return {"code": 0, "msg": "Monitoring Report", "data": {"current_risks": levels, "recommendations": advice}}


def advice_for(finding: Finding, forgets: bool) -> str:
    """What to do about a risk, of a model that `forgets` or not; no two sentences of one answer contradict each other.

    A training that made nothing better is no case for more of it.
    """
    if finding.level == LOW:
        return "-"
    if finding.diverged:
        return DIVERGED
    if forgets and finding.risk == "underfitting":
        return MORE_OF_IT[finding.level]
    return RECOMMENDATIONS[finding.risk, finding.level]


def say_failure(code: int, message: str) -> None:
    """The same shape when something is wrong."""
    say({"code": code, "msg": message, "data": {"current_risks": {}, "recommendations": {}}})


def say(answer: dict[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    print_json(answer)


def details_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """What the findings rest on, for a program: numbers that are no numbers of JSON (a quotient by 0) are null."""
    findings = {
        risk: {
            "level": finding.level, "reason": finding.reason, "missing": finding.missing, "diverged": finding.diverged,
            "numbers": {name: json_text.finite(value) for name, value in finding.numbers.items()},
        }
        for risk, finding in diagnosis.findings.items()
    }  # fmt: skip
    return {"axis": diagnosis.axis, "findings": findings}


def tell(config: Config, run: TrainingRun) -> Diagnosis:
    """Judge what was read; what is for people goes to stderr and into the picture, what is for programs into a file."""
    diagnosis = judge(run, config.thresholds)
    if run.passed["doubt"]:
        log(f"passed over: {run.passed['doubt']:,} lines whose loss may be an evaluation's or a part of one")
    for finding in diagnosis.findings.values():
        if finding.missing:
            log(f"evidence: {finding.risk}: {finding.missing}; it is {finding.level}")
    if config.explain:
        from eval.diagnosis.explain import explain

        log(explain(diagnosis, run, config.thresholds))
    if config.plot:
        from eval.diagnosis.plot import draw

        draw(diagnosis, run, Path(config.plot))
    if config.details:
        files.write_json(Path(config.details), details_json(diagnosis))
    return diagnosis


def run(config: Config) -> dict[str, Any]:
    """Read a log and judge it; what is printed."""
    reader = read(config.log_path)
    check_losses(config.log_path, reader)
    return answer_json(tell(config, reader.run))


def watch(config: Config) -> None:
    """Follow a log; say a line at first and whenever a risk changes. Ends by a signal, or when the log is idle."""
    from eval.diagnosis.watch import follow

    said = None
    reader = LogReader()
    for reader in follow(Path(config.log_path), find_log, config.watch_interval, config.watch_until_idle):
        now = reader.run.settled()
        if not has_loss(now):
            continue
        answer = answer_json(judge(now, config.thresholds))
        if answer != said:
            tell(config, now)
            say(answer)
            said = answer
    if said is None:
        check_losses(config.log_path, reader)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""

    def body() -> int:
        with FailureJson(say_failure):
            config = parse(argv)
            if config.watch:
                watch(config)
            else:
                say(run(config))
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
