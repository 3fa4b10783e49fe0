"""Fine-tune a chat model: LoRA or full, one process per device, started by llmops/launcher.

python train/finetune.py --help        every setting
python train/finetune.py --check ...   settings, paths and data only; needs no torch
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmops import files
from llmops.console import log, run_main, stdout_to_stderr
from llmops.conversations import data_files
from llmops.imports import quick_imports
from llmops.intents.questions import INTENTS_NAME, refuse_exported, refuse_unfinished
from llmops.machine import devices, process_group
from llmops.machine.peers import Peers, watch_launcher
from train import deepspeed_file
from train.config import Config
from train.flags import parse
from train.run_folder import OutputFolder, earlier_run, say_finished

PLACE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # of this process, as the launcher tells it
REMAINS = "the checkpoints saved before are whole"
# what DeepSpeed's autotuner, the Trainer's `datasets` and detection losses import, a second and a half of every start
UNUSED = ("mlflow", "datasets", "scipy")
EXIT_FINISHED = 10  # of --check: the run is finished


def check(config: Config) -> int:
    """Everything that can be told without torch: an earlier run, and every line of the data.

    Returns EXIT_FINISHED when there is nothing left to do.
    """
    results = None if config.dry_run else earlier_run(config)
    if results:
        merged = Path(config.output_path) / "merged" / "config.json"
        if config.merge_lora and not files.is_file(merged):
            return 0
        say_finished(config, results)
        return EXIT_FINISHED
    if config.scenario == "faq":
        refuse_unfinished(config.train_files[0].parent)
        refuse_exported(config.train_files[0])
        if not files.is_file(config.train_files[0].with_name(INTENTS_NAME)):
            log(
                f"warning: no {INTENTS_NAME} is beside {config.train_files[0]}, so these are learned as they are; "
                "faq/predict needs it: faq/prepare.sh makes it of questions with intents (SCENARIO=general for others)"
            )
    for paths in (config.test_files, config.train_files, config.replay_files, [config.retention_path]):
        if paths:
            data_files.check_files(paths, config.skip_bad_lines)
    for warning in deepspeed_file.warnings(config):
        log(warning)
    return 0


def unused() -> Sequence[str]:
    """What the libraries shall not import. None where transformers is, which looks once for what is installed."""
    return () if "transformers" in sys.modules else UNUSED


def run(config: Config) -> dict[str, Any]:
    """Train as configured; the results that train_results.json holds. Runs in every process."""
    # 1. who am I, is there something to do
    rank, local_rank, world = (int(os.environ.get(name, n)) for name, n in PLACE.items())
    devices.prepare_process(os.environ)
    results = earlier_run(config, world)
    if results:
        if rank == 0:
            say_finished(config, results)
            if config.merge_lora:
                from train import faults, outcome

                with OutputFolder(config, rank), faults.explain_end(config):
                    outcome.merge(config)
        return results
    # 2. from here on the heavy libraries; with DeepSpeed's, torch takes a GPU for usable that its driver is too old for
    devices.check_gpu()
    with quick_imports(*unused()):
        from train import faults, held_out, outcome, session

    with OutputFolder(config, rank), watch_launcher(), Peers(REMAINS) as peers, faults.explain_shared_memory():
        intents = outcome.read_intents(config)  # now: the folder may be prepared anew meanwhile
        data = session.prepare_data(config, encodes=local_rank == 0)
        if rank == 0 and not config.test_files:
            held_out.write(Path(config.output_path), data.test, config.train_files)
        trainer, schedule = session.build_trainer(config, data, peers)
        session.train(config, trainer, schedule, rank)
        with faults.explain_end(config):
            results = outcome.finish(config, trainer, rank, intents)
            del trainer, schedule, data
            if config.merge_lora and rank == 0:
                outcome.merge(config)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn the end into an exit code."""

    def body() -> int:
        config, only_check = parse(sys.argv[1:] if argv is None else argv)
        if only_check:
            return check(config)
        with stdout_to_stderr():
            if config.dry_run:
                devices.prepare_process(os.environ)
                devices.check_gpu()
                with quick_imports(*unused()):
                    from train import dry_run

                dry_run.run(config)
            else:
                run(config)
        return 0

    return run_main(body, speaks=os.environ.get("LOCAL_RANK", "0") == "0")  # a machine may lack what others have


if __name__ == "__main__":
    process_group.leave(main())
