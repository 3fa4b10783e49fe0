"""From files of conversations to tokenised ones on disk: render, cut what is too long, cache.

The cache is three flat files that are memory-mapped, so a million conversations need no more memory than ten. They stay
beside the `datasets` package because the collator asks for single rows: 5 µs each here, from a Dataset on disk 28 µs as
lists and 102 µs as arrays (on the machine that the figures of docs/speed.md are from).
"""

import hashlib
import inspect
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llmops import files
from llmops.console import RunStopped, UserError, log, progress
from llmops.conversations import data_files, records
from llmops.conversations.data_files import Chunk, Found, Read
from llmops.conversations.records import Conversation, Problem
from llmops.formats import chat_format
from llmops.formats.chat_format import ChatFormat, Rendered
from llmops.formats.families import TEMPLATES
from llmops.machine import parallel

OUTCOMES = ("whole", "turns_cut", "answer_cut", "dropped")
FILE_BIT = 40  # of a place: the file's number above it, the line's or row's below


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


def read_index(folder: Path) -> np.ndarray:
    """`index.npy` of a cache folder. Raises UserError where it does not fit the folder's other files."""
    try:
        index = np.load(folder / "index.npy", allow_pickle=False)
        sizes = [(folder / name).stat().st_size for name in ("ids.bin", "learned.bin")]
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the cache {folder} is damaged ({error}); delete this folder") from error
    whole = index.ndim == 2 and index.shape[1] == 2 and index.dtype == np.int64 and len(index) > 0
    if not whole or sizes != [4 * index[-1, 0], index[-1, 0]] or (np.diff(index[:, 0], prepend=0) < 0).any():
        raise UserError(f"the cache {folder} is damaged (its files do not fit each other); delete this folder")
    return index


