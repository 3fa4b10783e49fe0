"""A run that is training updates by itself and is asked to stop; a curator's session by keyboard; the chat streams."""

import fcntl
import itertools
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve_process import TOKEN, Running, serving

from llmops.intents.catalog import Catalog, wording_of
from llmops.intents.questions import read_faq
from serve.settings import Access, Limits, Model, Settings

from .conftest import DATA, SIZES, log_line, serious_faults, until

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
        left = row.locator('[data-cell="remaining"]').inner_text()  # of the 50 seconds that the log said
        assert "0:00:20" < left <= "0:00:50"
        page.get_by_role("button", name="Ask to stop").click()
        page.get_by_role("button", name="Stop it").click()
        page.locator(".state.stopping").wait_for()
        assert (run / "STOP").exists()
    (run / "checkpoint-100").mkdir()
    page.locator(".state.stopped").wait_for()  # it ended in good order
    page.get_by_text("checkpoint-100").wait_for()


def test_a_curator_s_session(mount: Path, visit: Callable[..., Any]) -> None:
    decisions = mount / "faq" / "combine_data.json.decisions.jsonl"

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
        page.get_by_text("combine_data.json.cleaned.jsonl is written").wait_for()
        assert again.said
    cleaned = read_faq(mount / "faq" / "combine_data.json.cleaned.jsonl").records
    intents = {question: record.intent for record in cleaned for question in record.questions}
    gone = {line["intents"][line["side"]]: line["intent"] for line in kept() if line["action"] == "merge"}
    dropped = {line["questions"][line["side"]] for line in kept() if line["action"] == "drop"}
    labels = {line["questions"][line["side"]]: line["intent"] for line in kept() if line["action"] == "relabel"}
    expected = {question: record.intent for record in read_faq(DATA).records for question in record.questions} | labels
    assert intents == {q: gone.get(i, i) for q, i in expected.items() if q not in dropped}


def test_a_curator_s_suspects(tmp_path: Path, visit: Callable[..., Any]) -> None:
    rows = [{"question": f"q{i}", "intent": "AB"[i % 2]} for i in range(5)]
    suspects = [
        {"line": i + 1, "question": f"q{i}", "intent": "AB"[i % 2], "suggested": "BA"[i % 2], "probability": 0.75}
        for i in range(4)
    ]
    for name, written in (("faq.json", rows), ("suspects.jsonl", suspects)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in written))
    with serving("--mount_path", str(tmp_path)) as running:
        page = visit(running, "/curator?report=suspects.jsonl")
        page.get_by_text("probability 75%").wait_for()
        assert page.locator("#actions button").all_inner_texts() == [
            "Keep k", "It is B l", "Another intent … e", "Drop 1", "Undo u",
        ]  # fmt: skip
        for key in ("r", "l", "1", "k"):  # the first is no key here
            page.keyboard.press(key)
        page.get_by_text("3 of 4 looked at", exact=True).wait_for()
        page.keyboard.press("e")
        assert page.locator("#other label:visible").count() == 2  # its question, the intent
        page.locator("#other-intent").fill("A")
        page.get_by_role("button", name="Relabel", exact=True).click()
        page.get_by_text("4 of 4 looked at", exact=True).wait_for()
        assert serious_faults(page) == {}
        page.get_by_role("button", name="Write the cleaned file").click()
        page.get_by_text("faq.json.cleaned.jsonl is written: 2 relabelled, 0 merged, 1 dropped").wait_for()


def write_adapter(folder: Path, texts: list[str]) -> None:
    """A LoRA adapter with random weights on a tiny model, and the intents that it is asked about."""
    import torch
    from peft import LoraConfig, get_peft_model

    from llmops.models import tiny
    from llmops.models.chat_model import ChatModel
    from llmops.models.checkpoints import Checkpoint

    made = tiny.write_checkpoint(folder / "base", texts, "llama", vocab_size=900, hidden=32, layers=2, heads=4)
    torch.manual_seed(3)
    base = ChatModel(Checkpoint(made))
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base.weights(torch.float32), config).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    catalog = Catalog("auto", wording_of("auto"), {"查询物流": "请在订单页查看。", "申请退款": "请提交申请。"})
    (folder / "intents.json").write_text(catalog.to_json(), encoding="utf-8")


