"""serve/chat.sh: one question, a conversation, and what is wrong, as in a terminal."""

import re
import subprocess
from pathlib import Path

from conftest import ROOT, environment

from llmops.chat_model import ChatModel
from llmops.checkpoints import Checkpoint
from serve.chat import build_parser

QUESTIONS = ("ping", "图书馆几点开门？")


def talk(*arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command with these lines on stdin."""
    return subprocess.run(
        ["bash", str(ROOT / "serve" / "chat.sh"), "--max_new_tokens", "12", *arguments], env=environment(), input=said,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def greedy(folder: Path, *questions: str) -> list[str]:
    """What transformers itself answers to these questions, one after the other."""
    import torch

    opened = ChatModel(Checkpoint(folder))
    chat, model, messages, found = opened.chat, opened.load(torch.float32).eval(), [], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        prompt = torch.tensor([chat.prompt(messages)])
        out = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
        )
        found.append(chat.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip())
        messages.append({"role": "assistant", "content": found[-1]})
    return found


def answers(stdout: str) -> list[str]:
    """The answers, without the dots of those that ran into the limit."""
    return [line.removesuffix(" ...") for line in stdout.splitlines()]


def test_one_question(adapter: Path) -> None:
    done = talk("--model_name_or_path", str(adapter), "--question", QUESTIONS[0])
    assert done.returncode == 0, done.stderr
    assert "\n".join(answers(done.stdout)) == greedy(adapter, QUESTIONS[0])[0]
    assert str(adapter) in done.stderr


def test_a_conversation_goes_on_until_an_empty_line(adapter: Path) -> None:
    done = talk("--model_name_or_path", str(adapter), said="\n".join([*QUESTIONS, "", QUESTIONS[1], ""]))
    assert done.returncode == 0, done.stderr
    expected = "\n".join([*greedy(adapter, *QUESTIONS), *greedy(adapter, QUESTIONS[1])])
    assert "\n".join(answers(done.stdout)) == expected
    assert "Traceback" not in done.stderr


def test_python_and_shell_have_the_same_settings() -> None:
    text = (ROOT / "serve" / "chat.sh").read_text(encoding="utf-8")
    variables = set(re.findall(r'^([A-Z_]+)="\$\{', text, re.MULTILINE)) - {"MOUNT_PATH", "CUDA_VISIBLE_DEVICES"}
    assert variables == {action.dest.upper() for action in build_parser()._actions} - {"HELP"}


def test_what_is_wrong_is_one_sentence(tmp_path: Path, adapter: Path) -> None:
    none = talk("--model_name_or_path", str(tmp_path), "--question", "ping")
    assert (none.returncode, none.stdout) == (2, "")
    assert f"{tmp_path} holds no model; train first" in none.stderr
    long = talk("--model_name_or_path", str(adapter), said="ping " * 5000 + f"\n{QUESTIONS[0]}\n")
    assert long.returncode == 0, long.stderr
    assert "tokens and the model was made for" in long.stderr
    assert answers(long.stdout) == greedy(adapter, QUESTIONS[0])
