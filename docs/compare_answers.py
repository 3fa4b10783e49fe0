"""Ask a model server and the model's folder the same questions: does the server answer as the trained model does?

    python docs/compare_answers.py --model_name_or_path mnt/output_path/merged --url http://127.0.0.1:8000 \\
        --data mnt/datasets/test.jsonl

The server speaks OpenAI's HTTP (vLLM, SGLang). Each question goes there twice, greedy: as token ids to
/v1/completions, which tells whether the weights are served rightly, and as messages to /v1/chat/completions, which
tells whether the chat template is. stdout is one JSON object: how many answers are the same, and those that are not.
Exit code 1 when fewer than --least of either kind are: in another number format a few answers part at near ties, with
another template nearly all.
"""

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmops import files, json_text
from llmops.console import Parser, UserError, print_json, run_main
from llmops.conversations import data_files
from llmops.conversations.records import Message
from llmops.machine import devices
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint

KEY = "OPENAI_API_KEY"  # of the server, where it wants one
SECONDS = 600  # that one answer may take


@dataclass(frozen=True)
class Asked:
    """A question: its messages, its prompt's ids, and our greedy answer."""

    messages: list[Message]
    ids: list[int]
    answer: str


def ours(model: ChatModel, conversations: Sequence[list[Message]], tokens: int, dtype: str) -> list[Asked]:
    """Our answers to the last question of each conversation."""
    import torch

    prompts = [model.chat.prompt(messages) for messages in conversations]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = model.generator(devices.choose_dtype(dtype), device, batch_size=16)
    answers = dict(generator.generate(prompts, tokens, model.chat.stop_ids()))
    return [
        Asked(messages, ids, str(model.tokenizer.decode(answers[i].ids, skip_special_tokens=True)))
        for i, (messages, ids) in enumerate(zip(conversations, prompts, strict=True))
    ]


def read_questions(path: Path, limit: int) -> list[list[Message]]:
    """The messages before the last answer of each conversation. Raises UserError for a file that cannot be read."""
    data_files.validate_files([path])
    found: list[list[Message]] = []
    for read in data_files.read_conversations(path):
        if isinstance(read, data_files.Read) and len(found) < limit:
            messages = read.conversation.messages
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            found.append([*messages[:last]])
    return found


def post(url: str, body: dict[str, Any], key: str) -> dict[str, Any]:
    """What the server answers to a JSON body. Raises UserError that names the address."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            found = json_text.parse_json(answer.read().decode("utf-8"))
    except urllib.error.HTTPError as error:
        said = files.plain(error.read().decode("utf-8", "replace"), 300)
        raise UserError(f"{url} answered {error.code}: {said}") from error
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UserError(f"{url} cannot be asked ({error}); is the server up, and is --url its address?") from error
    if not isinstance(found, dict) or not found.get("choices"):
        raise UserError(f"{url} answered {files.shown(found)}, expected an object with choices")
    return found


def theirs(url: str, name: str, asked: Asked, tokens: int, key: str) -> tuple[str, str]:
    """(answer to the token ids, answer to the messages)."""
    common = {"model": name, "max_tokens": tokens, "temperature": 0}
    plain = post(f"{url}/v1/completions", common | {"prompt": asked.ids}, key)["choices"][0]
    chat = post(f"{url}/v1/chat/completions", common | {"messages": asked.messages}, key)["choices"][0]
    return plain.get("text") or "", (chat.get("message") or {}).get("content") or ""


def compare(args: argparse.Namespace) -> int:
    """Print the comparison; 1 when too few answers are the same."""
    questions = read_questions(args.data, args.limit)
    checkpoint = Checkpoint(args.model_name_or_path, args.mode, args.trust_remote_code)
    checkpoint.check_trust()
    key, url = os.environ.get(KEY, ""), args.url.rstrip("/")
    rows_asked = ours(ChatModel(checkpoint), questions, args.max_new_tokens, args.dtype)
    same, different = {"token_ids": 0, "messages": 0}, []
    for asked in rows_asked:
        found = dict(zip(same, theirs(url, args.served_name, asked, args.max_new_tokens, key), strict=True))
        for kind, text in found.items():
            same[kind] += text.strip() == asked.answer.strip()
        if any(text.strip() != asked.answer.strip() for text in found.values()):
            different.append({"messages": asked.messages, "ours": asked.answer, **found})
    print_json({"questions": len(rows_asked), "same": same, "different": different})
    return int(min(same.values()) < args.least * len(rows_asked))


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model_name_or_path", type=Path, required=True, help="what the server serves, or its adapter")
    parser.add_argument("--url", required=True, help="the server, such as http://127.0.0.1:8000")
    parser.add_argument("--data", type=Path, required=True, help="conversations; each one's last question is asked")
    parser.add_argument("--served_name", default="tuned", help="the model's name at the server")
    parser.add_argument("--limit", type=int, default=50, help="questions at most")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="length of an answer")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="the server's")
    parser.add_argument("--least", type=float, default=0.9, help="share of equal answers under which it exits with 1")
    parser.add_argument("--mode", default="auto", help="chat format, as in training")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that the folder ships")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; the exit code."""
    args = build_parser().parse_args(argv)
    return run_main(lambda: compare(args))


if __name__ == "__main__":
    sys.exit(main())
