"""Tokenising: the rule for long conversations, counts, cache, split."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Messages, write_jsonl

from llmops.console import UserError
from llmops.conversations.records import Conversation
from llmops.formats.chat_format import ChatFormat
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from train.dataset import TokenDataset
from train.encoding import encode_conversation
from train.source import Source
from train.token_cache import load_or_encode

LONG = [
    {"role": "system", "content": "请简短回答。"},
    {"role": "user", "content": "怎么续借？" * 8},
    {"role": "assistant", "content": "点续借即可。" * 8},
    {"role": "user", "content": "逾期呢"},
    {"role": "assistant", "content": "每天一毛。" * 10},
]


@pytest.fixture
def chat(checkpoints: dict[str, Path]) -> ChatFormat:
    return ChatModel(Checkpoint(checkpoints["llama"])).chat


def test_oldest_turns_go_first_and_the_system_message_stays(chat: ChatFormat) -> None:
    (whole,) = chat.conversation(LONG)
    (shorter,) = chat.conversation([LONG[0], *LONG[3:]])
    ((sample, outcome),) = encode_conversation(chat, Conversation(LONG), len(whole.ids) - 1)
    assert outcome == "turns_cut"
    assert sample is not None
    assert (sample.ids, sample.learned) == (shorter.ids, shorter.learned)
    ((sample, outcome),) = encode_conversation(chat, Conversation(LONG), len(whole.ids))
    assert outcome == "whole"


def test_a_single_pair_loses_the_end_of_its_answer(chat: ChatFormat) -> None:
    (shorter,) = chat.conversation([LONG[0], *LONG[3:]])
    ((sample, outcome),) = encode_conversation(chat, Conversation(LONG), len(shorter.ids) - 5)
    assert outcome == "answer_cut"
    assert sample is not None
    assert sample.ids == shorter.ids[:-5]


def test_a_prompt_that_fills_the_length_is_dropped(chat: ChatFormat) -> None:
    ((sample, outcome),) = encode_conversation(chat, Conversation(LONG[:3]), 12)
    assert (sample, outcome) == (None, "dropped")


def source(path: Path, model: Path, **changes: object) -> Source:
    return Source(
        **({"paths": (path,), "model": model, "mode": "auto", "max_seq_len": 64, "skip_bad_lines": False} | changes)
    )


def test_counts_and_cache(
    tmp_path: Path, chat: ChatFormat, checkpoints: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [LONG, LONG[1:3], *[LONG[3:]] * 3])
    first = load_or_encode(source(path, checkpoints["llama"], max_seq_len=40), chat, tmp_path / "cache")
    assert (first.meta["rows"], first.meta["samples"]) == (
        5,
        first.meta["whole"] + first.meta["turns_cut"] + first.meta["answer_cut"],
    )
    assert first.meta["dropped"] == 1
    assert "1 dropped (no learned token left)" in capfd.readouterr().err
    assert first.meta["tokens"] == int(first.lengths.sum())
    assert first.meta["learned_tokens"] == first.learned_tokens()
    again = load_or_encode(source(path, checkpoints["llama"], max_seq_len=40), chat, tmp_path / "cache")
    assert "read from the cache" in capfd.readouterr().err
    assert again.folder == first.folder
    for i in range(len(first)):
        assert np.array_equal(first[i]["ids"], again[i]["ids"])


def test_a_file_of_a_long_name_is_cached(tmp_path: Path, chat: ChatFormat, checkpoints: dict[str, Path]) -> None:
    """A file's name has at most 255 bytes, and a Chinese character three."""
    path = write_jsonl(tmp_path / f"{'训' * 80}.jsonl", [LONG])
    assert len(load_or_encode(source(path, checkpoints["llama"]), chat, tmp_path / "cache")) == 1


def test_cache_depends_on_everything(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [LONG])
    keys = {
        source(path, checkpoints["llama"]).key(),
        source(path, checkpoints["qwen2"]).key(),
        source(path, checkpoints["llama"], max_seq_len=65).key(),
        source(path, checkpoints["llama"], mode="qwen1.5").key(),
        source(write_jsonl(path, [LONG, LONG]), checkpoints["llama"]).key(),
    }
    assert len(keys) == 5


