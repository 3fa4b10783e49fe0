"""Questions with their intents as they are prepared: read, each once, none with two intents, a part held out."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from llmops import files
from llmops.console import UserError, log
from llmops.conversations.data_files import list_files
from llmops.conversations.records import Message
from llmops.intents.catalog import ENGLISH
from llmops.intents.questions import BadRecords, FaqFile, FaqRecord, compared, read_faq

LINES_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its intent, and where it was read; `messages` when its prompt was made elsewhere.

    `candidates` when it brings a list of its own; `variant` when one was found for it, a number of the catalog;
    `shown`: questions to show beside each candidate.
    """

    path: Path
    line: int
    question: str
    intent: str
    messages: tuple[Message, ...] = ()
    candidates: tuple[str, ...] = ()
    variant: int | None = None
    shown: tuple[tuple[str, ...], ...] = ()

    @property
    def asked(self) -> str:
        """What tells this example from others: its question (with its own list), or a whole prompt made elsewhere."""
        if self.messages:
            return json.dumps(self.messages[:-1], ensure_ascii=False)
        return "\n".join((self.question, *self.candidates))

    @property
    def held(self) -> str:
        """What is held out as one: its question, however it is marked and whatever list it has.

        A whole prompt where the row names no question.
        """
        if self.messages and self.question == self.messages[-2]["content"]:
            return json.dumps([compared(message["content"]) for message in self.messages[:-1]])
        return compared(self.question)

    @property
    def place(self) -> str:
        """file:line."""
        return f"{self.path}:{self.line}"


Pairs = list[tuple[Example, Example]]


def read_data(given: str, skip_bad: bool) -> list[FaqFile]:
    """The records of the files that a setting names, and what was dropped is said.

    Raises UserError for bad records and questions with two intents, of all files at once: who has mended the first
    should not find the second in the next start.
    """
    found: list[FaqFile] = []
    errors: list[str] = []
    for path in list_files(given):
        try:
            found.append(read_faq(path, skip_bad))
        except BadRecords as error:
            errors.append(str(error))
            found.append(error.others)
        except UserError as error:
            errors.append(str(error))
    if errors:
        conflicts = [] if skip_bad else find_conflicts(examples_of(found))[0]
        raise UserError("\n".join([*errors, *([conflict_words(conflicts)] if conflicts else [])]))
    for data in found:
        log(f"{data.path}: {data.kind}, {len(data.records)} records")
        if data.problems:
            log(f"{len(data.problems)} bad records dropped:\n  " + "\n  ".join(map(str, data.problems[:LINES_SHOWN])))
    return found


def examples_of(found: Sequence[FaqFile]) -> list[Example]:
    """One example per question."""
    return [
        Example(data.path, record.line, question, record.intent, record.messages, record.candidates)
        for data in found
        for record in data.records
        for question in record.questions
    ]


def listed(places: Sequence[str]) -> str:
    """The first of these places, and how many more there are."""
    more = f" and {len(places) - LINES_SHOWN} more" if len(places) > LINES_SHOWN else ""
    return ", ".join(places[:LINES_SHOWN]) + more


def by_file(places: Iterable[tuple[Path, int]]) -> Iterator[tuple[Path, int, str]]:
    """(file, how many of these places are in it, their lines), file by file."""
    lines: dict[Path, list[str]] = {}
    for path, line in places:
        lines.setdefault(path, []).append(str(line))
    for path, found in lines.items():
        yield path, len(found), listed(found)


def find_conflicts(examples: Sequence[Example]) -> tuple[Pairs, Pairs, list[Example]]:
    """(pairs of one question with two intents, pairs with the same, the earlier first; each question once)."""
    first: dict[str, Example] = {}
    repeats: Pairs = []
    conflicts: Pairs = []
    for example in examples:
        known = first.setdefault(example.asked, example)
        if known is example:
            continue
        (repeats if known.intent == example.intent else conflicts).append((known, example))
    return conflicts, repeats, list(first.values())


def conflict_words(conflicts: Sequence[tuple[Example, Example]]) -> str:
    """Which questions have two intents, the first of them with their lines."""
    shown = "\n  ".join(conflict_line(*pair) for pair in conflicts[:LINES_SHOWN])
    return f"{len(conflicts)} questions have two intents; decide on one each:\n  {shown}"


def conflict_line(first: Example, again: Example) -> str:
    """Both places of a question with two intents."""
    place, question, here = again.place, files.shown(again.question), files.shown(again.intent)
    there = files.shown(first.intent)
    if first.path == again.path:
        return f"{place}: {question} has the intent {here} here and {there} in line {first.line}"
    return f"{place}: {question} has the intent {here} here and {there} in {first.place}"


