"""Runs of train/finetune.py one after the other, each in as many processes as asked for: `elastic_driver.py RUNS.json`.

RUNS is a list of {"argv": [...], "world": N, "stop": step or 0, "killed": bool, "log": path}. The processes are forked
from this one, which has imported the libraries, so a run takes a second or two; otherwise they are what the launcher
starts: RANK and WORLD_SIZE, gloo between them, DeepSpeed in each. `stop`: the first process gets SIGTERM in this step,
as from a scheduler that takes the machine back. `killed`: it gets SIGKILL while states are cut anew. Prints the list of
the runs' [list of exit codes, what they said].
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["DS_ACCELERATOR"] = "cpu"

from llmops.imports import quick_imports
from llmops.machine.process_group import free_port
from train import finetune

with quick_imports(*finetune.UNUSED):  # once, before the processes are forked
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    from train import muon, session
    from train.shards import Shards

    muon.compile_late()


def preempted(step: int) -> None:
    """This process is asked to end while it is in `step`."""

    def begin(self: session.Schedule, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    session.Schedule.on_step_begin = begin


def killed() -> None:
    """This process is killed when some of its states are filled and not yet handed over."""
    copy, filled = Shards.copy, []

    def end(*arguments: Any) -> None:
        copy(*arguments)
        filled.append(arguments[1])
        if len(filled) == 9:
            os.kill(os.getpid(), signal.SIGKILL)

    Shards.copy = end


def process(run: dict[str, Any], rank: int, port: int) -> int:
    """One process of a run: its exit code."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(run["world"]), "LOCAL_SIZE": str(run["world"]),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody has written to holds NaN
    with open(run["log"], "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if rank == 0 and run["stop"]:
        preempted(run["stop"])
    if rank == 0 and run["killed"]:
        killed()
    return finetune.main(run["argv"])


def main() -> None:
    """All runs, in order."""
    ends = []
    gc.freeze()  # what is imported is nobody's garbage: no process looks through it again
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        port, children, log = free_port(), [], Path(run["log"])
        before = log.stat().st_size if log.exists() else 0
        for rank in range(run["world"]):
            child = os.fork()
            if child == 0:
                code = 70
                try:
                    code = process(run, rank, port)
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        ends.append([codes, log.read_bytes()[before:].decode(errors="replace")])
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
