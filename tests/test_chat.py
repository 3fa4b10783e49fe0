"""chat.sh: a question, a conversation through a pipe and in a terminal, base and tuned, intents, wrong settings."""

import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve import chat

COMMAND = ["bash", str(ROOT / "serve" / "chat.sh")]
QUESTION = "图书馆几点开门？"


def talk(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    """Run chat.sh to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], input=typed, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )


def greedy(folder: Path, turns: list[str], tokens: int) -> list[str]:
    """What transformers itself answers to the turns of a conversation."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    messages, found = [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
        found.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": found[-1]})
    return found


def test_one_question_and_a_conversation(taught: Path) -> None:
    turns = [QUESTION, "一年有几个月"]
    expected = greedy(taught, turns, 12)
    model = ("--model_name_or_path", str(taught), "--max_new_tokens", "12")
    one = talk(*model, "--question", turns[0])
    assert one.returncode == 0, one.stderr
    assert one.stdout == chat.visible(expected[0]) + "\n"
    both = talk(*model, typed=f"{turns[0]}\n{turns[1]}\n\n{turns[0]}\n")
    assert both.returncode == 0, both.stderr
    assert both.stdout == "".join(chat.visible(text) + "\n" for text in [*expected, expected[0]])


def test_base_and_tuned(adapter: Path) -> None:
    plain = adapter / "intents.json"
    hidden = plain.rename(adapter / "kept.json")  # so that it answers in words
    short = ("--max_new_tokens", "4", "--question", "hi")
    try:
        found = talk("--model_name_or_path", str(adapter), "--compare", "true", *short)
    finally:
        hidden.rename(plain)
    assert found.returncode == 0, found.stderr
    assert [line.split("]")[0] for line in found.stdout.splitlines() if line.startswith("[")] == ["[tuned", "[base"]


def test_intents(adapter: Path) -> None:
    found = talk("--model_name_or_path", str(adapter), "--question", "怎么退款")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("%") == 3


def read_until(terminal: int, mark: str, seconds: float = 100) -> str:
    """What a terminal shows until a mark comes."""
    shown, end = b"", time.monotonic() + seconds
    while mark not in shown.decode(errors="replace"):
        assert time.monotonic() < end, shown.decode(errors="replace")
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096)
    return shown.decode(errors="replace")


def test_a_terminal(taught: Path) -> None:
    """Typed lines are answered; Ctrl-C stops an answer and not the conversation; Ctrl-D ends it."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "--model_name_or_path", str(taught), "--max_new_tokens", "4096", "--temperature", "1.5"],
        env=environment() | {"TERM": "dumb"}, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        assert "an empty line begins a new conversation" in read_until(ours, "> ")
        os.write(ours, "一年有几个月\n".encode())
        read_until(ours, "一年有几个月")
        os.killpg(process.pid, signal.SIGINT)  # while it answers, or just after
        read_until(ours, "> ")
        os.write(ours, b"\n")
        read_until(ours, "> ")
        os.write(ours, b"\x04")  # Ctrl-D
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        os.close(ours)


def test_python_and_shell_have_the_same_settings() -> None:
    text = (ROOT / "serve" / "chat.sh").read_text(encoding="utf-8")
    variables = set(re.findall(r'^([A-Z_]+)="\$\{', text, re.MULTILINE)) - {"MOUNT_PATH", "CUDA_VISIBLE_DEVICES"}
    assert variables == {action.dest.upper() for action in chat.build_parser()._actions} - {"HELP"}


def test_what_is_too_long_ends_a_conversation_and_not_the_talk(taught: Path) -> None:
    model = ("--model_name_or_path", str(taught), "--max_new_tokens", "12")
    long = talk(*model, typed="ping " * 5000 + f"\n{QUESTION}\n")
    assert long.returncode == 0, long.stderr
    assert "more than the model's" in long.stderr
    assert long.stdout == chat.visible(greedy(taught, [QUESTION], 12)[0]) + "\n"
    alone = talk(*model, "--question", "ping " * 5000)
    assert (alone.returncode, alone.stdout) == (2, "")


def test_what_could_drive_a_terminal_is_left_out() -> None:
    assert chat.visible("a\x1b[2Jb\x07\tc\n\u202e") == "a[2Jb\tc\n"


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens is 0, expected at least 1"),
        (["--temperature", "-1"], "--temperature is -1.0, expected at least 0"),
        (["--top_p", "nan"], "--top_p is nan, expected more than 0"),
        (["--model_name_or_path", "none"], "expected a model's folder"),
        (["--model_name_or_path", "/no/model"], "/no/model holds no model"),
        (["--tokens", "3"], "unrecognized arguments: --tokens"),
    ],
)
def test_wrong_settings(capsys: pytest.CaptureFixture[str], arguments: list[str], phrase: str) -> None:
    with_model = [] if "--model_name_or_path" in arguments else ["--model_name_or_path", "/no/model"]
    assert chat.main([*with_model, *arguments]) == 2
    printed = capsys.readouterr()
    assert phrase in printed.err
    assert printed.out == ""
