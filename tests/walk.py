"""The way of a conversation from its file to a loss, and of a question from HTTP to its answer: which code is called.

python tests/walk.py conversation FOLDER        trains one step on one conversation with the tiny checkpoint FOLDER
python tests/walk.py question FOLDER            asks a server of that checkpoint one question
Prints the calls in order, a line `file function` each; a function that is called again while it was the last one is
told once. tests/test_architecture.py compares that with docs/architecture.md.
"""

import json
import os
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ROOMS = tuple(f"{ROOT / name}{os.sep}" for name in ("llmops", "train", "serve"))
MESSAGES = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "Pong!"}]


class Calls:
    """The calls of the project's own functions, in order, in this thread and in those that begin meanwhile."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []

    def __enter__(self) -> "Calls":
        threading.setprofile(self.note)
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    def note(self, frame: FrameType, event: str, argument: Any) -> None:
        """Keep a call; what is made up by a comprehension or on a module's first line is none."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(ROOMS):
            return
        name = code.co_qualname.replace("<locals>.", "")
        if "<" in name:
            return
        call = (os.path.relpath(code.co_filename, ROOT), name)
        if not self.found or self.found[-1] != call:
            self.found.append(call)


def conversation(model: Path, folder: Path) -> list[tuple[str, str]]:
    """One step of training, as each process of a run does it."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from train import finetune

    line = json.dumps({"messages": MESSAGES}) + "\n"
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_text(line, encoding="utf-8")
    settings = {
        "model_name_or_path": model, "train_file": folder / "train.jsonl", "retention_file": folder / "test.jsonl",
        "output_path": folder / "out", "max_steps": 1, "tensorboard": "false", "gradient_checkpointing": "false",
    }  # fmt: skip
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    with Calls() as calls:
        assert finetune.main(flags) == 0
    return calls.found


def question(model: Path, folder: Path) -> list[tuple[str, str]]:
    """One question to a server within this process."""
    from serve.app import build_app
    from serve.serve import open_model
    from serve.server import Server, bound
    from serve.settings import read_settings

    settings = read_settings(
        ["--model_name_or_path", str(model), "--mount_path", str(folder), "--port", "0", "--auth", "false"]
    )
    listener = bound(settings.access)
    begun = threading.Event()

    def ask() -> None:
        sys.setprofile(None)  # the client is not of interest
        begun.wait()
        calls.found.clear()
        body = json.dumps({"messages": MESSAGES[:1], "max_tokens": 4, "temperature": 0}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions", body,
            {"content-type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["choices"]
        server.should_exit = True

    asking = threading.Thread(target=ask)
    with Calls() as calls:
        opened = open_model(settings)
        assert opened
        server = Server(build_app(settings, opened), settings.access, 10, begun.set)
        asking.start()
        server.run(sockets=[listener])
        asking.join()
        found = list(calls.found)
        assert opened.close()
    return found


def main() -> int:
    """Walk, print."""
    walk = {"conversation": conversation, "question": question}[sys.argv[1]]
    with tempfile.TemporaryDirectory() as folder:
        found = walk(Path(sys.argv[2]), Path(folder))
    print("\n".join(" ".join(call) for call in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
