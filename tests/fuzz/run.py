"""Harm files by the thousand and see what the commands do: one process per case, forked from one that has torch loaded.

python tests/fuzz/run.py [COUNT] [SEED] [--first N] [--only light|heavy] [--case N] [--jobs N] [--accepted] [--json]

A case is good when its exit code is 0, 1 or 2; when what it prints is what the command documents; when an error is one
sentence of ours; when nothing is left that the command should not write; when its inputs are as they were.
"""

import argparse
import faulthandler
import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SCRATCH = Path(tempfile.mkdtemp(prefix="llmops-fuzz."))
os.environ |= {
    "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "HF_MODULES_CACHE": str(SCRATCH / "modules"), "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "",
}  # fmt: skip

from fuzz import mutations, subjects
from fuzz.outcomes import FAULTS, LIMIT, Case, Outcome, inventory, judge
from fuzz.subjects import Subject

STARTED = time.monotonic()
MEMORY = 8 << 30
LIGHT = (
    "eval.diagnosis.explain", "eval.diagnosis.plot", "eval.diagnosis.watch", "matplotlib.pyplot", "scipy.optimize",
    "scipy.stats", "sklearn.linear_model", "sklearn.metrics", "sklearn.model_selection",
)  # fmt: skip
HEAVY = (
    "transformers.models.auto.modeling_auto", "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama", "train.dry_run", "train.session", "llmops.formats.template_limits",
    "llmops.generation.generator", "peft", "rouge_score.rouge_scorer", "sentence_transformers",
)  # fmt: skip

# --- a case


def harm(case: Subject, argv: list[str], rng: Random) -> tuple[list[str], mutations.Mutation]:
    """Harm the file or the argument, in the working directory."""
    if case.flags:
        options = subjects.parser_of(case.command)._option_string_actions
        harmless = {"--help", "--watch", "--check", "--local_rank"}
        return mutations.mutate_flags(argv, [o for o in options if o.startswith("--") and o not in harmless], rng)
    if case.argument >= 0:
        text, mutation = mutations.mutate_json(argv[case.argument], rng)
        argv[case.argument] = text
        return argv, mutation
    path = next(iter(sorted(Path().glob(case.file))))
    return argv, mutations.mutate_file(path, case.form, rng)


def choose(number: int, chosen: Sequence[Subject], heavy_every: int) -> Subject:
    """The subject of a case: in turn; where there are both kinds, one with a model every `heavy_every`-th time."""
    light, heavy = ([subject for subject in chosen if subject.heavy == kind] for kind in (False, True))
    turn, rest = divmod(number, heavy_every)
    if not light or not heavy:
        return chosen[number % len(chosen)]
    return light[(number - turn - 1) % len(light)] if rest else heavy[turn % len(heavy)]


def set_up(number: int, given: argparse.Namespace, chosen: Sequence[Subject]) -> Case:
    """Copy what a case needs and harm one thing of it; nothing for the negative numbers, -1 - (place in `chosen`)."""
    subject = choose(number, chosen, given.heavy_every) if number >= 0 else chosen[-1 - number]
    folder = SCRATCH / f"case-{number}" / "a" / "b"  # so deep that ../.. is a place of the case, too
    folder.mkdir(parents=True)
    for name in subject.needs:
        source = SCRATCH / "material" / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
    argv, mutation = list(subject.argv), mutations.Mutation("none", "")
    if number >= 0:
        os.chdir(folder)
        argv, mutation = harm(subject, argv, Random(f"{given.seed} {number}"))
        os.chdir(SCRATCH)
    return Case(number, subject, mutation, argv, folder, inventory(folder.parent.parent))


def start(case: Case, run: subjects.Main) -> None:
    """Fork a process that runs the command as its `main`."""
    case.started = time.monotonic()
    case.pid = os.fork()
    if case.pid:
        return
    status = 70
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(case.folder)
        for number, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
            opened = os.open(name if number == 0 else case.folder.parents[2] / f"{case.number}.{name}",
                             os.O_RDWR | os.O_CREAT | os.O_TRUNC)  # fmt: skip
            os.dup2(opened, number)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "rw"[n > 0], encoding="utf-8", errors="backslashreplace"
                                             if n == 2 else "strict", closefd=False) for n in range(3))  # fmt: skip
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        faulthandler.dump_traceback_later(LIMIT - 1, file=2)
        os.environ |= {"HOME": str(case.folder), "XDG_CACHE_HOME": str(case.folder / ".cache")}
        status = run(case.argv) or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


# --- many cases


def run_cases(numbers: Sequence[int], given: argparse.Namespace, chosen: Sequence[Subject]) -> list[Outcome]:
    """The outcome of every case, in the order in which they end."""
    mains = subjects.commands()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # then what was found so far is told
        signal.signal(number, lambda *_: stopped.set())
    waiting = list(reversed(numbers))
    running: dict[int, Case] = {}
    outcomes = []
    while waiting or running:
        if stopped.is_set() or (given.seconds and time.monotonic() - STARTED > given.seconds):
            waiting.clear()
        while waiting and len(running) < given.jobs:
            case = set_up(waiting.pop(), given, chosen)
            start(case, mains[case.subject.command])
            running[case.pid] = case
        if not running:
            break
        pid, status = os.waitpid(-1, os.WNOHANG)
        for case in running.values():
            if not pid and time.monotonic() - case.started > LIMIT:
                os.killpg(case.pid, signal.SIGKILL)
        if not pid:
            time.sleep(0.002)
            continue
        case = running.pop(pid)
        outcomes.append(judge(case, status))
        if given.case is None:
            clean_up(case)
        if sys.stderr.isatty() and len(outcomes) % 10 == 0:
            sys.stderr.write(f"\r{len(outcomes)} of {len(numbers)}")
    return outcomes


