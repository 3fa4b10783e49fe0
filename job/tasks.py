"""What each kind of job does: which of our commands with which flags, and what of its result is told."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import publish
from job.calls import is_address, shown_address
from job.settings import EVALUATE, FIVE, FLAGS, ROOT, SECRET_NAMES, SIMILAR, TRAIN, Settings
from llmops import files
from llmops.console import RunStopped, to_bool
from llmops.translation import LANGUAGE_VARIABLE

FindModel = Callable[[str, str], str]  # (the variable's name, its value) -> a folder
FindData = Callable[[str, str], str]
Told = tuple[Any, Any]  # (for the platform, small for everybody else)
SCRIPTS = {
    TRAIN: "chat_main.sh",
    EVALUATE: "eval/model_performance_evaluation.sh",
    FIVE: "eval/evaluate_model_from_five_dimensions.sh",
    SIMILAR: "eval/analyze_similar_questions_and_intents.sh",
}


@dataclass(frozen=True)
class Work:
    """A command of ours, its environment, the training log it writes, and what its stdout comes to."""

    command: list[str]
    environment: dict[str, str]
    log: Path | None
    collect: Callable[[Path], Told]


def plan(settings: Settings, model: FindModel, data: FindData) -> Work:
    """The work of a job. `model` and `data` find what is named, or raise UserError."""
    flags = {TRAIN: train_flags, EVALUATE: evaluate_flags, FIVE: five_flags, SIMILAR: similar_flags}[settings.task]
    given = {name: value for name, value in flags(settings, model, data).items() if value}
    if settings.mount_path and settings.task != SIMILAR:
        given["mount_path"] = settings.mount_path
    command = ["bash", str(ROOT / SCRIPTS[settings.task])]
    command += [f"--{name}={value}" for name, value in given.items()] + list(settings.rest)
    log = settings.trained / "log.txt" if settings.task == TRAIN else None
    return Work(command, environment_of(settings), log, COLLECT[settings.task](settings))


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment of the command: ours without secrets, and without what the flags say already."""
    mine = {name.upper() for name in FLAGS} | set(SECRET_NAMES)
    kept = {name: value for name, value in settings.environment.items() if name not in mine}
    if not kept.get("TENSORBOARD"):
        kept["TENSORBOARD"] = "false"  # its port would be the node's, for all jobs of it
    if settings.gpus_per_node == "0":
        kept["CUDA_VISIBLE_DEVICES"] = "-1"
    return kept | {LANGUAGE_VARIABLE: "en"}  # its end is told to a platform; people hear it in their language


def processes_of(settings: Settings) -> str:
    """GPUS_PER_NODE as a number of processes: one on the CPU."""
    return "1" if settings.gpus_per_node == "0" else settings.gpus_per_node


def train_flags(settings: Settings, model: FindModel, data: FindData) -> dict[str, str]:
    """chat_main.sh's. What it takes under the platform's own names comes by the environment."""
    found = {
        "scenario": settings.scenario,
        "model_name_or_path": model("BASE_MODEL_PATH", settings.base_model),
        "train_file": data("TRAIN_FILE", settings.train_file),
        "test_file": data("EVAL_FILE", settings.eval_file),
        "num_processes": processes_of(settings),
        "max_seq_len": settings.model_max_length or settings.max_seq_len,
    }
    environment = settings.environment
    kind = environment.get("TRAIN_TYPE") or "lora"
    if settings.use_lora:
        kind = found["train_type"] = "lora" if to_bool(settings.use_lora) else "all"
        if not environment.get("ZERO_STAGE") and not environment.get("DS_FILE"):
            found["zero_stage"] = "2" if kind == "lora" else "3"
    if settings.run:
        found["output_path"] = str(settings.run)
        found["merge_lora"] = "true" if kind == "lora" else ""
    return found


def evaluate_flags(settings: Settings, model: FindModel, data: FindData) -> dict[str, str]:
    """model_performance_evaluation.sh's. The platform's MAX_SEQ_LEN counts the tokens of the answer alone."""
    return {
        "model_name_or_path": model("MODEL_PATH", settings.judged_model),
        "dataset_path": data("DATASET_PATH", settings.dataset_path),
        "evaluation_metrics": settings.evaluation_metrics,
        "max_seq_len": "auto",
        "max_new_tokens": "" if settings.max_seq_len == "0" else settings.max_seq_len,
        "per_device_batch_size": "" if settings.per_device_batch_size == "0" else settings.per_device_batch_size,
        "num_processes": processes_of(settings),
        "output_path": str(evaluation_folder(settings)),
    }


