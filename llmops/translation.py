"""Sentences for people in Chinese, where the environment asks for it: each is found in one table as it leaves.

chinese.json has English templates, as the sources write them, and the Chinese ones. A {name} takes what stands in its
place, as it is; {name:text} is a sentence that is translated in turn, {name:series} several phrases with commas,
{name:list} names with "or" and "and", and a name that begins with _ (the s of a plural) has no place in Chinese. A
sentence without an entry stays English. Standard library only, for any Python from 3.8: a shell asks before it has
found one that is new enough.
"""

from __future__ import annotations

import json
import os
import re
import string
import sys
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Callable, Iterator, Mapping, NamedTuple  # noqa: UP035

LANGUAGE_VARIABLE = "LLMOPS_LANG"
TABLE = Path(__file__).with_name("chinese.json")
JOINT, CHINESE_JOINT = "; ", "；"  # between sentences that are one message
TELLING = 8  # characters of its own from which on a template cannot be mistaken
MOST_SPLITS = 30  # of a sentence among the places of one template
MOST_WORDS = 30  # of a sentence that a template of few characters may take apart
DEEPEST = 6  # sentences within one another
PLURAL = re.compile("[a-z]{0,3}")  # what stands in a place whose name begins with _
MOST_PARTS = 6  # with joints between them that may be one sentence


class Reading(NamedTuple):
    """A sentence in Chinese, and how many characters of the English one the table knew."""

    known: int
    chinese: str


def speaks_chinese(environment: Mapping[str, str]) -> bool:
    """Whether people here read Chinese: by LLMOPS_LANG, else as gettext looks for a language."""
    chosen = environment.get(LANGUAGE_VARIABLE, "")
    if not chosen:
        names = ("LC_ALL", "LC_MESSAGES", "LANG")
        locale = next((environment[name] for name in names if environment.get(name)), "")
        chosen = locale if locale in ("C", "POSIX") else environment.get("LANGUAGE") or locale
    return chosen.lower().startswith("zh")


