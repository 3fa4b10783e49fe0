"""The embedded FAQ example: a tiny Llama learns from nothing which of 28 intents a shop's customers have.

python faq/demo.py prepare FOLDER    make FOLDER/tiny-chat-model and FOLDER/faq.jsonl
python faq/demo.py report FOLDER     what the run in FOLDER learned
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from llmops import files
from llmops.console import log, run_main
from llmops.intents.catalog import Catalog, wording_of
from llmops.intents.questions import read_faq

MODEL_NAME = "tiny-chat-model"
SURE = 0.9  # the precision whose share of automated answers is told


def prepare(folder: Path) -> None:
    """Copy the data and make the base model; a folder that is complete is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [HERE / "demo_data" / name for name in ("faq.jsonl", "out_of_scope.jsonl")]
    files.write_text(folder / "faq.jsonl", "".join(files.read_text(path) for path in parts))
    model = folder / MODEL_NAME
    if (model / "config.json").is_file():
        return
    import transformers

    from llmops.models import tiny

    transformers.logging.disable_progress_bar()
    data = read_faq(folder / "faq.jsonl")
    wording = wording_of("auto")
    intents = {record.intent: record.reply for record in data.records if record.intent != wording.none}
    prompt = Catalog("auto", wording, intents).prompt("")[0]["content"]
    # mostly single characters: words that a tiny model has seen once teach it nothing
    texts = [prompt] * 3 + [question for record in data.records for question in record.questions]
    staging = folder / f"{MODEL_NAME}.part"
    if staging.exists():
        shutil.rmtree(staging)
    tiny.write_checkpoint(staging, texts, "llama", vocab_size=1200, hidden=192, layers=4, heads=4)
    staging.rename(model)


def report(folder: Path) -> None:
    """Print what was learned, where the outputs are and what to type next."""
    scores = files.read_object(folder / "scores.json")
    best, free = scores["results"]
    sure = next(row for row in scores["coverage"]["model"]["at_precision"] if row["precision"] == SURE)
    baselines = "".join(f"  {row['name']:<22}{row['accuracy']:.1%}\n" for row in scores["baselines"])
    output = folder / "output_path"
    predictions = [line.value for line in files.json_lines(output / "predictions.jsonl")]
    shown = "".join(
        f"  {'right' if row['intent'] == row['reference'] else 'WRONG'}   {row['question']} -> {row['intent']} "
        f"({row['probability']:.0%}, then {row['runner_up']['intent']})\n"
        for row in predictions[:: max(1, len(predictions) // 6)][:6]
    )
    log(
        f"""
What the tiny model learned of {len(best["per_intent"]) - 1} intents, on {best["questions"]} held-out questions:
  accuracy        {best["accuracy"]:.1%} (macro F1 {best["macro_f1"]:.2f}); chance is {1 / len(best["per_intent"]):.1%}
  unconstrained   {free["accuracy"]:.1%}, {free["outside_the_candidates"]} answers that are no intent
  不符合          precision {best["none_of_the_intents"]["precision"]:.0%}, \
recall {best["none_of_the_intents"]["recall"]:.0%}
  automated       {sure["automated"]:.0%} of the questions, if {SURE:.0%} of the answers are to be right
The same questions by simple classifiers ({scores["baselines"][0]["features"]}, in seconds):
{baselines}{scores["recommendation"]}
{shown}Outputs in {output}:
  the model with intents.json, predictions.jsonl, predictions.png (confusions), predictions_coverage.png (accuracy
  against the share that is automated), log.txt, training_loss.png
Ask it:
  bash faq/predict.sh --mount_path {folder} --question 怎么申请退款
Next, with your own model and questions (faq/README.md says how):
  bash faq/run_all.sh --data_file my_faq.jsonl --model_name_or_path mnt/my-model"""
    )


def main(argv: Sequence[str]) -> int:
    """prepare or report."""
    stage, folder = argv
    return run_main(lambda: {"prepare": prepare, "report": report}[stage](Path(folder)) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
