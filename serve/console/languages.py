"""The pages' two languages: English as it stands in templates and scripts, Chinese by static/zh-CN.json."""

from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request

from llmops import files, translation

ENGLISH, CHINESE = "en", "zh-CN"
LANGUAGES = {ENGLISH: "English", CHINESE: "中文"}
COOKIE = "llmops_language"
STATIC = Path(__file__).with_name("static")
Translate = Callable[..., str]


def load() -> dict[str, str]:
    """English texts with their Chinese ones; the scripts of the pages read the same file."""
    return files.read_object(STATIC / "zh-CN.json", "the Chinese texts")


def language_of(request: Request) -> str:
    """The language that was chosen, else the first of the browser's that there is, else English."""
    chosen = request.cookies.get(COOKIE, "")
    if chosen in LANGUAGES:
        return chosen
    for name in request.headers.get("accept-language", "").split(","):
        short = name.split(";")[0].strip().lower().split("-")[0]
        if short in ("zh", "en"):
            return CHINESE if short == "zh" else ENGLISH
    return ENGLISH


def translator(language: str, chinese: dict[str, str]) -> Translate:
    """A function of an English text and the values of its {names}: the text in a language with them put in."""

    def t(text: str, **values: object) -> str:
        found = chinese.get(text, text) if language == CHINESE else text
        return found.format(**values) if values else found

    return t


def told(text: str, language: str) -> str:
    """A sentence of the commands in a language: what stands in logs and results is English."""
    return translation.in_chinese(text) if language == CHINESE else text
