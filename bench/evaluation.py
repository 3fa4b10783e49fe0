"""The same questions by lm-evaluation-harness and by our engine: samples per second, and whether the answers agree.

One model of about 40M weights, untrained (speed does not depend on what it knows), or the one of --model, in float32 on
the CPU. Both get the same prompts as plain text, character for character: AFQMC 5-shot and M3KE 3-shot (ranked by
log-likelihood), CMRC2018 zero-shot (generated, 32 tokens at most). Loading the model is not timed. The harness runs at
each of --peer_batch_sizes and the fastest counts, task by task; ours runs at its default. Both take turns, --rounds
times, and the median round of each task counts. The ratios of processor time stand beside those of the clock: on a
machine with other work they are the ones to trust. Of ours it also says how soon answers were there: the first one, and
the longest time without a new one.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from eval import evaluate_model_from_five_dimensions as command
from eval.answers import Answers
from eval.engine import Engine, Settings
from eval.samples import Sample, draw
from llmops.console import log
from llmops.machine.kept import Record
from llmops.machine.sharing import Processes
from llmops.models import tiny

NEW_TOKENS = 32
TASKS = {"inference_ability": 5, "reading_comprehension": 0, "innovation_capacity": 3}


def load_samples(data: Path, limit: int) -> dict[str, list[Sample]]:
    """The samples per dimension: those we ship, and real CMRC2018 passages where they are."""
    found = {}
    for name, shots in TASKS.items():
        dimension = command.DIMENSIONS[name]
        folder = data if name == "reading_comprehension" and dimension.find(data) else command.SAMPLES
        options = command.Options(num_fewshot=shots, data_dir=str(folder))
        samples = command.load_data(dimension, options).loaded.samples
        # questions of a passage are neighbours in the file: the first ones, not a draw
        found[name] = samples[:limit] if name == "reading_comprehension" else draw(samples, limit, 0)
    return found


def make_model(folder: Path, samples: dict[str, list[Sample]]) -> None:
    """About 40M weights: width 576, 10 layers."""
    texts = [message["content"] for group in samples.values() for sample in group for message in sample.messages]
    tiny.write_checkpoint(
        folder, texts * 2, "llama", vocab_size=4000, hidden=576, layers=10, heads=8, initializer_range=0.04
    )


class Timed(Answers):
    """Keeps nothing but the moments at which answers were known."""

    def __init__(self) -> None:
        super().__init__(None)
        self.moments: list[float] = []

    @contextmanager
    def appender(self, name: str) -> Iterator[Callable[[Record], None]]:
        """A function that notes the time."""
        self.moments = []
        yield lambda record: self.moments.append(time.perf_counter())


def run_ours(model: Path, samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """Seconds and answers per task."""
    engine = Engine(Settings(str(model), max_seq_len=4096, chat_template=False, gpu_id=-1), Processes())
    engine.answers = timed = Timed()
    engine.generator.fit(4096)
    found = {}
    for name, group in samples.items():
        started, worked = time.perf_counter(), time.process_time()
        answers = engine.answer(engine.prepare(name, group, NEW_TOKENS))
        moments = [started, *timed.moments]
        found[name] = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - worked,
            "first_answer_seconds": round(moments[1] - started, 2),
            "longest_silence_seconds": round(max(b - a for a, b in itertools.pairwise(moments)), 2),
            "answers": [answer.text for answer in answers],
        }
    return found


def write_tasks(folder: Path, model: Path, samples: dict[str, list[Sample]]) -> None:
    """The tasks as the harness reads them: a jsonl of prompts and a yaml each."""
    folder.mkdir(parents=True, exist_ok=True)
    renderer = Engine(Settings(str(model), chat_template=False, gpu_id=-1), Processes()).renderer
    for name, group in samples.items():
        rows = [
            {"prompt": renderer.plain_text(s), "choices": list(s.choices),
             "gold": s.choices.index(s.references[0]) if s.choices else 0, "reference": s.references[0]}
            for s in group
        ]  # fmt: skip
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        task = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "doc_to_text": "{{prompt}}", "target_delimiter": "", "num_fewshot": 0,
        }  # fmt: skip
        metric = {"aggregation": "mean", "higher_is_better": True}
        if group[0].choices:
            task |= {
                "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
                "metric_list": [{"metric": "acc"} | metric],
            }  # fmt: skip
        else:
            task |= {
                "output_type": "generate_until", "doc_to_target": "{{reference}}",
                "generation_kwargs": {"until": ["\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
                "metric_list": [{"metric": "exact_match"} | metric],
            }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(task, ensure_ascii=False), encoding="utf-8")  # JSON is YAML


def run_peer(python: str, work: Path, model: Path, size: int, sets: int) -> dict[str, Any]:
    """Seconds and answers per task, by the harness in its own environment."""
    out = work / f"lm_eval_{size}.json"
    script = HERE / "peers" / "lm_eval_run.py"
    arguments = [python, str(script), str(model), str(work / "tasks"), str(out), str(size), *list(TASKS)[:sets]]
    subprocess.run(arguments, check=True, stdout=sys.stderr)
    return json.loads(out.read_text(encoding="utf-8"))


def median_round(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Each task as it went in its median round by the clock; the lower one of two."""
    return {
        name: sorted((found[name] for found in rounds), key=lambda task: task["seconds"])[(len(rounds) - 1) // 2]
        for name in rounds[0]
    }


def main() -> None:
    """Run both, print one JSON object with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with cmrc2018/; else the shipped samples serve"
    )
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of the model that is made")
    parser.add_argument("--peer_python", required=True, help="Python of an environment with lm-eval")
    parser.add_argument("--peer_batch_sizes", default="1,8,16")
    parser.add_argument("--rounds", type=int, default=1, help="how often everything runs; medians count")
    parser.add_argument("--limit", type=int, default=80, help="samples per task at most")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    samples = load_samples(given.data, given.limit)
    samples = {name: [replace(s, references=s.references[:1]) for s in group] for name, group in samples.items()}
    model = given.model or given.work / "model"
    if not (model / "config.json").is_file():
        make_model(model, samples)
    write_tasks(given.work / "tasks", model, samples)
    sizes = [int(size) for size in given.peer_batch_sizes.split(",")]
    own_rounds, peer_rounds = [], {size: [] for size in sizes}
    for number in range(given.rounds):
        own_rounds.append(run_ours(model, samples))
        for size in sizes:
            log(f"round {number + 1}: lm-evaluation-harness, batch size {size}")
            peer_rounds[size].append(run_peer(given.peer_python, given.work, model, size, len(TASKS)))
    ours = median_round(own_rounds)
    peers = {size: median_round(rounds) for size, rounds in peer_rounds.items()}
    report: dict[str, Any] = {"tasks": {}}
    total_ours = total_peer = cpu_ours = cpu_peer = 0.0
    for name, group in samples.items():
        size = min(peers, key=lambda size: peers[size][name]["seconds"])
        peer, own = peers[size][name], ours[name]
        same = sum(a == b for a, b in zip(own["answers"], peer["answers"], strict=True))
        accuracies = [
            sum(answer == sample.references[0] for answer, sample in zip(found["answers"], group, strict=True))
            for found in (own, peer)
        ]
        total_ours += own["seconds"]
        total_peer += peer["seconds"]
        cpu_ours += own["cpu_seconds"]
        cpu_peer += peer["cpu_seconds"]
        report["tasks"][name] = {
            "samples": len(group),
            "ours_per_second": round(len(group) / own["seconds"], 2),
            "lm_eval_per_second": round(len(group) / peer["seconds"], 2),
            "lm_eval_batch_size": size,
            "ratio": round(peer["seconds"] / own["seconds"], 2),
            "cpu_time_ratio": round(peer["cpu_seconds"] / own["cpu_seconds"], 2),
            "first_answer_seconds": own["first_answer_seconds"],
            "longest_silence_seconds": own["longest_silence_seconds"],
            "same_answers": same,
            "right_ours": accuracies[0],
            "right_lm_eval": accuracies[1],
        }
    report["overall_ratio"] = round(total_peer / total_ours, 2)
    report["overall_cpu_time_ratio"] = round(cpu_peer / cpu_ours, 2)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
