"""Replay against forgetting: every step has its share, the order is the epoch's, and what cannot be is said."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_messages, write_jsonl

from llmops.console import UserError
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from train.config import Config
from train.flags import parse
from train.problems import find_problems
from train.replay import Joined, ReplayOrder, replayed
from train.source import Source
from train.steps import StepSampler
from train.token_cache import load_or_encode


@pytest.fixture(scope="module")
def joined(checkpoints: dict[str, Path], conversations: list, tmp_path_factory: pytest.TempPathFactory) -> Joined:
    """22 training conversations and 5 that are replayed."""
    folder = tmp_path_factory.mktemp("replay")
    chat = ChatModel(Checkpoint(checkpoints["llama"])).chat
    general = read_messages(ROOT / "train" / "replay.jsonl")[:5]
    parts = []
    for name, rows in (("train", conversations[:22]), ("general", general)):
        path = write_jsonl(folder / f"{name}.jsonl", rows)
        parts.append(load_or_encode(Source((path,), checkpoints["llama"], "auto", 256, False), chat, folder / "cache"))
    return Joined(*parts)


def test_every_step_has_its_share(joined: Joined) -> None:
    """A quarter of 8 are 2; all training conversations come once an epoch, the replayed ones evenly."""
    again = ReplayOrder(joined, 42, lambda: 0)
    steps = list(StepSampler(list(range(22)), 8, again, replayed(8, 0.25)))
    assert len(steps) == len(StepSampler(list(range(22)), 8, again, 2)) == 4
    assert [len(step) for step in steps] == [8, 8, 8, 6]
    general = [[i for i in step if i >= 22] for step in steps]
    assert [len(found) for found in general] == [2, 2, 2, 2]
    assert sorted(i for step in steps for i in step if i < 22) == list(range(22))
    assert sorted([*general[0], *general[1], general[2][0]]) == list(range(22, 27))
    assert np.array_equal(joined[23]["ids"], joined.replay[1]["ids"])
    assert joined.lengths[23] == len(joined.replay[1]["ids"])
    assert len(joined) == 27


def test_the_order_is_the_epochs(joined: Joined) -> None:
    """A resumed epoch has the order of the undisturbed one, another epoch another one, and no order ends."""
    orders = [list(islice(ReplayOrder(joined, 42, lambda e=epoch: e), 40)) for epoch in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert all(orders[0].count(i) == 8 for i in range(22, 27))


@pytest.mark.parametrize(
    ("size", "ratio", "expected"), [(16, 0, 0), (16, 0.1, 2), (16, 0.01, 1), (4, 0.9, 3), (1, 0.5, 0)]
)
def test_how_many(size: int, ratio: float, expected: int) -> None:
    assert replayed(size, ratio) == expected


def test_our_own_conversations_are_none_that_measure_forgetting() -> None:
    ours, measured = (read_messages(ROOT / "train" / name) for name in ("replay.jsonl", "retention.jsonl"))
    assert len(ours) == 100
    texts = [{m["content"] for messages in found for m in messages} for found in (ours, measured)]
    assert not texts[0] & texts[1]


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["--replay_file", "x.jsonl"], "--replay_file is given and --replay_ratio is 0"),
        (["--replay_ratio", "1"], "--replay_ratio is 1.0, expected less than 1"),
        (["--replay_ratio", "0.2", "--replay_file", "missing.jsonl"], "the replay file missing.jsonl does not exist"),
        (["--replay_ratio", "0.2", "--replay_file", str(ROOT / "train" / "retention.jsonl")], "would measure nothing"),
        (["--replay_ratio", "0.2", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"],
         "needs steps of two conversations"),
    ],
)  # fmt: skip
def test_what_cannot_be(options: list[str], phrase: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(options)
    assert phrase in str(caught.value)
    assert not any("replay" in problem for problem in find_problems(Config(replay_ratio=0.1)))