def clean_up(case: Case) -> None:
    """Remove a case's folder and output."""
    shutil.rmtree(case.folder.parent.parent)
    for name in ("stdout", "stderr"):
        (SCRATCH / f"{case.number}.{name}").unlink()


def make_material() -> None:
    """Make the sound files in a process of their own: threads that it starts would not survive a fork."""
    (SCRATCH / "material").mkdir()
    pid = os.fork()
    if not pid:
        status = 70
        try:
            os.chdir(SCRATCH / "material")
            os.dup2(os.open(SCRATCH / "material.log", os.O_WRONLY | os.O_CREAT), 2)
            from fuzz import material

            material.make()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit((SCRATCH / "material.log").read_text(encoding="utf-8", errors="replace")[-4000:])


def check_sound(given: argparse.Namespace, chosen: Sequence[Subject]) -> None:
    """Every command accepts its unharmed input, or the fuzzing shows nothing."""
    for outcome in run_cases([-1 - k for k in range(len(chosen))], given, chosen):
        expected = "error" if "nowhere" in chosen[-1 - outcome.number].argv else "accepted"
        if outcome.kind != expected:
            raise SystemExit(f"{outcome.subject} ({outcome.command}) unharmed: {outcome.kind}: {outcome.seen}")


# --- the report


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts by input file."""
    kinds = ("error", "accepted", *FAULTS)
    titles = ("clean errors", "accepted", "tracebacks", "hangs", "partial", "unclear")
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        rows[outcome.subject][outcome.kind] += 1
    width = max(map(len, rows), default=5) + 2
    lines = [f"{'input':{width}}" + "".join(f"{title:>14}" for title in titles)]
    for name, counts in [*rows.items(), ("all", Counter(o.kind for o in outcomes))]:
        lines.append(f"{name:{width}}" + "".join(f"{counts[kind]:>14}" for kind in kinds))
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Every setting."""
    parser = argparse.ArgumentParser(prog="fuzz.sh", description="Run commands on broken and hostile files.")
    add = parser.add_argument
    add("count", nargs="?", type=int, default=5000, help="cases (default: %(default)s)")
    add("seed", nargs="?", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    add("--first", type=int, default=0, help="number of the first case: 5,000 can be run in pieces")
    add("--only", choices=("light", "heavy"), help="commands without a model (light), or with one (heavy)")
    add("--subject", default="", help="inputs whose name holds this text")
    add("--heavy_every", type=int, default=2, metavar="N", help="every N-th case has a model (default: %(default)s)")
    add("--case", type=int, help="run this case alone and keep its folder")
    add("--jobs", type=int, default=2, help="cases at once (default: %(default)s)")
    add("--seconds", type=float, default=0, help="begin no case later than this after the start; 0: all are run")
    add("--accepted", action="store_true", help="list what was accepted, by input and kind of harm")
    add("--json", default="", metavar="FILE", help="write every outcome as a line of JSON")
    return parser


def preload(heavy: bool) -> None:
    """Import what the commands would import, once for all cases; no threads are started."""
    subjects.commands()
    from llmops import pictures

    pictures.prepare_labels(["x"])
    for name in (*LIGHT, *(HEAVY if heavy else ())):
        import_module(name)
    gc.freeze()  # no case looks through what was imported, whose pages would be copied


def main() -> int:
    """Run, tell; 1 when there is a fault."""
    given = build_parser().parse_args()
    chosen = [subject for make in subjects.SUBJECTS for subject in make()]
    chosen = [s for s in chosen if not given.only or s.heavy == (given.only == "heavy")]
    chosen = [s for s in chosen if given.subject in s.name]
    try:
        make_material()
        preload(any(subject.heavy for subject in chosen))
        check_sound(given, chosen)
        numbers = [given.case] if given.case is not None else range(given.first, given.first + given.count)
        outcomes = run_cases(numbers, given, chosen)
    finally:
        if given.case is None:
            shutil.rmtree(SCRATCH, ignore_errors=True)
    tell(given, outcomes)
    return int(any(outcome.kind in FAULTS for outcome in outcomes))


def tell(given: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    """The table, every fault with how to see it again, and what was accepted if asked for."""
    rest = f" --heavy_every {given.heavy_every}" if given.heavy_every != 2 else ""
    rest += (f" --only {given.only}" if given.only else "") + (f" --subject '{given.subject}'" if given.subject else "")
    for outcome in sorted(outcomes, key=lambda o: o.number):
        if outcome.kind in FAULTS or given.case is not None:
            print(f"\n{outcome.kind}: {outcome.subject} ({outcome.command}), {outcome.mutation.kind}, "
                  f"{outcome.mutation.details}, {outcome.seconds:.1f} s\n{outcome.seen}\n"
                  f"again: bash tests/fuzz.sh 1 {given.seed}{rest} --case {outcome.number}")  # fmt: skip
    if given.case is not None:
        print(f"its folder: {SCRATCH}/case-{given.case}/a/b")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(vars(o)) + "\n" for o in outcomes)
    if given.accepted:
        accepted: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
        for outcome in outcomes:
            if outcome.kind == "accepted":
                accepted[outcome.subject, outcome.mutation.kind].append(outcome)
        for (subject, kind), found in sorted(accepted.items()):
            numbers = ", ".join(f"{o.number} ({o.mutation.details[:40]})" for o in found[:4])
            print(f"accepted: {subject}: {kind}: {len(found)}: {numbers}")
    print(table(outcomes))
    if outcomes:
        last = max(outcome.number for outcome in outcomes)
        print(f"{len(outcomes)} cases, {last} the last, seed {given.seed}, {time.monotonic() - STARTED:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
