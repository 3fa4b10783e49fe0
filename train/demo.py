"""The embedded example: a tiny Llama that knows some general answers learns to be a library's help desk.

python train/demo.py prepare FOLDER    make FOLDER/tiny-chat-model and FOLDER/datasets
python train/demo.py report FOLDER     what the run in FOLDER/output_path learned
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from llmops import files
from llmops.console import UserError, has_gpu, log, progress, run_main
from llmops.conversations.data_files import Read, read_conversations
from llmops.conversations.records import Conversation, Message
from train.problems import writable_problem

MODEL_NAME = "tiny-chat-model"
BASE_STEPS = 120


def messages_of(path: Path) -> list[list[Message]]:
    """The conversations of a file."""
    return [read.conversation.messages for read in read_conversations(path) if isinstance(read, Read)]


def texts_of(path: Path) -> list[str]:
    """Every message of a jsonl file of conversations."""
    return [message["content"] for messages in messages_of(path) for message in messages]


def prepare(folder: Path) -> None:
    """Copy the data and make the base model; a folder that is complete is left alone."""
    problems = writable_problem(folder)
    if problems:
        raise UserError(problems[0])
    datasets = folder / "datasets"
    datasets.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copyfile(HERE / "demo_data" / name, datasets / name)
    model = folder / MODEL_NAME
    if (model / "config.json").is_file():
        return
    staging = folder / f"{MODEL_NAME}.part"
    if staging.exists():
        shutil.rmtree(staging)
    make_base(staging)
    staging.rename(model)


def make_base(folder: Path) -> None:
    """A tiny Llama-architecture chat model that has learned only the general conversations of retention.jsonl."""
    import numpy as np
    import torch
    import transformers

    from llmops.formats.chat_format import ChatFormat
    from llmops.models import tiny
    from train.batches import PaddedCollator, target_losses
    from train.encoding import encode_conversation

    transformers.logging.disable_progress_bar()
    general = HERE / "retention.jsonl"
    texts = [text for path in (general, HERE / "demo_data" / "train.jsonl") for text in texts_of(path)]
    tokenizer = tiny.train_tokenizer(texts, vocab_size=500)
    model = tiny.make_model("llama", len(tokenizer), hidden=192, layers=4, heads=4, eos_id=tokenizer.eos_token_id)
    chat = ChatFormat(tokenizer)
    samples: list[dict[str, Any]] = []
    for messages in messages_of(general):
        for sample, _ in encode_conversation(chat, Conversation(messages), 256):
            if sample:
                samples.append({"ids": np.asarray(sample.ids, np.int32), "learned": np.ones(len(sample.ids), bool)})
    collate = PaddedCollator(tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    random = np.random.default_rng(0)
    for step in progress(range(BASE_STEPS), "making the tiny base model", unit="steps"):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 10) * (1 - step / BASE_STEPS)
        batch = collate([samples[i] for i in random.choice(len(samples), 16, replace=False)])
        loss = target_losses(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    log(f"the base model knows {len(samples)} general conversations (loss {loss.item():.2f})")


def answer(folder: Path, question: str) -> str:
    """What the model in a folder says to a question."""
    import torch

    from llmops.models.chat_model import ChatModel
    from llmops.models.checkpoints import Checkpoint

    opened = ChatModel(Checkpoint(folder))
    chat, model = opened.chat, opened.load(torch.float32).eval()
    prompt = torch.tensor([chat.prompt([{"role": "user", "content": question}])])
    generate: Any = model.generate
    out = generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False)
    return chat.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip()


def report(folder: Path) -> None:
    """Print what was learned, where the outputs are and what to type next."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    output = folder / "output_path"
    results = files.read_object(output / "train_results.json")
    test = messages_of(folder / "datasets" / "test.jsonl")
    question, reference = next((m[0]["content"], m[1]["content"]) for m in test if m[0]["role"] == "user")
    log(
        f"""
What the tiny model learned from {results["train_conversations"]} conversations \
in {results["steps"]} steps ({results["seconds"]:.0f} s):
  test loss       {results["eval_loss_before"]:.2f} -> {results["eval_loss"]:.2f}   \
({results["test_conversations"]} held-out conversations)
  retention loss  {results["retention_loss_before"]:.2f} -> {results["retention_loss"]:.2f}   \
(general answers it knew before: what the new ones cost it)
  question        {question}   (held out)
  before          {answer(folder / MODEL_NAME, question)}
  after           {answer(output, question)}
  reference       {reference}
Outputs in {output}:
  adapter_model.safetensors and tokenizer, log.txt, training_loss.png, tensorboard/, checkpoint-*/
Next, with your own model and data under mnt/ (README.md says how):
  bash chat_main.sh --dry_run true    check the data, see what is learned, estimate memory and time
  bash chat_main.sh                   train"""
    )


def main(argv: Sequence[str]) -> int:
    """prepare or report."""
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    stage, folder = argv
    return run_main(lambda: {"prepare": prepare, "report": report}[stage](Path(folder)) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
