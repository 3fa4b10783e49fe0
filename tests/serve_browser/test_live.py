"""A run that is training updates by itself and is asked to stop; a curator's session by keyboard; the chat streams."""

import fcntl
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve_process import Running, serving

from llmops.faq_records import read_faq

from .conftest import DATA, log_line, until

KEYS = ["k", "l", "k", "1", "r", "k", "m", "2", "k", "l"]


def test_a_running_training(server: Running, mount: Path, visit: Callable[..., Any]) -> None:
    run = mount / "live" / "output_path"
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a training holds it
        listed = visit(server)
        row = listed.locator('tr[data-run="live/output_path"]')
        page = visit(server, "/runs/live/output_path")
        page.locator("#chart canvas").wait_for()
        assert page.locator('[data-cell="step"]').inner_text() == "20 / 200"
        before = page.locator("#chart canvas").screenshot()
        with open(run / "log.txt", "a") as log:
            log.write("".join(log_line(step) for step in range(21, 101)))
            log.write(log_line(100, eval_loss=0.75, retention_loss=2.5))
        page.get_by_text("100 / 200").wait_for()  # by itself
        assert page.locator('[data-cell="eval_loss"]').inner_text() == "0.75"
        until(lambda: page.locator("#chart canvas").screenshot() != before)
        row.get_by_text("100 / 200").wait_for()
        assert row.locator('[data-cell="remaining"]').inner_text() in ("0:00:50", "0:00:49", "0:00:48", "0:00:47")
        page.get_by_role("button", name="Ask to stop").click()
        page.get_by_role("button", name="Stop it").click()
        page.locator(".state.stopping").wait_for()
        assert (run / "STOP").exists()
    (run / "checkpoint-100").mkdir()
    page.locator(".state.stopped").wait_for()  # it ended in good order


def test_a_curator_s_session(mount: Path, visit: Callable[..., Any]) -> None:
    decisions = mount / "faq" / "combine_data.decisions.jsonl"

    def kept() -> list[dict[str, Any]]:
        lines = decisions.read_text(encoding="utf-8").splitlines() if decisions.exists() else []
        return [json.loads(line) for line in lines]

    def press(keys: list[str]) -> None:
        before = len(kept())
        for key in keys:  # as fast as they come
            page.keyboard.press(key)
        until(lambda: len(kept()) == before + len(keys))

    with serving("--mount_path", str(mount)) as first:
        page = visit(first, "/curator?report=faq/similar.json")
        page.get_by_text("Not looked at yet.").wait_for()
        press(KEYS)
        query = "report=faq/similar.json&data=faq/combine_data.json"
        groups = first.ask("GET", f"/console/api/curator?{query}").json["groups"]
        pairs = [pair for group in groups for pair in group["pairs"]]
        shown = f"{sum(pair['decision'] is not None for pair in pairs)} of {len(pairs)} looked at"
        page.get_by_text(shown, exact=True).wait_for()
        first.end(signal.SIGKILL)
    with serving("--mount_path", str(mount), "--port", str(first.port)) as again:
        page.reload()
        page.get_by_text(shown, exact=True).wait_for()  # nothing was lost
        press(["k", *KEYS[1:6], "k", "r", "k", "k"])
        assert len(kept()) == 20
        page.keyboard.press("ArrowUp")
        page.get_by_role("button", name="Write the cleaned file").click()
        page.get_by_text("combine_data.cleaned.jsonl is written").wait_for()
        assert again.said
    cleaned = read_faq(mount / "faq" / "combine_data.cleaned.jsonl").records
    intents = {question: record.intent for record in cleaned for question in record.questions}
    gone = {line["intents"][line["side"]]: line["intent"] for line in kept() if line["action"] == "merge"}
    dropped = {line["questions"][line["side"]] for line in kept() if line["action"] == "drop"}
    labels = {line["questions"][line["side"]]: line["intent"] for line in kept() if line["action"] == "relabel"}
    expected = {question: record.intent for record in read_faq(DATA).records for question in record.questions} | labels
    assert intents == {q: gone.get(i, i) for q, i in expected.items() if q not in dropped}


def test_chat(conversations: Any, tmp_path: Path, visit: Callable[..., Any]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from llmops import tiny
    from llmops.chat_model import ChatModel
    from llmops.checkpoints import Checkpoint

    texts = [message["content"] for messages in conversations for message in messages]
    folder = tiny.write_checkpoint(tmp_path / "base", texts, "llama", vocab_size=900, hidden=32, layers=2, heads=4)
    torch.manual_seed(3)
    base = ChatModel(Checkpoint(folder))
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base.weights(torch.float32), config).save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(folder)}), encoding="utf-8"
    )
    with serving("--mount_path", str(tmp_path), "--model_name_or_path", str(tmp_path)) as running:
        page = visit(running, "/chat")
        page.locator("#question").fill("ping")
        page.get_by_text("Sampling").click()
        page.locator("input[name=max_tokens]").fill("24")
        page.locator("#question").press("Enter")
        speeds = page.locator("[data-speed]")
        for i in range(2):
            page.wait_for_function("i => document.querySelectorAll('[data-speed]')[i].textContent", arg=i)
        assert [page.locator("h2").filter(has_text=name).count() for name in ("Base model", "Tuned model")] == [1, 1]
        said = [page.locator(".talk").nth(i).locator(".bubble.assistant .said").inner_text() for i in range(2)]
        assert said[0] != said[1]
        for i, model in enumerate(("base", "tuned")):  # what the page shows is what the server says
            body = {
                "model": model,
                "messages": [{"role": "user", "content": "ping"}],
                "temperature": 0,
                "max_tokens": 24,
            }
            content = running.ask("POST", "/v1/chat/completions", body).json["choices"][0]["message"]["content"]
            assert said[i] == " ".join(content.split()) or said[i].strip() == content.strip()
        assert speeds.count() == 2
        page.reload()
        assert page.locator(".bubble").count() == 4 or page.locator(".bubble").nth(3).wait_for() is None