def test_all_rows_too_long_is_an_error(tmp_path: Path, chat: ChatFormat, checkpoints: dict[str, Path]) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [LONG[:3]])
    with pytest.raises(UserError, match="keeps a learned token within 10 tokens"):
        load_or_encode(source(path, checkpoints["llama"], max_seq_len=10), chat, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.part"))


def test_split_is_seeded_disjoint_and_whole(tmp_path: Path, chat: ChatFormat, checkpoints: dict[str, Path]) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [LONG[3:]] * 20)
    data = load_or_encode(source(path, checkpoints["llama"]), chat, tmp_path / "cache")
    train, test = data.split(0.2, seed=1)
    assert (len(train), len(test)) == (16, 4)
    assert not set(train.indices) & set(test.indices)
    assert np.array_equal(test.indices, data.split(0.2, seed=1)[1].indices)
    assert not np.array_equal(test.indices, data.split(0.2, seed=2)[1].indices)
    one = load_or_encode(
        source(write_jsonl(tmp_path / "one.jsonl", [LONG[3:]]), checkpoints["llama"]), chat, tmp_path / "cache"
    )
    with pytest.raises(UserError, match="none to hold out"):
        one.split(0.5, seed=1)


def test_an_interrupted_encoding_leaves_nothing(tmp_path: Path, chat: ChatFormat, checkpoints: dict[str, Path]) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [LONG[3:]] * 3)
    one = source(path, checkpoints["llama"])
    leftover = tmp_path / "cache" / f"train-{one.key()}.part"
    leftover.mkdir(parents=True)
    (leftover / "ids.bin").write_bytes(b"half")
    assert len(load_or_encode(one, chat, tmp_path / "cache")) == 3
    assert isinstance(TokenDataset(leftover.with_suffix("")), TokenDataset)


@pytest.mark.parametrize("name", ["meta.json", "index.npy", "ids.bin", "learned.bin"])
@pytest.mark.parametrize("how", ["changed", "cut", "missing", "a folder"])
def test_damaged_tokens_are_made_anew(
    chat: ChatFormat, checkpoints: dict[str, Path], conversations: list[Messages], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], name: str, how: str,
) -> None:  # fmt: skip
    path = write_jsonl(tmp_path / "train.jsonl", conversations[:4])
    source = Source((path,), checkpoints["llama"], "auto", 256, False)
    whole = load_or_encode(source, chat, tmp_path / "cache")
    expected = [(whole[i]["ids"].tolist(), whole[i]["learned"].tolist()) for i in range(len(whole))]
    harmed = whole.folder / name
    raw = harmed.read_bytes()
    harmed.unlink()
    if how == "a folder":
        harmed.mkdir()
    elif how != "missing":
        harmed.write_bytes(raw[:-2] if how == "cut" else raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    again = load_or_encode(source, chat, tmp_path / "cache")
    assert "is damaged" in capsys.readouterr().err
    assert [(again[i]["ids"].tolist(), again[i]["learned"].tolist()) for i in range(len(again))] == expected
    load_or_encode(source, chat, tmp_path / "cache")
    assert "read from the cache" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == sorted(["lock", again.folder.name])


NO_SEMAPHORES = """
from llmops.machine.parallel import in_processes
print(list(in_processes(abs, [-1, -2, -3], 2)))
"""


def test_data_is_prepared_without_shared_memory() -> None:
    """Some containers have no /dev/shm: that is no fault of the output path."""
    hide = ["unshare", "--mount", "bash", "-c"]
    hidden = "mount -t tmpfs -o ro none /dev/shm"
    if subprocess.run([*hide, hidden], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace of its own, which root may have")
    script = f"{hidden}; exec {sys.executable} -c '{NO_SEMAPHORES}'"
    done = subprocess.run([*hide, script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[1, 2, 3]\n"), done.stderr
    assert "warning: /dev/shm cannot be written" in done.stderr