@contextmanager
def serving_here(mount: Path, model: Path) -> Iterator[Running]:
    """The application with a model in this process, which has torch already: a second one would take seconds more."""
    import uvicorn

    from serve.app import build_app
    from serve.model.service import open_service

    limits = Limits(rows=4)
    service = open_service(Model(model), limits, mount / "feedback.jsonl")
    listener = socket.create_server(("127.0.0.1", 0))
    app = build_app(Settings(mount, Access(token=TOKEN), limits), service)
    server = uvicorn.Server(uvicorn.Config(app, ws="none", lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Running(None, f"http://127.0.0.1:{listener.getsockname()[1]}", service.names)  # type: ignore[arg-type]
    finally:
        server.should_exit = True
        thread.join(20)
        assert service.close()


def test_chat(conversations: Any, tmp_path: Path, visit: Callable[..., Any]) -> None:
    write_adapter(tmp_path, [message["content"] for messages in conversations for message in messages])
    with serving_here(tmp_path, tmp_path) as running:
        page = visit(running, "/chat")
        page.locator("#question").fill("ping")
        page.get_by_text("Sampling").click()
        page.locator("input[name=max_tokens]").fill("24")
        page.locator("#question").press("Enter")
        for i in range(2):
            page.wait_for_function("i => document.querySelectorAll('[data-speed]')[i].textContent", arg=i)
        assert page.locator(".talk h2").all_inner_texts() == ["Base model", "Tuned model"]
        said = page.locator(".bubble.assistant .said").all_text_contents()
        asked = {"messages": [{"role": "user", "content": "ping"}], "temperature": 0, "max_tokens": 24}
        answers = [running.ask("POST", "/v1/chat/completions", asked | {"model": model}) for model in ("base", "tuned")]
        assert said == [answer.json["choices"][0]["message"]["content"] for answer in answers]
        assert said[0] != said[1]
        bars = page.locator("#bars meter")
        bars.nth(2).wait_for()
        told = running.ask("POST", "/v1/intents", {"questions": ["ping"], "top": 5}).json["data"][0]["top"]
        assert [float(bars.nth(i).get_attribute("value")) for i in range(3)] == [one["probability"] for one in told]
        for scheme, (width, height) in itertools.product(("light", "dark"), SIZES):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": height})
            wider = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wider <= 0, f"{scheme} at {width}: {wider} pixels beyond the edge"
            assert serious_faults(page) == {}, (scheme, width)
        page.reload()
        page.locator(".bubble").nth(3).wait_for()  # the conversation is still there
        page.get_by_role("button", name="New conversation").click()
        assert page.locator(".bubble").count() == 0


TOLD_BY_HAND = """
const real = window.fetch;
window.asked = [];
window.fetch = (address, options) => {
  if (address === "/v1/models") return Promise.resolve(Response.json({ data: [{ id: "base" }] }));
  if (address !== "/v1/chat/completions") return real(address, options);
  window.asked.push(JSON.parse(options.body).messages.map((message) => message.content));
  const start = (stream) => {
    const write = (text) => stream.enqueue(new TextEncoder().encode(`data: ${text}\\n\\n`));
    window.tell = (content) => write(JSON.stringify({ choices: [{ delta: { content } }] }));
    window.end = () => write("[DONE]");
    options.signal.addEventListener("abort", () => stream.error(options.signal.reason));
  };
  return Promise.resolve(new Response(new ReadableStream({ start })));
};
"""


def test_a_chat_goes_on_after_a_question_without_an_answer(server: Running, visit: Callable[..., Any]) -> None:
    page = visit(server)
    page.add_init_script(TOLD_BY_HAND)
    page.goto(f"{server.url}/chat")

    def asked(question: str) -> list[str]:
        """What the server is told with a question."""
        page.locator("#send:enabled").wait_for()
        page.locator("#question").fill(question)
        page.locator("#question").press("Enter")
        page.wait_for_function("question => window.asked.at(-1)?.at(-1) === question", arg=question)
        return page.evaluate("window.asked.at(-1)")

    def told(*pieces: str) -> None:
        """A whole answer."""
        for piece in pieces:
            page.evaluate("piece => window.tell(piece)", piece)
        page.evaluate("window.end()")

    assert asked("one") == ["one"]
    told()
    page.get_by_text("No answer came").wait_for()
    assert asked("two") == ["two"]
    told(" ", "\n")
    assert asked("three") == ["three"]
    page.get_by_role("button", name="Stop").click()
    assert asked("four") == ["four"]
    told("y", "es")
    assert asked("five") == ["four", "yes", "five"]
    page.evaluate("window.tell('part')")
    page.get_by_text("part", exact=True).wait_for()
    page.get_by_role("button", name="New conversation").click()
    assert asked("six") == ["six"]
    told("fine")
    assert asked("seven") == ["six", "fine", "seven"]
    page.evaluate("window.tell('half')")
    page.get_by_text("half", exact=True).wait_for()
    page.get_by_role("button", name="Stop").click()  # what was said counts
    assert asked("eight") == ["six", "fine", "seven", "half", "eight"]
    page.get_by_role("button", name="Stop").click()
    page.locator("#send:enabled").wait_for()
    page.reload()
    assert page.locator(".bubble .said").all_inner_texts() == ["six", "fine", "seven", "half"]
