"""What a training leaves: the final model, picture and results in output_path; base and adapter in one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llmops import files
from llmops.console import RunStopped, log
from llmops.intents.questions import INTENTS_NAME
from llmops.machine import devices
from llmops.models.chat_model import ChatModel
from train import checkpointing, ownership
from train.config import Config
from train.course import judges
from train.run_folder import LOG_NAME, PICTURE_NAME, RESULTS_NAME
from train.trainer import ChatTrainer, barrier
from train.training_log import ACCURACY, plot, read_log


def read_intents(config: Config) -> str | None:
    """The catalog of intents beside the training data of the FAQ scenario; None where there is none."""
    intents = config.train_files[0].with_name(INTENTS_NAME)
    return files.read_text(intents) if config.scenario == "faq" and intents.is_file() else None


def finish(config: Config, trainer: ChatTrainer, rank: int, intents: str | None) -> dict[str, Any]:
    """Put the final model, the picture and the results into output_path; the results in every process.

    `intents`: the catalog of intents as it was when the data was read, for the first process.
    """
    output = Path(config.output_path)
    state = trainer.state
    evaluated = {int(line["step"]): line for line in state.log_history if "eval_loss" in line}
    step = state.global_step
    if config.load_best_model_at_end and state.best_global_step and judges(config, len(trainer.eval_dataset)):
        step = state.best_global_step
    if rank == 0:
        step = whole_step(output, step, set(evaluated))
    losses = [line["loss"] for line in state.log_history if "loss" in line]
    results = {
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "saved_step": step,
        "eval_loss_before": evaluated[0]["eval_loss"],
        "eval_loss": evaluated[step]["eval_loss"],
        **({"eval_accuracy": evaluated[step][ACCURACY]} if ACCURACY in evaluated[step] else {}),
        "retention_loss_before": evaluated[0]["retention_loss"],
        "retention_loss": evaluated[step]["retention_loss"],
        "train_loss": losses[-1] if losses else None,
        "train_conversations": len(trainer.train_dataset),
        "test_conversations": len(trainer.eval_dataset),
        "seconds": round(trainer.seconds, 1),
    }
    if rank == 0:
        checkpoint = output / f"checkpoint-{step}"
        title = (
            f"{Path(config.model_name_or_path).name}, {config.train_type}: "
            f"test loss {results['eval_loss_before']:.2f} → {results['eval_loss']:.2f}"
        )
        plot(read_log(output / LOG_NAME), output / PICTURE_NAME, title, state.best_global_step)
        names = checkpointing.model_files(checkpoint)
        ownership.claim(output, names)
        checkpointing.link_files(checkpoint, output, names)
        if intents is not None:  # the model can then be asked without its training data
            files.write_text(output / INTENTS_NAME, intents)
        files.write_json(output / RESULTS_NAME, results)
        log(
            f"done: test loss {results['eval_loss_before']:.3f} -> {results['eval_loss']:.3f}, retention loss "
            f"{results['retention_loss_before']:.3f} -> {results['retention_loss']:.3f}; the model is in {output}; "
            f"ask it: bash {'faq/predict.sh' if config.scenario == 'faq' else 'serve/chat.sh'} "
            f"--model_name_or_path {output} --question ..."
        )
    barrier()
    return results


def whole_step(output: Path, wanted: int, evaluated: set[int]) -> int:
    """The step whose checkpoint becomes the result: the wanted one, or where that was harmed the newest whole one."""
    problem = checkpointing.damage(output / f"checkpoint-{wanted}")
    if problem is None:
        return wanted
    newest = checkpointing.newest_whole(output)
    if newest is None or checkpointing.step_of(newest) not in evaluated:
        raise RunStopped(
            f"{output / f'checkpoint-{wanted}'} should become the result and is damaged ({problem}), and no other "
            "checkpoint is whole; start again with --overwrite_output_path true"
        )
    log(f"warning: checkpoint-{wanted} is damaged ({problem}); {newest.name} becomes the result")
    return checkpointing.step_of(newest)


def merge(config: Config) -> None:
    """Write output_path/merged and check that it answers like base + adapter."""
    output = Path(config.output_path)
    if config.train_type == "all":
        log("--merge_lora has nothing to merge: all weights were trained and output_path holds the whole model")
        return
    if (output / "merged" / "config.json").is_file():
        log(f"the merged model is in {output / 'merged'} already")
        return
    ownership.claim(output, ["merged", "merged.part"])
    unset_hf_deepspeed_config()  # ZeRO 3 would partition the weights among processes that are gone
    trained = ChatModel(replace(config.checkpoint, folder=output))
    questions = ("你好，请介绍一下你自己。", "1 + 1 = ?", "What is the capital of France?")
    prompts = [trained.chat.prompt([{"role": "user", "content": text}]) for text in questions]
    dtype, ends = devices.choose_dtype(config.dtype), trained.chat.stop_ids()
    worst = trained.save_merged(output / "merged", dtype, prompts, ends)
    log(
        f"merged model written to {output / 'merged'}; "
        f"its logits differ from base + adapter by at most {worst:.1e} (relative)"
    )
