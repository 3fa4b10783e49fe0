"""A real browser against the real server: Chromium through Playwright, a mount with runs, results, reports."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from serve_process import TOKEN, Running, serving

try:
    from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright
except ImportError:  # requirements-dev.txt has it
    sync_playwright = None

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
DATA = ROOT / "eval" / "eval_datasets" / "faq_similar" / "combine_data.json"
HOSTILE = "<img src=x onerror=window.hacked=1>"  # a name of a folder
SCRIPT = f"{HOSTILE}<script>window.hacked=1</script>"  # in questions and answers
SIZES = ((1280, 900), (390, 844))
SECONDS = 30_000  # milliseconds that a browser waits for what must come, on a busy machine, too


def serious_faults(page: "Page") -> dict[str, list[str]]:
    """What axe-core finds serious or critical on a page, by rule."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return {
        rule["id"]: [node["html"][:200] + (node.get("failureSummary") or "") for node in rule["nodes"]][:3]
        for rule in found
        if rule["impact"] in ("serious", "critical")
    }


def log_line(step: int, steps: int = 200, **values: Any) -> str:
    """A line of log.txt."""
    told = {"step": step, "epoch": step / 100, "elapsed": step / 2, "remaining": (steps - step) / 2}
    loss = {} if values else {"loss": 2 / (1 + step / 10), "learning_rate": 1e-3, "tokens_per_second": 900.0}
    return json.dumps(told | loss | values) + "\n"


def write_run(folder: Path, steps: int, finished: bool) -> Path:
    """A run whose test loss turns at step 40 and whose retention loss rises."""
    folder.mkdir(parents=True)
    settings = {"scenario": "general", "train_type": "lora", "num_train_epochs": 2, "learning_rate": 1e-3}
    (folder / "finetune_config.json").write_text(json.dumps(settings | {"lora_dim": steps}))
    (folder / ".lock").touch()
    lines = []
    for step in range(1, steps + 1):
        lines.append(log_line(step))
        if step % 10 == 0:
            lines.append(log_line(step, eval_loss=1 + abs(step - 40) / 60, retention_loss=1 + step / 100))
    (folder / "log.txt").write_text("".join(lines))
    if finished:
        results = {"steps": steps, "best_step": 40, "eval_loss": 1.0, "eval_loss_before": 2.0, "retention_loss": 1.4}
        (folder / "train_results.json").write_text(json.dumps(results))
        (folder / "checkpoint-40").mkdir()
    return folder


def write_results(folder: Path, model: str, score: float) -> None:
    """An evaluation of five dimensions with samples of one."""
    (folder / "samples").mkdir(parents=True)
    names = ("inference_ability", "reading_comprehension", "chinese_language_skill", "command_compliance")
    parts = {
        name: {
            "metric": "accuracy", "metrics": {"accuracy": {"interval_95": [score - 0.1, score + 0.1], "samples": 2}},
            "floor": {"what": "majority", "score": 0.3}, "ceiling": {"what": "every answer right", "score": 1.0},
        }
        for name in names
    }  # fmt: skip
    told = {"command": "evaluate_model_from_five_dimensions", "model": model, "dimensions": parts,
            "evaluation_results": dict.fromkeys(names, score), "diagnosis": {names[0]: [SCRIPT]}}  # fmt: skip
    (folder / "eval_results.json").write_text(json.dumps(told))
    rows = [{"id": str(i), "prompt": f"{SCRIPT} {i}", "prediction": SCRIPT, "references": ["是"],
             "scores": {"accuracy": float(i)}} for i in range(2)]  # fmt: skip
    (folder / "samples" / f"{names[0]}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something for every page; names and texts that would be markup if they were let."""
    from eval import analyze_similar_questions_and_intents as similar

    root = tmp_path_factory.mktemp("browser") / "mnt"
    write_run(root / "done" / "output_path", 120, True)
    write_run(root / HOSTILE, 60, True)
    write_run(root / "live" / "output_path", 20, False)
    for name, score in (("one", 0.5), ("two", 0.6)):
        write_results(root / "eval" / name, f"/models/{name}", score)
    faq = root / "faq"
    faq.mkdir()
    rows = [
        {"question": f"{SCRIPT} {i}", "intent": "退款" if i % 3 else "发票", "reference": "退款", "probability": i / 10}
        for i in range(10)
    ]
    (faq / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copyfile(DATA, faq / "combine_data.json")
    arguments = ["--data_file_path", str(faq / "combine_data.json"), "--model_path", "builtin:ngram"]
    arguments += ["--similarity_threshold", "0.4", "--output_file", str(faq / "similar.json")]
    assert similar.main(arguments) == 0
    return root


@pytest.fixture(scope="session")
def server(mount: Path) -> Iterator[Running]:
    """The console without a model."""
    with serving("--mount_path", str(mount)) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    """One Chromium for a file's tests. While it lives an event loop runs, and asyncio.run() of other files fails."""
    if sync_playwright is None:
        pytest.skip("playwright is not installed; requirements-dev.txt has it")
    if not CHROMIUM:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: "Browser") -> Iterator[Callable[..., "Page"]]:
    """A new browser that shows a page of a server, logged in by the token; errors of its scripts fail the test."""
    opened: list[Page] = []
    wrong: list[str] = []

    def listen(message: "ConsoleMessage") -> None:
        if message.type in ("error", "warning"):
            wrong.append(message.text)

    def go(running: Running, path: str = "/", **context: Any) -> "Page":
        page = chromium.new_context(
            **{"locale": "en-US", "viewport": {"width": 1280, "height": 900}} | context
        ).new_page()
        page.set_default_timeout(SECONDS)
        page.on("console", listen)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        opened.append(page)
        page.goto(f"{running.url}/?token={TOKEN}")
        if path != "/":
            page.goto(running.url + path)
        return page

    go.wrong = wrong  # type: ignore[attr-defined]
    yield go
    for page in opened:
        assert page.evaluate("window.hacked") is None
        page.context.close()
    assert wrong == []


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something outside of the browser."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
