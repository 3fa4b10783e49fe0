"""Every page in both languages, light and dark, wide and narrow; axe-core on it; nothing of it is markup of a user."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from serve_process import Running

from .conftest import HOSTILE, SIZES, serious_faults

PAGES = {
    "runs": ("/", "Runs", "训练"),
    "run": ("/runs/done/output_path", "Diagnosis", "诊断"),
    "hostile": (f"/runs/{quote(HOSTILE)}", "Checkpoints", "检查点"),
    "compare": (f"/compare?run=done/output_path&run={quote(HOSTILE)}", "Where they differ", "不同之处"),
    "evaluations": ("/evaluations", "Five dimensions", "五个维度"),
    "samples": (
        "/evaluations/samples?a=eval/one/eval_results.json&b=eval/two/eval_results.json&set=inference_ability",
        "Reference", "参考答案",
    ),
    "faq": ("/faq?below=0.5", "What is taken for what", "哪些意图被混淆"),
    "curator": ("/curator?report=faq/similar.json", "Groups", "分组"),
    "reports": ("/curator", "Report of the similar-questions command", "相似问题命令的报告"),
    "chat": ("/chat", "No model is served here.", "这里没有运行模型。"),
    "missing": ("/runs/nowhere", "Not found", "没有找到"),
}  # fmt: skip
PICTURES = os.environ.get("LLMOPS_PICTURES", "")  # a folder for pictures of all of them, to look at


@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_every_page(server: Running, visit: Callable[..., Any], language: str) -> None:
    page = visit(server, locale=language)
    for name, (path, *words) in PAGES.items():
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(server.url + path)
        page.get_by_text(words[language == "zh-CN"]).locator("visible=true").first.wait_for()
        if name in ("run", "hostile"):
            page.locator("#findings li").nth(2).wait_for()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for width, height in SIZES:
                page.set_viewport_size({"width": width, "height": height})
                wider = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                assert wider <= 0, f"{name} at {width}: {wider} pixels beyond the edge"
                if PICTURES:
                    page.wait_for_timeout(250)
                    target = Path(PICTURES, f"{name}.{language}.{scheme}.{width}.png")
                    page.screenshot(path=target, full_page=True)
            if (scheme == "dark") == (language == "zh-CN"):  # at 390: half of the combinations each
                assert serious_faults(page) == {}, name
    visit.wrong[:] = [text for text in visit.wrong if "404" not in text]  # of the page that is not there


def test_switches(server: Running, visit: Callable[..., Any]) -> None:
    page = visit(server, "/faq?below=0.5")
    page.get_by_role("link", name="中文").click()
    page.wait_for_url("**/faq?below=0.5")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    page.locator("#theme").click()
    page.locator("#theme").click()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.reload()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark != "rgb(251, 251, 252)"


def test_keyboard_alone(server: Running, visit: Callable[..., Any]) -> None:
    page = visit(server)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    boxes = page.locator("input[name=run]")
    for i in range(2):
        boxes.nth(i).focus()
        page.keyboard.press("Space")
    page.get_by_role("button", name="Compare 2 runs").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/compare?*")
    page.locator("#chart canvas").wait_for()
