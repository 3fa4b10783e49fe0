"""The console in a real browser over a mount with many runs: times of painting, and of not answering.

Every page is opened in a new browser context (nothing is in its cache) --times times; medians, in milliseconds:
`painted` the browser's first contentful paint, `there` until the numbers that the page fetches itself are shown,
`longest_task` the longest piece of work of the page's own thread while it is used as people do (scrolled, marked, the
scale switched, the curve zoomed and hovered): an input waits no longer than that. Browser and server share the machine.

With --training CHECKPOINT it measures instead what the console costs a run beside it: one training of equal steps, and
beside it in turns no console, and a console that is asked as two open pages ask it (a browser is usually elsewhere).
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from llmops import files
from llmops.console import UserError, log, progress, run_main

TOKEN = "token-of-the-benchmark"
SETTLED = 5  # seconds after which a console has started and read what was there
TASKS = """
window.longest = 0;
new PerformanceObserver((list) => {
  for (const one of list.getEntries()) window.longest = Math.max(window.longest, one.duration);
}).observe({ type: "longtask", buffered: true });
"""
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def log_lines(steps: int) -> str:
    """A log.txt of that many steps, evaluated every hundredth."""
    lines = []
    for step in range(1, steps + 1):
        told = {"step": step, "epoch": round(step / 1000, 4), "elapsed": step / 2, "remaining": (steps - step) / 2}
        loss = 0.5 + 2 / (1 + step / 200) + 0.1 * math.sin(step)
        lines.append(
            told | {"loss": round(loss, 4), "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_second": 900.0}
        )
        if step % 100 == 0:
            lines.append(
                told | {"eval_loss": round(0.6 + 2 / (1 + step / 200), 4), "retention_loss": round(2 + step / 1e5, 4)}
            )
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_run(folder: Path, steps: int) -> None:
    """A finished run as training leaves it."""
    files.make_folder(folder, "a run")
    settings = {
        "scenario": "general",
        "train_type": "lora",
        "num_train_epochs": 3,
        "learning_rate": 1e-4,
        "lora_dim": 16,
    }
    results = {"steps": steps, "best_step": steps, "eval_loss": 0.6, "eval_loss_before": 2.6, "retention_loss": 2.1}
    files.write_text(folder / "finetune_config.json", json.dumps(settings))
    files.write_text(folder / "log.txt", log_lines(steps))
    files.write_text(folder / "train_results.json", json.dumps(results))


@contextmanager
def console(mount: Path) -> Iterator[str]:
    """The console without a model, on a free port, until the block ends; its address."""
    command = [
        sys.executable, str(HERE.parent / "serve" / "serve.py"), "--port", "0", "--mount_path", str(mount),
        "--model_name_or_path", "none",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=os.environ | {"LLMOPS_TOKEN": TOKEN}, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            raise UserError("the console did not start; what it said stands above")
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.wait(20)


def use_list(page: Any) -> None:
    """Scroll the list of runs to its end and back, mark two."""
    for _ in range(10):
        page.mouse.wheel(0, 4000)
        page.wait_for_timeout(30)
    page.mouse.wheel(0, -100000)
    for box in page.locator("input[name=run]").all()[:2]:
        box.check()
    page.wait_for_timeout(300)


def use_run(page: Any) -> None:
    """Switch the scale, smooth, hover and zoom the curve."""
    box = page.locator(".u-over").first.bounding_box()
    for place in range(40):
        page.mouse.move(box["x"] + box["width"] * place / 40, box["y"] + box["height"] / 2)
    page.locator("#log").click()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 20, steps=10)
    page.mouse.up()
    page.wait_for_timeout(300)


def measure(browser: Any, url: str, path: str, there: str, use: Callable[[Any], None]) -> dict[str, float]:
    """One visit: milliseconds by name."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="zh-CN")
    try:
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{url}/health")  # the browser is awake, nothing of the console is in its cache
        context.add_cookies([{"name": "llmops_token", "value": TOKEN, "url": url}])
        page.add_init_script(TASKS)
        page.goto(url + path)
        page.locator(there).first.wait_for()
        shown = page.evaluate("performance.now()")
        painted = page.evaluate(PAINTED)
        page.wait_for_timeout(300)
        page.evaluate("window.longest = 0")
        use(page)
        return {"painted": painted, "there": shown, "longest_task": page.evaluate("window.longest")}
    finally:
        context.close()


def rounded(value: Any) -> Any:
    """A number, or each of a list, to four places."""
    return [rounded(one) for one in value] if isinstance(value, list) else round(value, 4)


def until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    """Wait for something that a process brings about. Raises UserError if it ends before."""
    while not condition():
        if process.poll() is not None:
            raise UserError("the training ended early; what it said stands above")
        time.sleep(0.1)


