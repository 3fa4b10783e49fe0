"""From files of conversations to token ids and what is learned of them: render, cut what is too long, count it all."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmops.console import UserError, progress
from llmops.conversations import data_files
from llmops.conversations.data_files import Chunk, Found, Read
from llmops.conversations.records import Conversation, Problem
from llmops.formats.chat_format import ChatFormat, Rendered
from llmops.machine import parallel
from train.dataset import FILE_BIT
from train.source import Source

OUTCOMES = ("whole", "turns_cut", "answer_cut", "dropped")


def encode_conversation(
    chat: ChatFormat, conversation: Conversation, limit: int
) -> Iterator[tuple[Rendered | None, str]]:
    """Samples of one conversation as (ids and learned mask, outcome), none longer than `limit` tokens.

    The rule for a conversation that is too long: the oldest question and what answers it are left out, as few of them
    as needed, the system message stays; a single question that is still too long loses the end of its answer (and
    with it the end token). What keeps no learned token is dropped (None).
    """
    samples = chat.conversation(conversation.messages, conversation.tools, conversation.learned)
    if len(samples) == 1:
        yield fit(chat, conversation, samples[0], limit)
        return
    ends = [i + 1 for i, learned in enumerate(conversation.learned) if learned]
    for end, sample in zip(ends, samples, strict=True):
        yield fit(chat, conversation.upto(end), sample, limit)


def fit(chat: ChatFormat, conversation: Conversation, sample: Rendered, limit: int) -> tuple[Rendered | None, str]:
    """Cut one sample to `limit` tokens by the rule of `encode_conversation`."""
    outcome = "whole"
    while len(sample.ids) > limit:
        shorter = conversation.without_first_turn()
        if shorter is None:
            break
        conversation = shorter
        if not any(conversation.learned):
            return None, "dropped"
        sample = chat.conversation(conversation.messages, conversation.tools, conversation.learned)[-1]
        outcome = "turns_cut"
    if len(sample.ids) > limit:
        sample = Rendered(sample.ids[:limit], sample.learned[:limit])
        outcome = "answer_cut"
    if not any(sample.learned[1:]):  # the first token has no token before it that could predict it
        return None, "dropped"
    return sample, outcome


@dataclass
class Encoded:
    """What became of some rows. `index` is [samples, 2]: tokens and place of each; `failure` ended the encoding."""

    ids: bytes = b""
    learned: bytes = b""
    index: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    counts: Counter[str] = field(default_factory=Counter)  # outcomes, and learned_tokens
    shapes: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    control_texts: int = 0
    first_control: tuple[int, str] | None = None  # line and token
    failure: str = ""


class Encoder:
    """Tokenises chunks of rows; it works in this process or in forked ones."""

    def __init__(self, source: Source, chat: ChatFormat) -> None:
        self.source, self.chat = source, chat

    def __call__(self, chunk: Chunk) -> Encoded:
        """The rows of a chunk. After the first that cannot be encoded the rest are only checked."""
        found = Encoded()
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        places: list[tuple[int, int]] = []
        file = self.source.paths.index(chunk.path) << FILE_BIT
        for read in data_files.conversations_of(chunk):
            if isinstance(read, Problem):
                found.problems.append(read)
                continue
            found.shapes[read.shape] += 1
            if found.failure:
                continue
            try:
                for sample in self._samples(read, found):
                    learned = np.asarray(sample.learned, np.bool_)
                    parts.append((np.asarray(sample.ids, np.int32), learned))
                    places.append((len(sample.ids), file + read.number))
                    found.counts["learned_tokens"] += int(learned.sum())
            except UserError as error:
                place = Problem(read.path, read.number, str(error), data_files.unit_of(read.path))
                found.failure = str(place)
        found.ids, found.learned = (b"".join(part[k].tobytes() for part in parts) for k in (0, 1))
        found.index = np.asarray(places, np.int64).reshape(-1, 2)
        return found

    def _samples(self, read: Read, found: Encoded) -> Iterator[Rendered]:
        """The samples of a row, what became of it counted."""
        conversation = read.conversation.learning(self.source.learn)
        if not any(conversation.learned):
            found.counts["dropped"] += 1
            return
        samples = list(encode_conversation(self.chat, conversation, self.source.max_seq_len))
        token = self.chat.controls.first(conversation.messages, conversation.tools)
        if token is not None:
            found.control_texts += 1
            found.first_control = found.first_control or (read.number, token)
        for sample, outcome in samples:
            found.counts[outcome] += 1
            if self.source.whole and outcome != "whole":
                raise too_long_error(self.source, self.chat, conversation)
            if sample is not None:
                yield sample


def encode_rows(source: Source, chat: ChatFormat, staging: Path) -> dict[str, Any]:
    """Render every conversation into the files of `staging`, in as many processes as there are cores; what was found.

    Raises UserError for bad rows, all of them at once, for a row that cannot be rendered, and where nothing is left.
    """
    found = Encoded()
    index: list[np.ndarray] = []
    chunks = data_files.read_chunks(source.paths)
    # the tokenizer's own threads would compete with the processes, and threads do not survive a fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    work = parallel.in_processes(Encoder(source, chat), chunks, parallel.cores())
    with (
        open(staging / "ids.bin", "wb") as ids_file, open(staging / "learned.bin", "wb") as learned_file,
        closing(work),
    ):  # fmt: skip
        for part in counted(work, f"tokenising {source.name}"):
            ids_file.write(part.ids)
            learned_file.write(part.learned)
            index.append(part.index)
            add(found, part)
        for stream in (ids_file, learned_file):
            stream.flush()
            os.fsync(stream.fileno())
    checked = data_files.judge(
        source.paths, Found(found.shapes, len(found.problems)), found.problems, source.skip_bad_lines
    )
    if found.failure:
        raise UserError(found.failure)
    rows = np.concatenate(index)
    if not len(rows):
        raise UserError(
            f"no conversation of {source.name} keeps a learned token within {source.max_seq_len} tokens; "
            "raise --max_seq_len"
        )
    rows[:, 0] = np.cumsum(rows[:, 0])
    np.save(staging / "index.npy", rows)
    return {
        "files": [str(path) for path in source.paths], "shapes": dict(checked.shapes), "rows": checked.good,
        "bad_lines": checked.bad, "samples": len(rows), "tokens": int(rows[-1, 0]),
        "learned_tokens": found.counts["learned_tokens"], **{name: found.counts[name] for name in OUTCOMES},
        "control_texts": {
            "conversations": found.control_texts, "line": (found.first_control or (0, ""))[0],
            "token": (found.first_control or (0, ""))[1], "allowed": source.allow_special_tokens,
        },
    }  # fmt: skip


def counted(work: Iterator[Encoded], description: str) -> Iterator[Encoded]:
    """The parts, with a progress bar over their rows."""

    def rows() -> Iterator[Encoded | None]:
        for part in work:
            yield part
            yield from (None for _ in range(part.shapes.total() - 1))

    return (part for part in progress(rows(), description) if part is not None)


def add(total: Encoded, part: Encoded) -> None:
    """Add what was counted in a part."""
    total.counts.update(part.counts)
    total.shapes.update(part.shapes)
    total.problems += part.problems
    total.control_texts += part.control_texts
    total.first_control = total.first_control or part.first_control
    total.failure = total.failure or part.failure


def too_long_error(source: Source, chat: ChatFormat, conversation: Conversation) -> UserError:
    """The error for a row that must not be cut: without its whole candidate list a question means something else."""
    tokens = len(chat.conversation(conversation.messages)[-1].ids)
    return UserError(
        f"the prompt with its answer has {tokens} tokens, the limit is {source.max_seq_len}; "
        "shorten the list of candidate intents, or raise --max_seq_len (up to the model's length)"
    )


def describe(meta: dict[str, Any]) -> str:
    """What became of a file's rows, in one line; nothing that was cut or dropped is left unsaid."""
    shapes = Found(Counter(meta["shapes"]), 0).words()
    text = f"{shapes}, {meta['tokens']:,} tokens, {meta['learned_tokens']:,} learned"
    said = {
        "bad_lines": "bad lines skipped",
        "turns_cut": "lost their oldest turns",
        "answer_cut": "lost the end of the answer",
        "dropped": "dropped (no learned token left)",
    }
    return ", ".join([text, *(f"{meta[key]:,} {words}" for key, words in said.items() if meta[key])])
