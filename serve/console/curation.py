"""A curator's work on pairs of similar questions, and on suspects: groups, decisions, the cleaned file.

Decisions are lines of `DATA.decisions.jsonl` beside the data, each on the disk before the page hears of it. A pair is
known by its questions, intents and records, so decisions outlast a new report with another threshold. The last line of
a pair counts; `undo` takes it back. Of a merge and a pair of its intents that is kept the later one counts. A decision
is carried out only where the data still has what it is about. Nothing is ever changed but these files: the decisions,
the cleaned copy, its changes.
"""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from llmops import files
from llmops.console import UserError
from serve.console import cleaning
from serve.console.mount import DATA_SUFFIXES, KEPT_BYTES, Cached, Mounted, NotFound
from serve.console.pairs import Data, Pair, is_two, pairs_in, read_data, read_report, refuse_strange

TOLD = ("pair", "action", "side", "intent", "intents")  # of a decision, to the page
ACTIONS = ("keep", "merge", "relabel", "drop", "undo")
MOST_SHOWN = 5_000  # pairs that a page has
MOST_BYTES = 64 << 20  # of a data file that is looked at by itself
MOST_LOOKED_AT = 20
Decision = dict[str, Any]


class Curation:
    """Reports, their data, decisions about them."""

    def __init__(self, mounted: Mounted) -> None:
        self.mounted = mounted
        self.reports, self.data = Cached(read_report, KEPT_BYTES), Cached(read_data, KEPT_BYTES)
        self.lock = threading.Lock()

    def open(self, report: str, data: str) -> tuple[list[Pair], Data, Path]:
        """(pairs, data, its path) of names. Raises NotFound, and UserError where they do not belong together."""
        told = self.reports(self.mounted.file(report))
        path = self.mounted.file(data)
        found = self.data(path)
        return pairs_in(told, found, report, data), found, path

    def data_for(self, report: str) -> str:
        """The name of the data that a report is about, looked for near the report first; "" where none is."""
        told = self.reports(self.mounted.file(report))
        parents = [place.as_posix() for place in PurePosixPath(report).parents]

        def distance(name: str) -> int:
            """Folders up from the report until both are below."""
            return next(i for i, place in enumerate(parents) if place == "." or name.startswith(f"{place}/"))

        near = sorted(self.mounted.look().data, key=lambda name: (distance(name), name.count("/"), name))
        for name in near[:MOST_LOOKED_AT] if told.pairs or told.suspects else ():
            try:
                path = self.mounted.file(name)
                if path.stat().st_size <= MOST_BYTES:
                    pairs_in(told, self.data(path), report, name)
                    return name
            except (UserError, NotFound, OSError):
                continue  # not FAQ data, not what the report is about, or gone meanwhile
        return ""

    def state(self, report: str, data: str) -> dict[str, Any]:
        """Groups with their pairs and decisions, the most pairs first, for the page."""
        pairs, found, path = self.open(report, data)
        decided = {key: one for key, one in self.decisions(path).items() if is_shown(one, found)}
        groups: dict[tuple[str, str], list[Pair]] = {}
        for pair in pairs[:MOST_SHOWN]:
            groups.setdefault(pair.group, []).append(pair)
        ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
        merged = {tuple(d["group"]): d for d in decided.values() if d["action"] == "merge"}
        return {
            "groups": [
                {"intents": list(group), "alike": members[0].alike,
                 "pairs": [shown_pair(p, found, decided.get(p.key) or merged.get(group)) for p in members]}
                for group, members in ordered
            ],
            "total": len(pairs), "shown": min(len(pairs), MOST_SHOWN), "intents": found.intents,
            "decisions": decisions_path(path).name, "cleaned": cleaned_path(path).name,
            "written": cleaned_path(path).exists(),
        }  # fmt: skip

    def decisions(self, path: Path) -> dict[str, Decision]:
        """The decision that counts of every pair of a data file that has one."""
        kept: dict[str, Decision] = {}
        older = older_decisions(path)
        for line in chain(lines_of(older) if older else (), lines_of(decisions_path(path))):
            kept.pop(line["pair"], None)  # the later one stands later
            if line["action"] != "undo":
                kept[line["pair"]] = line
        return without_contradictions(kept)

    def decide(self, body: dict[str, Any]) -> dict[str, Any]:
        """Keep one decision, on the disk before this returns. Raises UserError for one that makes no sense."""
        report, data, key, action = (text_of(body, name) for name in ("report", "data", "pair", "action"))
        pairs, found, path = self.open(report, data)
        pair = next((pair for pair in pairs if pair.key == key), None)
        if pair is None:
            raise UserError(f"{report} has no pair {files.shown(key)}; load the page again")
        if action not in ACTIONS:
            raise UserError(f"action is {files.shown(action)}, expected one of {', '.join(ACTIONS)}")
        if action != "undo":
            refuse_strange(pair, found, report, data)  # a pair that `open` did not look at
        decision: Decision = {
            "pair": pair.key, "action": action, "group": list(pair.group), "records": list(pair.records),
            "questions": list(pair.questions), "intents": list(pair.intents),
        }  # fmt: skip
        if pair.probability is not None:
            decision["suspect"] = True
        if action in ("merge", "relabel", "drop"):
            side = body.get("side")
            if pair.probability is not None and (action == "merge" or side != 0):
                raise UserError("a suspect is one question, side 0: it is kept, gets another intent or is dropped")
            if not is_side(side):
                raise UserError(f"side is {files.shown(side)}, expected 0 (the left question) or 1 (the right one)")
            decision["side"] = side
            if action != "drop":
                intent = body.get("intent") or pair.intents[1 - side]
                if intent not in found.intents or (action == "merge" and intent not in pair.intents):
                    raise UserError(f"{files.shown(intent)} is no intent of {data}; choose one that is there")
                if intent == pair.intents[side]:
                    raise UserError(f"the question has the intent {files.shown(intent)} already")
                decision["intent"] = intent
        if pair.alike and action != "undo":
            decision["texts"] = [list(found.records[index].questions) for index in pair.records]
        decision["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        with self.lock:
            files.append_line(decisions_path(path), decision)
        return {"decision": {name: decision[name] for name in TOLD if name in decision}}

    def write(self, body: dict[str, Any]) -> dict[str, Any]:
        """Write the cleaned file and what changed; the summary."""
        _, found, path = self.open(text_of(body, "report"), text_of(body, "data"))
        with self.lock:
            decided = self.decisions(path)
            edits, unfit = edits_of(decided, found)
            cleaned = cleaning.clean(path, edits)
            summary = cleaning.write(path, cleaned, cleaned_path(path), changes_path(path), len(decided), unfit)
        return summary | {"changes": changes_path(path).name}


def without_contradictions(decided: dict[str, Decision]) -> dict[str, Decision]:
    """Of merges of two intents, and of pairs of them that were kept as they are, those that the last of them bears.

    After a merge nothing is kept of either intent, and who keeps both takes their merge back. What a later one bars
    stays in the file, and counts again when that one is undone. A suspect is kept under its intent, whatever its name.
    """
    last: dict[tuple[str, ...], Decision] = {}
    for one in decided.values():
        if is_about_intents(one):
            last[tuple(one["group"])] = one

    def holds(one: Decision) -> bool:
        newest = last.get(tuple(one["group"]))
        both_kept = newest is not None and newest["action"] == one["action"] == "keep"
        return not is_about_intents(one) or newest is one or both_kept

    return {key: one for key, one in decided.items() if holds(one)}


def is_about_intents(decision: Decision) -> bool:
    """Whether a decision says that two intents are one, or that they are not."""
    return decision["action"] == "merge" or (decision["action"] == "keep" and not decision.get("suspect"))


def edits_of(decided: dict[str, Decision], data: Data) -> tuple[cleaning.Edits, list[Decision]]:
    """(what decisions come to, in the order in which they were made; those that the data has nothing for any more)."""
    edits, unfit, intents = cleaning.Edits(), list[Decision](), {None, *data.intents}
    for decision in decided.values():
        action, side = decision["action"], decision.get("side", 0)
        if action == "keep":
            continue
        fit = decision["intents"][side] in intents if action == "merge" else is_about(decision, side, data)
        if not fit or decision.get("intent") not in intents:
            unfit.append(decision)
        elif action == "merge":
            edits.merge(decision["intents"][side], decision["intent"])
        else:
            index, question = decision["records"][side], decision["questions"][side]
            for text in data.records[index].questions if question is None else [question]:
                if action == "drop":
                    edits.dropped.add((index, text))
                else:
                    edits.relabelled[index, text] = decision["intent"]
    return edits, unfit


def is_about(decision: Decision, side: int, data: Data) -> bool:
    """Whether the record of a side still has the intent and the questions that it had when it was decided about."""
    record, question = data.records.get(decision["records"][side]), decision["questions"][side]
    if record is None or record.intent != decision["intents"][side]:
        return False
    if question is not None:
        return question in record.questions
    return "texts" in decision and decision["texts"][side] == list(record.questions)


def is_shown(decision: Decision, data: Data) -> bool:
    """Whether a pair counts as decided: a merge is about its intents, any other decision about its records."""
    sides = (0,) if decision.get("suspect") else (0, 1)
    return decision["action"] == "merge" or all(is_about(decision, side, data) for side in sides)


def shown_pair(pair: Pair, data: Data, decision: Decision | None) -> dict[str, Any]:
    """A pair as the page has it."""
    found = [(pair.questions[i], data.records[pair.records[i]]) for i in pair.sides if pair.records[i] in data.records]
    sides = [
        {"question": question or " / ".join(record.questions), "intent": record.intent, "reply": record.reply,
         "record": record.index, "whole": question is None}
        for question, record in found
    ]  # fmt: skip
    told = {name: decision[name] for name in TOLD if name in decision} if decision else None
    suspect = {} if pair.probability is None else {"suggested": pair.intents[1], "probability": pair.probability}
    return {"key": pair.key, "sides": sides, "decision": told} | suspect


def lines_of(path: Path) -> Iterator[Decision]:
    """The whole lines of a decisions file; what a kill cut, or somebody else wrote, is passed over."""
    if path.is_symlink() or not files.is_file(path):
        return
    for line in files.json_lines(path, "the decisions"):
        if line.problem is None and is_decision(line.value):
            yield line.value


def is_side(value: Any) -> TypeGuard[int]:
    """Whether a value names a question of a pair."""
    return type(value) is int and value in (0, 1)


def is_decision(value: Any) -> bool:
    """Whether a line is one that `decide` wrote."""
    if not isinstance(value, dict) or value.get("action") not in ACTIONS or not isinstance(value.get("pair"), str):
        return False
    kinds = {"group": str, "records": int, "questions": str | None, "intents": str}
    pairs = all(is_two(value.get(name), kind) for name, kind in kinds.items())
    texts = "texts" not in value or is_two(value["texts"], list)
    sided = value["action"] in ("keep", "undo") or is_side(value.get("side"))
    aimed = value["action"] not in ("merge", "relabel") or isinstance(value.get("intent"), str)
    return pairs and texts and sided and aimed


def text_of(body: dict[str, Any], name: str) -> str:
    """A text of a request. Raises UserError where it is none."""
    value = body.get(name)
    if not isinstance(value, str):
        raise UserError(f"{name} is {files.shown(value)}, expected a text")
    return value


def decisions_path(data: Path) -> Path:
    """Where the decisions about a data file are."""
    return data.with_name(f"{data.name}.decisions.jsonl")


def older_decisions(data: Path) -> Path | None:
    """Where an older version wrote them; None where they may be about another data file of that name."""
    alike = [data.with_name(data.stem + suffix) for suffix in DATA_SUFFIXES]
    alone = sum(files.is_file(path) for path in alike) <= 1
    return data.with_name(f"{data.stem}.decisions.jsonl") if data in alike and alone else None


def cleaned_path(data: Path) -> Path:
    """Where its cleaned copy is."""
    return data.with_name(f"{data.name}.cleaned.jsonl")


def changes_path(data: Path) -> Path:
    """Where it says what the cleaned copy changed."""
    return data.with_name(f"{data.name}.changes.json")