class TokenDataset:
    """Tokenised conversations in a folder: `ids.bin` (int32), `learned.bin` (bool), `index.npy`, `meta.json`.

    `index.npy` has shape [samples, 2], int64: where a sample ends in the flat files, and the place it came from.
    Indexing gives {"ids": int32 [length], "learned": bool [length]}.
    """

    def __init__(self, folder: Path, indices: np.ndarray | None = None) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = files.read_object(folder / "meta.json", "the cache", "delete its folder")
        index = read_index(folder)
        self._ends, self.lines = index[:, 0], index[:, 1]
        self._starts = np.concatenate([[0], self._ends[:-1]])
        self.indices = np.arange(len(index)) if indices is None else indices

    @cached_property
    def _flat(self) -> tuple[np.ndarray, np.ndarray]:
        return (
            np.memmap(self.folder / "ids.bin", dtype=np.int32, mode="r"),
            np.memmap(self.folder / "learned.bin", dtype=np.bool_, mode="r"),
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        sample = self.indices[i]
        span = slice(self._starts[sample], self._ends[sample])
        ids, learned = self._flat
        return {"ids": np.array(ids[span]), "learned": np.array(learned[span])}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 [samples]."""
        return (self._ends - self._starts)[self.indices]

    def highest_token(self) -> int:
        """The largest token id of the whole file."""
        return int(self._flat[0].max())

    def learned_tokens(self) -> int:
        """Learned tokens of all samples."""
        return sum(int(self[i]["learned"].sum()) for i in range(len(self)))

    def places(self) -> set[tuple[int, int]]:
        """(number of the file, line or row in it) of every sample."""
        return {divmod(place, 1 << FILE_BIT) for place in self.lines[self.indices].tolist()}

    def place(self, i: int) -> str:
        """Where a sample came from, in words."""
        file, number = divmod(int(self.lines[self.indices[i]]), 1 << FILE_BIT)
        names = self.meta["files"]
        words = f"{data_files.unit_of(Path(names[file]))} {number}"
        return words if len(names) == 1 else f"{names[file]}, {words}"

    def split(self, ratio: float, seed: int) -> tuple["TokenDataset", "TokenDataset"]:
        """(kept, held out): `ratio` of the lines, seeded; the samples of one line stay together."""
        lines = np.unique(self.lines)
        if len(lines) < 2:
            raise UserError(
                f"{', '.join(self.meta['files'])} has one usable line, none to hold out; add lines or give a test file"
            )
        count = min(max(1, round(ratio * len(lines))), len(lines) - 1)
        held = np.random.default_rng(seed).permutation(lines)[:count]
        mask = np.isin(self.lines, held)
        return TokenDataset(self.folder, np.flatnonzero(~mask)), TokenDataset(self.folder, np.flatnonzero(mask))


@dataclass(frozen=True)
class Source:
    """All that the tokenised form of a file depends on."""

    paths: tuple[Path, ...]
    model: Path
    mode: str
    max_seq_len: int
    skip_bad_lines: bool
    whole: bool = False  # a row that is too long is an error instead of being cut
    allow_special_tokens: bool = False  # as the ChatFormat that renders has it
    thinking: bool | None = None  # so is this
    learn: str = "all"

    @property
    def name(self) -> str:
        """What messages call it."""
        return data_files.name_of(self.paths)

    def key(self) -> str:
        """A hash over the files, the tokenizer, the settings and the code that renders."""
        import tokenizers
        import transformers

        digest = hashlib.sha256()
        rooms = (Path(inspect.getfile(module)).parent for module in (records, chat_format))
        code = [Path(__file__), *(path for room in rooms for path in sorted(room.glob("*.py")))]
        code += sorted(TEMPLATES.glob("*.json"))
        names = (
            "tokenizer",
            "vocab",
            "merges",
            "special_tokens",
            "added_tokens",
            "chat_template",
            "config.json",
            "tokenization",
        )
        found = [
            p
            for p in sorted(self.model.iterdir())
            if p.name.startswith(names) or p.suffix in (".model", ".py", ".jinja")
        ]
        digest.update(data_files.digest(self.paths).encode())
        for path in [*self.paths, *code, *(p for p in found if p.is_file())]:
            digest.update(path.name.encode("utf-8", "surrogateescape"))
            if path not in self.paths:
                digest.update(data_files.file_digest(path).encode())
        settings = [
            self.mode,
            self.max_seq_len,
            self.skip_bad_lines,
            self.whole,
            self.allow_special_tokens,
            self.thinking,
            self.learn,
            transformers.__version__,
            tokenizers.__version__,
        ]
        digest.update(json.dumps(settings).encode())
        return digest.hexdigest()[:20]


def load_or_encode(source: Source, chat: ChatFormat, cache: Path, encodes: bool = True) -> TokenDataset:
    """The tokenised file from the cache, or tokenised now. Who does not encode waits for the process that does."""
    folder = cache / f"{source.paths[0].stem[:80]}-{source.key()}"
    if not encodes:
        while damage(folder):  # the launcher ends this process if the encoding one fails
            time.sleep(0.2)
        return TokenDataset(folder)
    files.make_folder(cache, "the folder for tokenised data")
    with files.lock(cache / "lock", "", wait=True):  # nodes that share a file system
        problem = damage(folder) if os.path.lexists(folder) else None
        if problem:
            log(f"warning: the tokenised data in {folder} is damaged ({problem}) and is made anew")
            remove(folder)
        if not folder.exists():
            encode_file(source, chat, folder)
        else:
            log(f"{source.name}: tokenised data read from the cache ({folder})")
    dataset = TokenDataset(folder)
    say_control_texts(source.name, dataset.meta)
    return dataset


def say_control_texts(name: str, meta: dict[str, Any]) -> None:
    """Say how many conversations hold the text of a control token, and what becomes of it."""
    held = meta["control_texts"]
    if not held["conversations"]:
        return
    count = f"{name}: {held['conversations']:,} of {meta['rows']:,} conversations hold the text of control tokens"
    count = f"{count} (first: line {held['line']}, {held['token']!r})"
    if held["allowed"]:
        log(f"{count}; they become these tokens (--allow_special_tokens true)")
    else:
        log(f"warning: {count}; they are learned as text; --allow_special_tokens true makes them these tokens")


def remove(path: Path) -> None:
    """Delete a folder, or a file or link in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def damage(folder: Path) -> str | None:
    """What is wrong with a folder of tokenised data, or None: its checksum covers all that is in it."""
    try:
        meta = files.read_object(folder / "meta.json", "its description")
        written = meta.pop("checksum", None)
        return None if written == checksum(folder, meta) else "its checksum is another one"
    except UserError as error:
        return str(error)


def checksum(folder: Path, meta: dict[str, Any]) -> str:
    """A hash of tokenised data and its description. Raises UserError for a file that cannot be read."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in ("index.npy", "ids.bin", "learned.bin"):
        with files.open_regular(folder / name, "the tokenised data") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def encode_file(source: Source, chat: ChatFormat, folder: Path) -> None:
    """Check, render and write every conversation of the files; the folder appears when it is complete."""
    staging = folder.with_name(folder.name + ".part")
    try:
        if os.path.lexists(staging):
            remove(staging)
        staging.mkdir()
        meta = encode_rows(source, chat, staging)
        files.write_json(staging / "meta.json", meta | {"checksum": checksum(staging, meta)})
        staging.rename(folder)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise files.unwritable(staging, error) from error
    except (UserError, RunStopped):
        shutil.rmtree(staging, ignore_errors=True)
        raise
    log(f"{source.name}: {describe(meta)}")


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
