"""From a jsonl file to tokenised conversations on disk: render, cut what is too long, cache.

The cache is three flat files that are memory-mapped, so 100,000 conversations need no more memory than ten.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llmops import chat_formats, files, records
from llmops.chat_formats import ChatFormat, Rendered
from llmops.console import UserError, log, progress
from llmops.records import Message

RENDERING = ("chat_formats", "chat_templates", "control_tokens", "template_limits", "records")  # modules of llmops
OUTCOMES = ("whole", "turns_cut", "answer_cut", "dropped")


def encode_conversation(
    chat: ChatFormat, messages: Sequence[Message], limit: int
) -> Iterator[tuple[Rendered | None, str]]:
    """Samples of one conversation as (ids and learned mask, outcome), none longer than `limit` tokens.

    The rule for a conversation that is too long: the oldest question and answer are left out, as few pairs as
    needed, the system message stays; a single pair that is still too long loses the end of its answer (and with it
    the end token). What keeps no learned token is dropped (None).
    """
    samples = chat.conversation(messages)
    if len(samples) == 1:
        yield fit(chat, messages, samples[0], limit)
        return
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
    for end, sample in zip(ends, samples, strict=True):
        yield fit(chat, messages[:end], sample, limit)


def fit(chat: ChatFormat, messages: Sequence[Message], sample: Rendered, limit: int) -> tuple[Rendered | None, str]:
    """Cut one sample to `limit` tokens by the rule of `encode_conversation`."""
    outcome = "whole"
    system = 1 if messages[0]["role"] == "system" else 0
    head, turns = list(messages[:system]), list(messages[system:])
    while len(sample.ids) > limit and len(turns) > 2:
        turns = turns[2:]
        sample = chat.conversation(head + turns)[-1]
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

    `index.npy` has shape [samples, 2], int64: where a sample ends in the flat files, and the line it came from.
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

    def learned_tokens(self) -> int:
        """Learned tokens of all samples."""
        return sum(int(self[i]["learned"].sum()) for i in range(len(self)))

    def split(self, ratio: float, seed: int) -> tuple["TokenDataset", "TokenDataset"]:
        """(kept, held out): `ratio` of the lines, seeded; the samples of one line stay together."""
        lines = np.unique(self.lines)
        if len(lines) < 2:
            raise UserError(f"{self.meta['file']} has one usable line, none to hold out; add lines or give a test file")
        count = min(max(1, round(ratio * len(lines))), len(lines) - 1)
        held = np.random.default_rng(seed).permutation(lines)[:count]
        mask = np.isin(self.lines, held)
        return TokenDataset(self.folder, np.flatnonzero(~mask)), TokenDataset(self.folder, np.flatnonzero(mask))


@dataclass(frozen=True)
class Source:
    """All that the tokenised form of a file depends on."""

    path: Path
    model: Path
    mode: str
    max_seq_len: int
    skip_bad_lines: bool
    whole: bool = False  # a row that is too long is an error instead of being cut
    allow_special_tokens: bool = False  # as the ChatFormat that renders has it

    def key(self) -> str:
        """A hash over the file, the tokenizer, the settings and the code that renders."""
        import tokenizers
        import transformers

        digest = hashlib.sha256()
        code = [Path(records.__file__).with_name(f"{name}.py") for name in RENDERING] + [Path(__file__)]
        code += sorted(chat_formats.TEMPLATES.glob("*.json"))
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
        files = [
            p
            for p in sorted(self.model.iterdir())
            if p.name.startswith(names) or p.suffix in (".model", ".py", ".jinja")
        ]
        for path in [self.path, *code, *(p for p in files if p.is_file())]:
            digest.update(path.name.encode())
            with open(path, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        settings = [
            self.mode,
            self.max_seq_len,
            self.skip_bad_lines,
            self.whole,
            self.allow_special_tokens,
            transformers.__version__,
            tokenizers.__version__,
        ]
        digest.update(json.dumps(settings).encode())
        return digest.hexdigest()[:20]


def load_or_encode(source: Source, chat: ChatFormat, cache: Path, encodes: bool = True) -> TokenDataset:
    """The tokenised file from the cache, or tokenised now. Who does not encode waits for the process that does."""
    folder = cache / f"{source.path.stem}-{source.key()}"
    if not encodes:
        while not folder.exists():  # the launcher ends this process if the encoding one fails
            time.sleep(0.2)
        return TokenDataset(folder)
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # nodes that share a file system
        if not folder.exists():
            encode_file(source, chat, folder)
        else:
            log(f"{source.path.name}: tokenised data read from the cache ({folder})")
    dataset = TokenDataset(folder)
    said = control_texts_said(dataset.meta)
    if said:
        log(f"{source.path.name}: {said}")
    return dataset


def control_texts_said(meta: dict[str, Any]) -> str:
    """How many conversations hold the text of a control token and what becomes of it; "" for none."""
    held = meta["control_texts"]
    if not held["conversations"]:
        return ""
    count = f"{held['conversations']:,} of {meta['rows']:,} conversations hold the text of control tokens"
    first = f"(first: line {held['line']}, {held['token']!r})"
    if held["allowed"]:
        return f"{count} {first}; they become these tokens (--allow_special_tokens true)"
    return f"warning: {count} {first}; they are learned as text; --allow_special_tokens true makes them these tokens"


def encode_file(source: Source, chat: ChatFormat, folder: Path) -> None:
    """Validate, render and write every conversation of a file; the folder appears when it is complete."""
    good, bad = records.validate_file(source.path, source.skip_bad_lines)
    staging = folder.with_name(folder.name + ".part")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    counts = dict.fromkeys(OUTCOMES, 0)
    held: dict[str, Any] = {"conversations": 0, "line": 0, "token": "", "allowed": source.allow_special_tokens}
    index: list[tuple[int, int]] = []
    end = learned_tokens = 0
    with open(staging / "ids.bin", "wb") as ids_file, open(staging / "learned.bin", "wb") as learned_file:
        rows = (row for row in records.read_conversations(source.path) if row[1] is not None)
        for number, messages, _ in progress(rows, f"tokenising {source.path.name}", total=good):
            try:
                samples = list(encode_conversation(chat, messages or [], source.max_seq_len))
            except UserError as error:
                raise UserError(f"{source.path}:{number}: {error}") from error
            token = chat.controls.first(messages or [])
            if token is not None:
                held["conversations"] += 1
                held |= {} if held["line"] else {"line": number, "token": token}
            for sample, outcome in samples:
                counts[outcome] += 1
                if source.whole and outcome != "whole":
                    raise too_long_error(source, number, chat, messages or [])
                if sample is None:
                    continue
                ids_file.write(np.asarray(sample.ids, np.int32).tobytes())
                learned = np.asarray(sample.learned, np.bool_)
                learned_file.write(learned.tobytes())
                learned_tokens += int(learned.sum())
                end += len(sample.ids)
                index.append((end, number))
        for stream in (ids_file, learned_file):
            stream.flush()
            os.fsync(stream.fileno())
    if not index:
        shutil.rmtree(staging)
        raise UserError(
            f"no conversation of {source.path} keeps a learned token within {source.max_seq_len} tokens; "
            "raise --max_seq_len"
        )
    np.save(staging / "index.npy", np.asarray(index, np.int64))
    meta = {
        "file": str(source.path), "rows": good, "bad_lines": bad, "samples": len(index), "tokens": end,
        "learned_tokens": learned_tokens, **counts, "control_texts": held,
    }  # fmt: skip
    (staging / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
    staging.rename(folder)
    log(f"{source.path.name}: {describe(meta)}")


def too_long_error(source: Source, number: int, chat: ChatFormat, messages: Sequence[Message]) -> UserError:
    """The error for a row that must not be cut: without its whole candidate list a question means something else."""
    tokens = len(chat.conversation(messages)[-1].ids)
    return UserError(
        f"{source.path}:{number}: the prompt with its answer has {tokens} tokens, the limit is {source.max_seq_len}; "
        "shorten the list of candidate intents, or raise --max_seq_len (up to the model's length)"
    )


def describe(meta: dict[str, Any]) -> str:
    """What became of a file's rows, in one line; nothing that was cut or dropped is left unsaid."""
    text = f"{meta['rows']:,} conversations, {meta['tokens']:,} tokens, {meta['learned_tokens']:,} learned"
    said = {
        "bad_lines": "bad lines skipped",
        "turns_cut": "lost their oldest turns",
        "answer_cut": "lost the end of the answer",
        "dropped": "dropped (no learned token left)",
    }
    return ", ".join([text, *(f"{meta[key]:,} {words}" for key, words in said.items() if meta[key])])
