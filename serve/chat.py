"""Talk to a model in the terminal: one question, or a conversation.

python serve/chat.py --help        every setting
Answers are on stdout, everything else on stderr.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmops import cpu_kernels, devices
from llmops.chat_formats import families
from llmops.chat_model import ChatModel
from llmops.checkpoints import Checkpoint
from llmops.console import Parser, UserError, check_packages, has_gpu, log, run_main, stdout_to_stderr, to_bool
from llmops.files import write_stdout
from llmops.records import Message

if TYPE_CHECKING:
    from llmops.generation import Generator


def build_parser() -> argparse.ArgumentParser:
    """Every setting with its default."""
    parser = Parser(prog="chat.py", description="Talk to a model in the terminal.", allow_abbrev=False)
    add = parser.add_argument
    add("--model_name_or_path", default="mnt/output_path", help="adapter, merged or whole model")
    add("--question", default="", help="one question; empty: a conversation, a question a line")
    add("--system", default="", help="what the model is told before; empty: as its template has it")
    add("--max_new_tokens", type=int, default=512, help="longest answer")
    add("--mode", default="auto", choices=list(families()), help="chat format, as in training")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="auto: bf16 where the GPU has it")
    add("--cpu_kernels", default="auto", choices=cpu_kernels.SETTINGS, help=cpu_kernels.HELP)
    add("--trust_remote_code", type=to_bool, default=False, metavar="true|false",
        help="run Python code that the checkpoint's folder ships")  # fmt: skip
    return parser


class Talk:
    """A model, and the conversation with it so far."""

    def __init__(self, model: ChatModel, generator: "Generator", system: str, longest: int) -> None:
        self.model, self.generator, self.longest = model, generator, longest
        self.before: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.before)

    def begin(self) -> None:
        """Forget what was said."""
        self.messages = list(self.before)

    def ask(self, question: str) -> str:
        """The greedy answer to the next question. Raises UserError where the conversation is longer than the model."""
        chat = self.model.chat
        asked = [*self.messages, {"role": "user", "content": question}]
        prompt = chat.prompt(asked)
        length = self.model.checkpoint.length
        room = min(self.longest, length - len(prompt)) if length else self.longest
        if room < 1:
            raise UserError(f"the conversation has {len(prompt)} tokens and the model was made for {length}; ask less")
        ((_, found),) = self.generator.generate([prompt], room, chat.stop_ids())
        answer = chat.tokenizer.decode(found.ids, skip_special_tokens=True).strip()
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer if found.ended else f"{answer} ..."


def open_talk(given: argparse.Namespace) -> Talk:
    """The model, ready to answer. Raises UserError for a folder that holds none."""
    folder = Path(given.model_name_or_path)
    checkpoint = Checkpoint(folder, given.mode, given.trust_remote_code)
    if not checkpoint.is_whole and not checkpoint.is_adapter:
        raise UserError(f"{folder} holds no model; train first, or pass --model_name_or_path with a checkpoint folder")
    check_packages("torch", "transformers")
    cpu_kernels.settle(given.cpu_kernels)
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    import transformers

    devices.check_gpu()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = ChatModel(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = model.generator(devices.choose_dtype(given.dtype), device, 1)
    log(f"{folder}: {model.chat.name}")
    return Talk(model, generator, given.system, given.max_new_tokens)


def questions() -> Iterator[str]:
    """Lines of the terminal, or of a file or pipe that stands for it, until they end."""
    people = sys.stdin.isatty()
    if people:
        log("Ask; an empty line begins a new conversation, Ctrl-D ends.")
    while True:
        if people:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def run(given: argparse.Namespace) -> int:
    """Answer what is asked; the exit code."""
    if given.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {given.max_new_tokens}, expected at least 1")
    with stdout_to_stderr():
        talk = open_talk(given)
    for question in [given.question] if given.question else questions():
        if not question:
            talk.begin()
            continue
        try:
            write_stdout(talk.ask(question) + "\n")
        except UserError as error:
            if given.question:
                raise
            log(f"error: {error}")
            talk.begin()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, open, talk."""

    def body() -> int:
        try:
            return run(build_parser().parse_args(argv))
        except KeyboardInterrupt:
            return 130

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
