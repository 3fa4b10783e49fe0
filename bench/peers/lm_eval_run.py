"""Run lm-evaluation-harness on local tasks, one after the other: lm_eval_run.py MODEL TASKS OUT BATCH_SIZE NAME...

Writes {task: {"seconds", "answers"}}; the model is loaded before the clock starts.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def answer_of(sample: dict[str, Any]) -> str:
    """The chosen or generated text of one logged sample."""
    responses = sample["filtered_resps"]
    if "choices" in sample["doc"] and sample["doc"]["choices"]:
        scores = [float(score) for score, _ in responses]
        return sample["doc"]["choices"][max(range(len(scores)), key=scores.__getitem__)]
    return str(responses[0]).strip()


def main(model: str, tasks: str, out: str, size: str, *names: str) -> None:
    """Load, run, write."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.disable(logging.WARNING)
    loaded = HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=int(size))
    manager = TaskManager(include_path=tasks, include_defaults=False)
    found = {}
    for name in names:
        started, worked = time.perf_counter(), time.process_time()
        result = lm_eval.simple_evaluate(
            model=loaded, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True, verbosity="ERROR"
        )
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
        samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
        answers = [answer_of(sample) for sample in samples]
        found[name] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "answers": answers}
    Path(out).write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
