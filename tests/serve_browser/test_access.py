"""For whoever hears the pages, or has no use for single keys: what is spoken, where the focus goes, which keys act."""

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve_process import Running, serving

from .conftest import DATA, serious_faults, until, write_run

HEARD = """() => {
  window.heard = [];
  const live = document.querySelectorAll("[aria-live], [role=status], [role=log], [role=alert]");
  const listen = (place) => new MutationObserver(() => place.textContent.trim() && window.heard.push(place.textContent))
    .observe(place, { childList: true, characterData: true, subtree: true });
  live.forEach(listen);
}"""


def write_report(folder: Path) -> Path:
    """FAQ data and a report with three groups of pairs; where decisions go."""
    from eval import analyze_similar_questions_and_intents as similar

    shutil.copyfile(DATA, folder / "faq.json")
    arguments = ["--data_file_path", str(folder / "faq.json"), "--model_path", "builtin:ngram"]
    arguments += ["--similarity_threshold", "0.4", "--output_file", str(folder / "similar.json")]
    assert similar.main(arguments) == 0
    return folder / "faq.json.decisions.jsonl"


def focused(page: Any) -> str:
    """What has the focus: a button's `data-hold`, else an id."""
    return page.evaluate("document.activeElement.dataset.hold ?? document.activeElement.id")


def test_the_colours_button_says_what_it_does(server: Running, visit: Callable[..., Any]) -> None:
    page = visit(server)
    page.evaluate(HEARD)
    button = page.get_by_role("button", name="Colours: Auto. Change to: Light")
    assert button.inner_text() == "Auto"  # what is seen is a part of what is said
    button.click()
    assert page.locator("#theme").get_attribute("aria-label") == "Colours: Light. Change to: Dark"
    assert page.evaluate("window.heard") == ["Colours: Light"]
    page.get_by_role("link", name="中文").click()
    page.get_by_role("button", name="颜色：浅色。切换为：深色").wait_for()


def test_only_what_changed_is_spoken_of_a_run(tmp_path: Path, visit: Callable[..., Any]) -> None:
    run = write_run(tmp_path / "run", 20, False)
    level = ["Low"]

    def judged(route: Any) -> None:
        """A diagnosis as the server gives it, its numbers new each time."""
        level.append(level[-1])
        finding = {"level": "Low", "reason": f"looked at {len(level)} times", "numbers": {"at": len(level)}}
        risks = ("overfitting", "underfitting", "catastrophic_forgetting")
        findings = dict.fromkeys(risks, finding) | {"overfitting": finding | {"level": level[-1]}}
        told = {"problem": "", "axis": "step", "findings": findings, "recommendations": {}}
        route.fulfill(body=json.dumps(told), content_type="application/json")

    with serving("--mount_path", str(tmp_path)) as running, open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        page = visit(running)
        page.clock.install()
        page.route("**/console/api/diagnosis?*", judged)
        page.goto(f"{running.url}/runs/run")
        page.get_by_text("looked at 2 times").first.wait_for()
        page.evaluate(HEARD)
        page.locator("#findings summary").nth(1).focus()
        page.keyboard.press("Enter")
        page.clock.fast_forward("00:20")
        page.get_by_text("looked at 3 times").first.wait_for()
        assert page.evaluate("window.heard") == []
        assert page.evaluate("document.activeElement.closest('details').open")  # it is where it was, and open
        level.append("High")
        page.clock.fast_forward("00:20")
        page.get_by_text("looked at 5 times").first.wait_for()
        assert page.evaluate("window.heard") == ["Overfitting: High"]


def test_the_focus_stays_with_a_curator(tmp_path: Path, visit: Callable[..., Any]) -> None:
    write_report(tmp_path)
    with serving("--mount_path", str(tmp_path)) as running:
        page = visit(running, "/curator?report=similar.json&data=faq.json")
        page.get_by_text("Not looked at yet.").wait_for()
        page.evaluate(HEARD)
        first = page.locator("#pair .question").first.inner_text()
        page.get_by_role("button", name="Keep both k").focus()
        page.keyboard.press("Enter")
        page.locator("#counted", has_text="1 of ").wait_for()
        assert focused(page) == "act k"
        (heard,) = page.evaluate("window.heard")  # once, and the pair that is next
        question = page.locator("#pair .question").first.inner_text()
        assert heard.startswith("kept. ")
        assert question in heard
        assert first not in heard
        page.locator("#pairs button[aria-current]").focus()
        page.keyboard.press("k")
        page.locator("#counted", has_text="2 of ").wait_for()
        assert focused(page).startswith("pair ")
        assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "true"
        page.locator("#groups button").nth(1).focus()
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelectorAll('#groups button')[1].getAttribute('aria-current')")
        assert focused(page) == "group 1"
        assert serious_faults(page) == {}


def test_single_keys_can_be_turned_off_and_need_to_be_alone(tmp_path: Path, visit: Callable[..., Any]) -> None:
    decisions = write_report(tmp_path)

    def kept() -> list[str]:
        lines = decisions.read_text(encoding="utf-8").splitlines() if decisions.exists() else []
        return [json.loads(line)["action"] for line in lines]

    with serving("--mount_path", str(tmp_path)) as running:
        page = visit(running, "/curator?report=similar.json&data=faq.json")
        page.get_by_text("Not looked at yet.").wait_for()
        for keys in ("Control+k", "Alt+1", "Meta+2"):
            page.keyboard.press(keys)
        for modifier in ("modifierAltGraph", "isComposing"):  # a third level of the keyboard, a Chinese input
            event = f'new KeyboardEvent("keydown", {{ key: "m", bubbles: true, {modifier}: true }})'
            page.evaluate(f"document.body.dispatchEvent({event})")
        page.keyboard.press("e")
        page.locator("#other-intent").press_sequentially("k1m")
        page.get_by_role("button", name="Cancel").click()
        page.keyboard.down("k")
        page.keyboard.down("k")  # it is held
        page.keyboard.up("k")
        until(lambda: bool(kept()))
        page.get_by_role("button", name="Keys").click()
        page.get_by_label("These keys act without a modifier").uncheck()
        page.get_by_role("button", name="Close").click()
        for key in ("k", "1", "u", "?", "ArrowDown"):
            page.keyboard.press(key)
        page.reload()
        page.get_by_text("Not looked at yet.").wait_for()
        page.keyboard.press("k")
        page.get_by_role("button", name="Drop left").click()
        until(lambda: len(kept()) == 2)
        assert kept() == ["keep", "drop"]
        assert page.locator("#actions kbd:visible").count() == 0
        assert not page.locator("dialog[open]").count()
        page.get_by_role("button", name="Keys").click()
        page.get_by_label("These keys act without a modifier").check()
        page.get_by_role("button", name="Close").click()
        page.keyboard.press("k")
        until(lambda: kept() == ["keep", "drop", "keep"])