def without_conflicts(examples: Sequence[Example], skip_bad: bool, repeats_stay: bool = False) -> list[Example]:
    """Each question once, unless repeats stay (a given test file is not changed).

    Raises UserError for a question with two intents, unless these are to be left out.
    """
    conflicts, repeats, first = find_conflicts(examples)
    if conflicts:
        text = conflict_words(conflicts)
        if not skip_bad:
            raise UserError(f"{text}\n  or pass --skip_bad_lines true to leave these questions out")
        log(f"left out: {text}")
    if repeats:
        say_repeats(repeats, "stay" if repeats_stay else "are kept once")
    unclear = {example.asked for _, example in conflicts}
    return [e for e in (examples if repeats_stay else first) if e.asked not in unclear]


def say_repeats(repeats: Pairs, kept: str) -> None:
    """Say which questions come again: in their file by lines, in another file with both places."""
    for path, count, lines in by_file((b.path, b.line) for a, b in repeats if a.path == b.path):
        log(f"{path}: {count} repeated questions {kept}; lines {lines}")
    across = [(a, b) for a, b in repeats if a.path != b.path]
    if across:
        shown = "\n  ".join(f"{b.place}: the same question as in {a.place}" for a, b in across[:LINES_SHOWN])
        more = f"\n  and {len(across) - LINES_SHOWN} more" if len(across) > LINES_SHOWN else ""
        log(f"{len(across)} questions of one file are repeated in another and {kept}:\n  {shown}{more}")


def split(examples: Sequence[Example], ratio: float, seed: int, fewest: int = 1) -> tuple[list[Example], list[Example]]:
    """(training, held out): `ratio` of each intent's questions, at least one where `fewest` stay.

    A question that comes with several intents, in lists of its own, counts for the one with the fewest examples.
    """
    sizes = Counter(example.intent for example in examples)
    intents: dict[str, str] = {}
    for example in examples:
        known = intents.setdefault(example.held, example.intent)
        intents[example.held] = min(known, example.intent, key=sizes.__getitem__)
    groups: dict[str, list[str]] = defaultdict(list)
    for question, intent in intents.items():
        groups[intent].append(question)
    held: set[str] = set()
    for intent, group in groups.items():
        count = min(max(1, round(ratio * len(group))), len(group) - fewest)
        held.update(Random(f"{seed} {intent}").sample(group, max(0, count)))
    return [e for e in examples if e.held not in held], [e for e in examples if e.held in held]


def without_tests(examples: list[Example], test: Sequence[Example]) -> list[Example]:
    """Training examples whose questions are no test questions, too."""
    held = {example.held for example in test}
    for path, count, lines in by_file((e.path, e.line) for e in examples if e.held in held):
        log(f"{path}: {count} questions are test questions, too, and left out of training; lines {lines}")
    return [e for e in examples if e.held not in held]


def check_known(test: list[Example], intents: dict[str, str], none: str, skip_bad: bool) -> list[Example]:
    """Test examples whose intent training knows. Raises UserError for others, unless they are to be left out."""
    unknown = [e for e in test if e.intent not in intents and e.intent != none]
    if unknown and not skip_bad:
        shown = "; ".join(f"{e.place}: {e.intent!r}" for e in unknown[:LINES_SHOWN])
        raise UserError(
            f"{len(unknown)} test questions have intents that no training question has ({shown}); add training "
            f"questions, name them {none!r}, or pass --skip_bad_lines true to leave them out"
        )
    if unknown:
        log(f"{len(unknown)} test questions with intents unknown in training are left out")
    return [e for e in test if e.intent in intents or e.intent == none]


def collect_intents(found: Sequence[FaqFile], none: str) -> tuple[dict[str, str], str]:
    """(reply of each intent, reply when none fits); another reply to the same intent is reported and not used."""
    replies: dict[str, str] = {}
    differing: list[tuple[Path, int]] = []
    for path, record in ((data.path, record) for data in found for record in data.records):
        known = replies.setdefault(record.intent, record.reply)
        if not known:
            replies[record.intent] = record.reply
        elif record.reply and record.reply != known:
            differing.append((path, record.line))
    for path, count, lines in by_file(differing):
        log(f"{path}: {count} records have another reply than their intent's first one, which is used: lines {lines}")
    none_reply = replies.pop(none, "")
    return replies, none_reply


def own_lists(examples: Sequence[Example], intents: dict[str, str], none: str) -> list[list[str]]:
    """The different lists that examples bring; their candidates become intents. All examples bring one, or none."""
    lists = dict.fromkeys(example.candidates for example in examples)
    if list(lists) == [()]:
        return []
    bare = next((example for example in examples if not example.candidates), None)
    if bare:
        raise UserError(f"{bare.place} has no candidates of its own and other rows have; expected them in all or none")
    for name in (name for listed in lists for name in listed if name != none):
        intents.setdefault(name, "")
    log(f"the rows have {len(lists):,} candidate lists of their own, which are kept; no variants are added")
    return [list(listed) for listed in lists]


def language_of(records: Sequence[FaqRecord], none: str) -> str:
    """Chinese where any intent or question is written with Chinese characters, else English; `none` is no intent."""
    texts = (text for record in records for text in (record.intent, *record.questions) if text != none)
    return "zh" if any("\u4e00" <= letter <= "\u9fff" for text in texts for letter in text) else ENGLISH
