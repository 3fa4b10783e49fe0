"""Marks of a Chinese keyboard where a program reads those of ASCII: which stands where, and what to type instead."""

import re
from collections.abc import Collection

FULL_WIDTH = dict(zip("：，“”｛｝［］＝＠．－", ':,""{}[]=@.-', strict=True))
DASHES = "–—－−"
FLAG = re.compile(rf"([-{DASHES}]+)(\w+)(＝?)")
LONGEST = 60  # characters of a text in a sentence


def instead(text: str) -> str:
    """The end of a sentence on a text that cannot be: its first full-width mark, if any, and what to type for it."""
    place = next((place for place, mark in enumerate(text) if mark in FULL_WIDTH), None)
    if place is None:
        return ""
    mark = text[place]
    return f"; write {FULL_WIDTH[mark]} and not the full-width {mark} (character {place + 1} of {text[:LONGEST]})"


def mistyped_flag(argument: str, flags: Collection[str]) -> str:
    """The sentence for a flag with dashes or an equals sign of another keyboard; "" for every other argument."""
    found = FLAG.match(argument)
    if not found or f"--{found[2]}" not in flags:
        return ""
    place = next((place for place, mark in enumerate(found[0]) if mark in (*DASHES, "＝")), None)
    if place is None:
        return ""
    meant = f"--{found[2]}{'=' * len(found[3])}{argument[found.end() :]}"
    return f"found {argument[place]} as character {place + 1} of {argument}; write {meant}"
