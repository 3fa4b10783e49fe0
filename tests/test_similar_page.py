"""Similar questions as a page and a picture: markup that stays text, pairs beyond what is shown, nothing found."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
from similar_calls import call, write

from eval.similar import html_report
from llmops.embedding import ngrams


class Page(HTMLParser):
    """Tags that are balanced, texts of the questions' cells, attributes that would fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts, self.rows, self.groups = 0, 0, 0
        self.fetches: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "input", "link", "img"):
            self.open.append(tag)
        self.scripts += tag == "script"
        self.rows += tag == "tr"
        self.groups += tag == "details"
        self.fetches += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_and_the_picture(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evil = "<script>alert(\"1\")</script> & '引号'"
    rows = [{"question": q, "intent": f"{i}<b>", "output": evil} for q in (evil, "退款") for i in ("甲", "乙", "丙")]
    rows += [{"question": "退款 ", "intent": "甲<B>", "output": ""}]
    data, page, plot = write(tmp_path / "d.jsonl", rows), tmp_path / "page.html", tmp_path / "plot.png"
    arguments = ("--data_file_path", data, "--model_path", ngrams.NAME, "--report", page, "--plot", plot)
    code, found, _ = call(capfd, *arguments)
    assert code == 0
    total = sum(len(entries) for entries in found["data"].values())
    assert total == 3 + 3 + 3
    assert len(found["data"]["similar_intents"]) == 1
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert (parsed.scripts, parsed.fetches) == (1, [])
    assert parsed.rows == total + parsed.groups
    assert evil in parsed.texts
    assert "http" not in text
    assert "建议合并" in text
    assert "只保留正确的一个" in text
    assert plot.read_bytes().startswith(b"\x89PNG")
    from matplotlib.image import imread

    assert imread(plot)[..., :3].std() > 0.01
    monkeypatch.setattr(html_report, "SHOWN", 4)
    _, _, errors = call(capfd, *arguments)
    parsed = Page(page.read_text(encoding="utf-8"))
    assert parsed.rows == 4 + parsed.groups
    assert any("共 9 对" in text for text in parsed.texts)
    assert "the page shows 4 of 9 pairs" in errors
    assert not list(tmp_path.glob("*.part"))


def test_nothing_found_is_an_answer_too(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [{"question": q, "intent": q} for q in ("退款", "发票")]
    data, page, plot = write(tmp_path / "d.jsonl", rows), tmp_path / "page.html", tmp_path / "plot.png"
    code, found, _ = call(
        capfd, "--data_file_path", data, "--model_path", ngrams.NAME, "--report", page, "--plot", plot
    )
    assert (code, found["data"]) == (0, {"mismatched_intents": [], "similar_intents": []})
    assert any("没有发现" in text for text in Page(page.read_text(encoding="utf-8")).texts)
    assert plot.is_file()