def five_flags(settings: Settings, model: FindModel, data: FindData) -> dict[str, str]:
    """evaluate_model_from_five_dimensions.sh's. How long an answer may be is each dimension's own."""
    more: dict[str, Any] = {}
    if settings.per_device_batch_size:
        more["batch_size"] = int(settings.per_device_batch_size)
    if settings.dataset_path:
        more["data_dir"] = settings.dataset_path
    return {
        "model_name_or_path": model("MODEL_PATH", settings.judged_model),
        "additional_parameters": json.dumps({"additional_parameters": more}) if more else "",
        "num_processes": processes_of(settings),
        "output_path": str(evaluation_folder(settings)),
    }


def similar_flags(settings: Settings, model: FindModel, data: FindData) -> dict[str, str]:
    """analyze_similar_questions_and_intents.sh's."""
    return {
        "model_path": model("DATASET_ANALYZE_MODEL", settings.dataset_analyze_model),
        "data_file_path": data("DATASET_PATH", settings.dataset_path),
    }


def evaluation_folder(settings: Settings) -> Path:
    """Where an evaluation keeps its answers, so that a second start goes on."""
    given = settings.environment.get("OUTPUT_PATH")
    return Path(given) if given else settings.folder / "evaluation"


def trained(settings: Settings) -> Callable[[Path], Told]:
    """The results of a training, after OUTPUT_DIR became a whole model."""

    def collect(printed: Path) -> Told:
        if settings.run:
            publish.publish(settings.run, Path(settings.output_dir), settings.folder)
        path = settings.trained / "train_results.json"
        if settings.run is None and not files.is_file(path):  # a flag after -- chose another place
            return None, None
        results = files.read_object(path, "the results of the training")
        return results, results

    return collect


def evaluated(settings: Settings) -> Callable[[Path], Told]:
    """The scores, and for the platform each answer with its own, as its evaluation of 2024 wrote them."""

    def collect(printed: Path) -> Told:
        results = data_of(printed)["evaluation_results"]
        config = {
            "model_name_or_path": settings.judged_model, "dataset_path": shown(settings.dataset_path),
            "evaluation_metrics": list(results), "max_seq_len": int(settings.max_seq_len or 0),
            "per_device_batch_size": int(settings.per_device_batch_size or 0),
            "gpu_nums": int(settings.gpus_per_node or 0),
        }  # fmt: skip
        answers = answers_of(evaluation_folder(settings), results)
        rows = [detail(line.value) for line in files.json_lines(answers, "the answers")] if answers else []
        whole = {"config": config, "overall_evaluation_metrics": results, "detailed_results": rows}
        return whole, results

    return collect


def answers_of(folder: Path, results: Mapping[str, float]) -> Path | None:
    """The file of the answers that these scores are of; None where no model was asked (the data held the answers)."""
    command = Path(SCRIPTS[EVALUATE]).stem
    for name in ("eval_results.json", f"eval_results.{command}.json"):  # the second where the five were evaluated after
        found = files.read_object(folder / name) if files.is_file(folder / name) else {}
        if (found.get("command"), found.get("evaluation_results")) == (command, results):
            return folder / "samples" / "model_performance.jsonl"
    return None


def shown(place: str) -> str:
    """A path as it is, an address without what may be secret in it."""
    return shown_address(place) if is_address(place) else place


def detail(row: Mapping[str, Any]) -> dict[str, Any]:
    """An answer in the platform's words."""
    texts = {"question": row["prompt"], "reference": row["references"][0], "model_output": row["prediction"]}
    return texts | dict(row["scores"])


def five_scores(settings: Settings) -> Callable[[Path], Told]:
    """The score of each dimension."""

    def collect(printed: Path) -> Told:
        results = files.read_object(printed, "the scores")["evaluation_results"]
        return results, results

    return collect


def compared(settings: Settings) -> Callable[[Path], Told]:
    """The pairs of similar questions, for everybody else their number."""

    def collect(printed: Path) -> Told:
        found = data_of(printed)
        pairs = {"mismatchedIntents": found["mismatched_intents"], "similarIntents": found["similar_intents"]}
        return pairs, {name: len(rows) for name, rows in pairs.items()}

    return collect


COLLECT: dict[str, Callable[[Settings], Callable[[Path], Told]]] = {
    TRAIN: trained, EVALUATE: evaluated, FIVE: five_scores, SIMILAR: compared,
}  # fmt: skip


def data_of(printed: Path) -> dict[str, Any]:
    """`data` of the JSON that a command printed. Raises RunStopped where it says that it failed."""
    found = files.read_object(printed, "what the command printed", "start again")
    if found.get("code") != 0 or not isinstance(found.get("data"), dict):
        raise RunStopped(f"the command printed no result: {files.shown(found.get('msg'), 300)}")
    return found["data"]