def ask_as_pages(url: str, run: str, ended: threading.Event) -> None:
    """What the list of runs and a run's page ask for while a run is live, every two seconds."""
    asked = ("/console/api/runs", f"/console/api/run?run={run}", f"/console/api/diagnosis?run={run}")
    offset, identity = 0, ""
    while not ended.wait(2):
        log_of = "/console/api/log?" + urlencode({"run": run, "offset": offset, "identity": identity})
        for path in (*asked, log_of):
            request = urllib.request.Request(url + path, headers={"authorization": f"Bearer {TOKEN}"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                found = json.load(answer)
        offset, identity = found["offset"], found["identity"]


def cost(checkpoint: Path, seconds: int, turns: int) -> dict[str, Any]:
    """Median seconds of a step without and with the console beside it, and the median of the turns' ratios."""
    with tempfile.TemporaryDirectory() as folder:
        mount, run = Path(folder, "mnt"), Path(folder, "mnt", "output_path")
        files.make_folder(mount / "datasets", "the data's folder")
        talk = [{"role": "user", "content": "What is bread made of?"}, {"role": "assistant", "content": "Flour. " * 40}]
        files.write_text(mount / "datasets" / "train.jsonl", (json.dumps({"messages": talk}) + "\n") * 400)
        command = [
            "bash", str(HERE.parent / "chat_main.sh"), "--mount_path", str(mount), "--model_name_or_path",
            str(checkpoint), "--num_train_epochs", "1000", "--per_device_train_batch_size", "1",
            "--gradient_accumulation_steps", "1", "--logging_steps", "1", "--tensorboard", "false",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=sys.stderr)

        def steps() -> list[float]:
            lines = (run / "log.txt").read_text(encoding="utf-8").splitlines() if (run / "log.txt").is_file() else []
            return [row["elapsed"] for row in map(json.loads, lines) if "loss" in row]

        def turn(name: str) -> float:
            first = len(steps())
            time.sleep(seconds)
            until(lambda: len(steps()) > first + 2, process)
            times = steps()[first:]
            found = statistics.median(b - a for a, b in pairwise(times))
            log(f"{name}: {found:.3f} s a step, median of {len(times) - 1}")
            return found

        try:
            until(lambda: len(steps()) > 5, process)
            alone, beside = [], []
            for _ in range(turns):
                alone.append(turn("alone"))
                with console(mount) as url:
                    ended = threading.Event()
                    pages = threading.Thread(target=ask_as_pages, args=(url, "output_path", ended))
                    pages.start()
                    time.sleep(SETTLED)  # it starts once, and a run is long
                    beside.append(turn("with the console"))
                    ended.set()
                    pages.join()
            alone.append(turn("alone"))
            around = [(before + after) / 2 for before, after in pairwise(alone)]
            ratios = [with_it / without for with_it, without in zip(beside, around, strict=True)]
            told = {"alone": statistics.median(alone), "beside": statistics.median(beside)}
            return told | {"ratio": statistics.median(ratios), "ratios": ratios}
        finally:
            process.terminate()
            process.wait(120)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs, visit the pages, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1000, help="runs below the mount")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of the longest one; the others have 100")
    parser.add_argument("--times", type=int, default=5, help="visits of each page")

    parser.add_argument("--training", type=Path, help="measure what the console costs a training of this checkpoint")
    parser.add_argument("--seconds", type=int, default=30, help="with --training: of each turn")

    def body() -> int:
        given = parser.parse_args(argv)
        if given.training:
            found = cost(given.training, given.seconds, given.times)
            print(json.dumps({key: rounded(value) for key, value in found.items()}, indent=2))
            return 0
        from playwright.sync_api import sync_playwright

        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
        if not chromium:
            raise UserError("Chromium is not installed (Debian: apt-get install chromium)")
        with tempfile.TemporaryDirectory() as folder:
            mount = Path(folder, "mnt")
            for k in progress(range(given.runs - 1), "writing", given.runs - 1, "runs"):
                write_run(mount / f"team-{k % 20}" / f"run-{k}", 100)
            write_run(mount / "long", given.steps)
            visits = {
                f"the list of {given.runs} runs": ("/", "tr[data-run]", use_list),
                f"a run of {given.steps} steps": ("/runs/long", ".u-over", use_run),
                "evaluations, empty": ("/evaluations", "h1", lambda page: None),
            }  # fmt: skip
            found = {}
            with console(mount) as url, sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
                for name, (path, there, use) in visits.items():
                    rows = [measure(browser, url, path, there, use) for _ in range(given.times)]
                    found[name] = {key: round(statistics.median(row[key] for row in rows)) for key in rows[0]}
                    log(f"{name}: {found[name]}")
                browser.close()
        print(json.dumps(found, indent=2))
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
