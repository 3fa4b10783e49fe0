"""docs/compare_answers.py against a server that answers as plain transformers does, and against one that does not."""

import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

SPEC = importlib.util.spec_from_file_location("compare_answers", ROOT / "docs" / "compare_answers.py")
assert SPEC
assert SPEC.loader
compare_answers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare_answers)


class StandIn(BaseHTTPRequestHandler):
    """The two addresses that are asked; `template` is what it writes conversations with (None: the folder's)."""

    folder: Path
    template: str | None = None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        model = AutoModelForCausalLM.from_pretrained(self.folder)
        if self.path == "/v1/chat/completions":
            text = tokenizer.apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=True, chat_template=self.template
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        elif self.path == "/v1/completions":
            ids = body["prompt"]
        else:
            self.send_error(404, "no such address")
            return
        row = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=body["max_tokens"], pad_token_id=0)[
            0
        ][len(ids) :]
        text = tokenizer.decode(row, skip_special_tokens=True)
        chat = self.path.endswith("chat/completions")
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        raw = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def server(taught: Path) -> Iterator[tuple[str, type[StandIn]]]:
    """(address, the handler's class)."""
    handler = type("Here", (StandIn,), {"folder": taught})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", handler
        served.shutdown()


def test_answers_are_compared(
    server: tuple[str, type[StandIn]], taught: Path, taught_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, handler = server
    given = ["--model_name_or_path", str(taught), "--url", url + "/", "--data", str(taught_data), "--limit", "4"]
    given += ["--max_new_tokens", "24"]
    assert compare_answers.main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"questions": 4, "same": {"token_ids": 4, "messages": 4}, "different": []}
    handler.template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert compare_answers.main(given) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["same"]["token_ids"] == 4
    assert found["same"]["messages"] < 4
    assert found["different"][0]["ours"] == found["different"][0]["token_ids"]


@pytest.mark.parametrize(
    ("path", "sentence"), [("/nowhere", "answered 404: "), ("", "cannot be asked (")], ids=["404", "nobody"]
)
def test_a_server_that_is_not_one(
    server: tuple[str, type[StandIn]], taught: Path, taught_data: Path, capsys: pytest.CaptureFixture[str],
    path: str, sentence: str,
) -> None:  # fmt: skip
    url = server[0] + path if path else "http://127.0.0.1:9"
    given = ["--model_name_or_path", str(taught), "--url", url, "--data", str(taught_data), "--limit", "1"]
    assert compare_answers.main(given) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.out == ""