def spoken(text: str, encoding: str | None = None) -> str:
    """Lines for people in their language; in English where the `encoding` they go out in has no Chinese."""
    if not speaks_chinese(os.environ):
        return text
    chinese = "".join(in_chinese(line) for line in text.splitlines(keepends=True))
    try:
        chinese.encode(encoding or "utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text
    return chinese


def in_chinese(line: str) -> str:
    """A line in Chinese, between the blanks around it; what the table does not know stays as it is."""
    body = line.strip()
    return line.replace(body, sentences(body).chinese, 1) if body else line


@lru_cache(maxsize=1 << 15)
def sentences(text: str, depth: int = 0) -> Reading:
    """One or more sentences with JOINT between them, read so that the table knows as much of them as can be.

    A sentence may have joints of its own, or in what stands in its places: runs of MOST_PARTS, and all parts together,
    are tried as one. `depth`: how many sentences it stands in.
    """
    parts = text.split(JOINT)
    readings = [Reading(0, "")]  # of the first 0, 1, 2 ... parts
    for end in range(1, len(parts) + 1):
        tried = []
        for start in [*range(max(0, end - MOST_PARTS), end), *([0] if MOST_PARTS < end == len(parts) else [])]:
            part = JOINT.join(parts[start:end])
            found = sentence(part, depth) or (Reading(0, part) if end - start == 1 else None)
            if found:
                before = readings[start]
                joint = CHINESE_JOINT if before.known or found.known else JOINT
                chinese = before.chinese + joint + found.chinese if start else found.chinese
                tried.append(Reading(before.known + found.known, chinese))
        readings.append(max(tried, key=lambda reading: reading.known))
    return readings[-1]


@lru_cache(maxsize=1 << 15)
def sentence(text: str, depth: int = 0) -> Reading | None:
    """A sentence by the entry that knows most of it."""
    if depth > DEEPEST:
        return None
    joints = text.count(JOINT)
    candidates = (entry for entry in entries() if entry.longest in text and entry.may_have(joints))
    readings = [reading for entry in candidates if (reading := entry.read(text, depth))]
    return max(readings, key=lambda reading: reading.known, default=None)


def series(text: str, depth: int) -> Reading:
    """Phrases with commas between them."""
    readings = [sentences(part, depth) for part in text.split(", ")]
    return Reading(sum(reading.known for reading in readings), "，".join(reading.chinese for reading in readings))


def with_conjunctions(text: str, depth: int) -> Reading:
    """Names, with "or" and "and" between them, that are not words of the table."""
    return Reading(0, re.sub(" (or|and) ", lambda found: {"or": " 或 ", "and": " 和 "}[found[1]], text))


READERS: dict[str, Callable[[str, int], Reading]] = {
    "text": lambda text, depth: sentences(text.strip(), depth),
    "series": series,
    "list": with_conjunctions,
    "": lambda text, depth: Reading(0, text),
}


class Entry:
    """A template with its Chinese one."""

    def __init__(self, english: str, chinese: str) -> None:
        parsed = list(string.Formatter().parse(english))
        self.names = [name for _, name, _, _ in parsed if name is not None]
        self.literals = [literal for literal, _, _, _ in parsed] + ([""] if parsed[-1][1] is not None else [])
        kinds = ((name, kind) for _, name, kind, _ in string.Formatter().parse(chinese) if name)
        self.readers = {name: READERS[kind or ""] for name, kind in kinds}
        self.texts = {name for name, read in self.readers.items() if read in (READERS["text"], READERS["series"])}
        self.frame = re.sub(r":(text|series|list)\}", "}", chinese)
        self.longest = max(self.literals, key=len)
        self.joints = sum(literal.count(JOINT) for literal in self.literals)
        self.leads = bool(self.literals[0]) and not self.literals[-1]  # words before a place: that may be of any length
        self.known = sum(len(literal.replace(" ", "")) for literal in self.literals)
        self.has_letters = any(character.isalpha() for literal in self.literals for character in literal)
        self.is_telling = self.known >= TELLING or not self.names

    def may_have(self, joints: int) -> bool:
        """Whether a text of this template may have so many joints: more than its own stand in its places."""
        more = joints - self.joints
        if more <= 0 or self.is_telling or self.leads:
            return more >= 0
        return more == 1 and not self.literals[-1] and any(map(str.strip, self.literals))

    def read(self, text: str, depth: int = 0) -> Reading | None:
        """A text that is of this template; None for others, and where too little of it is known to be sure."""
        if text.count(" ") > MOST_WORDS and not (self.is_telling or self.leads):
            return None
        best: Reading | None = None
        for places in islice(self.matches(text), MOST_SPLITS if self.texts else 1):
            if not all(PLURAL.fullmatch(found) for name, found in places.items() if name.startswith("_")):
                continue
            filled = {name: read(places[name], depth + 1) for name, read in self.readers.items()}
            known = self.known + sum(reading.known for reading in filled.values())
            if self._is_sure(places, filled) and (best is None or known > best.known):
                chinese = self.frame.format(**{name: reading.chinese for name, reading in filled.items()})
                best = Reading(known, chinese)
        return best

    def _is_sure(self, places: Mapping[str, str], filled: Mapping[str, Reading]) -> bool:
        """Whether this sentence is meant: by its words, by a sentence in it, or by one word beside single words."""
        if self.is_telling or any(reading.known and " " in places[name] for name, reading in filled.items()):
            return True
        return self.has_letters and not any(" " in places[name] for name in places if name not in self.texts)

    def matches(self, text: str) -> Iterator[dict[str, str]]:
        """What may stand in the places of a text that is of this template, the shortest first places first."""
        first, *others = self.literals
        if not others:
            if text == first:
                yield {}
        elif text.startswith(first) and text.endswith(others[-1]):
            yield from self._filled({}, text[len(first) : len(text) - len(others[-1])], others[:-1])

    def _filled(self, before: dict[str, str], rest: str, literals: list[str]) -> Iterator[dict[str, str]]:
        name = self.names[len(before)]
        if not literals:
            yield {**before, name: rest}
            return
        end = rest.find(literals[0])
        while end >= 0:
            yield from self._filled({**before, name: rest[:end]}, rest[end + len(literals[0]) :], literals[1:])
            end = rest.find(literals[0], end + 1)


@lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """The table."""
    return tuple(Entry(*pair) for pair in json.loads(TABLE.read_text(encoding="utf-8")).items())


if __name__ == "__main__":
    sys.stdout.write(spoken(sys.argv[1], sys.stdout.encoding))
