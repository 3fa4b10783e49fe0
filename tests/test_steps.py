"""How a step is split into micro-batches changes nothing: same loss, same gradients, on one process and on several."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT, environment, read_messages, write_jsonl
from test_batches import SHAPES, random_samples, sample

from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from train import attention
from train.batches import PackedCollator, PaddedCollator, Sample, target_losses
from train.steps import Ahead, Split, StepCollator, StepSampler, by_length, by_prompt, plan_step

LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def many(count: int = 16) -> list[Sample]:
    """Conversations with long and short common beginnings, and some that share nothing."""
    samples = [one for shape in SHAPES for one in random_samples(shape) if len(one["ids"]) < 200]
    return [samples[i] for i in np.random.default_rng(0).permutation(len(samples))[:count]]


def of_all_processes(
    model: torch.nn.Module, collator: PackedCollator | PaddedCollator, samples: list[Sample], split: Split, world: int
) -> tuple[int, float, torch.Tensor]:
    """(micro-batches of a process, loss, gradients as one vector) of a step, as DeepSpeed averages over processes."""
    model.zero_grad()
    total = 0.0
    for rank in range(world):
        step = StepCollator(collator, split, rank, world)(samples)
        for batch in step["batches"]:
            loss = target_losses(model, batch).sum() * batch.get("weight", 1.0) / step["learned"]
            loss.backward()
            total += loss.item()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return len(step["batches"]), total, torch.cat(gradients)


@pytest.mark.parametrize("trained", ["lora", "all"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_split_changes_nothing(checkpoints: dict[str, Path], trained: str, packed: bool) -> None:
    model = ChatModel(Checkpoint(checkpoints["llama"])).weights(torch.float32)
    if packed:
        model.set_attn_implementation(attention.NAME)
    if trained == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=LORA, init_lora_weights=False))
    model.train()
    collator = PackedCollator() if packed else PaddedCollator(0)
    samples = many()
    tokens = max(len(one["ids"]) for one in samples)
    _, expected_loss, expected = of_all_processes(model, collator, samples, Split(), 1)
    counts = set()
    splits = (Split(1), Split(2), Split(4), Split(16), Split(0, tokens))
    for world, tried in ((1, splits), (2, (Split(2), Split(0, tokens)))):
        for split in tried:
            count, loss, found = of_all_processes(model, collator, samples, split, world)
            counts.add(count)
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            assert (found - expected).norm() <= 1e-6 * expected.norm(), (split, world)
    assert {16, 8, 4, 1} <= counts


def test_a_step_is_made_ready_ahead_of_time() -> None:
    """By a thread, as on a GPU: the same steps with the masks of FlexAttention, then the end, then what goes wrong."""
    samples = many()

    def steps(bad: bool = False) -> Iterator[dict[str, Any]]:
        data: Any = [*samples[:-1], {"ids": samples[-1]["ids"]}] if bad else samples
        order = StepSampler(range(len(samples)), 4)
        collate = StepCollator(PackedCollator(flex=True), Split(tokens=300), 0, 1)
        return iter(torch.utils.data.DataLoader(data, batch_sampler=order, collate_fn=collate))

    ahead, plain = Ahead(steps(), torch.device("cpu")), list(steps())
    for step in plain:
        found = next(ahead)
        assert found["learned"] == step["learned"]
        for one, other in zip(found["batches"], step["batches"], strict=True):
            assert torch.equal(one["input_ids"], other["input_ids"])
            assert torch.equal(one["layout"].tiles.to_dense(), other["layout"].tiles.to_dense())
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()
    broken = Ahead(steps(bad=True), torch.device("cpu"))
    for _ in plain[:-1]:
        next(broken)
    with pytest.raises(KeyError, match="learned"):
        next(broken)
    broken.close()


@pytest.mark.parametrize("padded", [True, False])
def test_plans_hold_what_they_promise(padded: bool) -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        count = int(rng.integers(1, 40))
        samples = [sample(rng.integers(3, 9, int(n)).tolist(), ([7, 8], [])) for n in rng.integers(1, 90, count)]
        split = Split(int(rng.integers(0, 6)), int(rng.choice([0, 50, 120, 1000])))
        world = int(rng.integers(1, 5))
        plan = plan_step(samples, split, world, True, padded)
        assert len(plan) == world
        assert len({len(part) for part in plan}) == 1
        assert sorted(i for part in plan for group in part for i in group) == list(range(count))
        order, cost = by_length(samples) if padded else by_prompt(samples, True)
        place = {i: k for k, i in enumerate(order)}
        for group in (group for part in plan for group in part if group):
            assert len(group) <= (split.rows or count)
            first, last = place[group[0]], place[group[-1]] + 1
            assert cost(first, last) <= (split.tokens or 10**9) or len(group) == 1


def test_the_planned_length_is_the_packed_length() -> None:
    for shape in SHAPES:
        samples = random_samples(shape)
        order, cost = by_prompt(samples, True)
        for start in range(len(samples)):
            packed = PackedCollator()([samples[i] for i in order[start:]])["input_ids"].shape[1]
            assert 0 <= packed - cost(start, len(samples)) <= 16 * (len(samples) - start)


def test_every_conversation_is_in_one_step_of_an_epoch() -> None:
    steps = list(StepSampler(torch.utils.data.SequentialSampler(range(10)), 4))
    assert steps == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(StepSampler(torch.utils.data.SequentialSampler(range(10)), 4)) == 3


def run_processes(settings: Path, world: int) -> list[dict]:
    """The reports of the processes of tests/step_driver.py."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = environment() | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "step_driver.py"), str(settings)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    done = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * world, done[0][1][-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in done]


def test_deepspeed_accumulates_any_split_and_nothing_waits(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """Two processes under ZeRO 2, through DeepSpeed's engine: the norm of the gradients, and what asks for values."""
    data = write_jsonl(tmp_path / "train.jsonl", read_messages(DEMO / "train.jsonl")[:16])
    config = {
        "model_name_or_path": str(checkpoints["llama"]), "train_file": str(data), "test_file": str(data),
        "output_path": str(tmp_path / "out"), "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
        "max_seq_len": 256, "lora_dropout": 0.0, "learning_rate": 1e-12, "max_grad_norm": 0.0,
    }  # fmt: skip
    settings = tmp_path / "settings.json"
    splits = [[8, 0], [4, 0], [2, 0], [1, 0], [0, 300]]
    settings.write_text(json.dumps({"config": config, "splits": splits}))
    reports = run_processes(settings, 2)
    counts, losses, norms = zip(*reports[0]["steps"], strict=True)
    assert counts[:4] == (1, 2, 4, 8)
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-6)
    for report in reports:
        assert report["clean"] == []
        assert report["dirty"] == ["_local_scalar_dense"] * 4
