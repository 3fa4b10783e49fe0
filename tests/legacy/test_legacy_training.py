"""Old checkpoints are trained, merged, saved, asked and served.

`tests/check_checkpoint.sh` runs the same and more on the vendors' real code.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import chat_main, read_log
from torch import nn

from legacy.styles import CAUSAL, EOP, Make, close, load, logits_of, padded, prompt, trusted_tokenizer
from llmops.console import UserError
from llmops.generation.generator import Generator
from llmops.legacy import patches
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from llmops.models.lora_layers import choose_lora_layers
from train.batches import PaddedCollator, target_losses


def training_batch(style: str) -> dict[str, Any]:
    """Four samples of different lengths, padded."""
    samples = []
    for i in range(4):
        ids = [*prompt(style, 8 + i, seed=i), 9, 8, 7]
        samples.append(
            {"ids": torch.tensor(ids).numpy(), "learned": torch.tensor([0] * (6 + i) + [1] * 5).bool().numpy()}
        )
    return PaddedCollator(0, left=True)(samples)


def step(model: Any, style: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a step."""
    model.train()
    model.zero_grad()
    loss = target_losses(model, training_batch(style)).mean()
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("style", ["rotary", "deaf", "alibi", "prefix"])
def test_gradient_checkpointing_recomputes(make: Make, style: str) -> None:
    def passes(model: Any) -> int:
        counts: list[int] = []
        linear = next(m for n, m in model.named_modules() if n.endswith(("query_key_value", "W_pack")))
        linear.register_forward_pre_hook(lambda *_: counts.append(1))
        step(model, style)
        return len(counts)

    plain = load(make(style))
    loss, expected = step(plain, style)
    model = load(make(style))
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = True
    again, found = step(model, style)
    assert again == pytest.approx(loss, rel=1e-6)
    assert all(close(found[name], grad) for name, grad in expected.items() if grad.any())
    assert passes(plain) == 1
    assert passes(model) == 2
    model.activation_checkpointing_disable()
    assert passes(model) == 1
    blind = load(make(style, without="nothing_is_recomputed"))
    if style == "deaf":  # the switch is overridden by one that takes less, and does nothing
        with pytest.raises(TypeError, match="gradient_checkpointing_enable"):
            blind.activation_checkpointing_enable({"use_reentrant": False})
    elif style == "prefix":  # the flag that the old protocol sets is read nowhere
        blind.activation_checkpointing_enable({"use_reentrant": False})
        assert passes(blind) == 1


def test_evaluation_leaves_the_weights_alone(make: Make) -> None:
    def changed(model: Any) -> tuple[bool, float]:
        before = model.lm_head.weight.clone()
        loss = step(model, "alibi")[0]
        model.eval()
        logits_of(model, prompt("alibi"))
        after = step(model, "alibi")[0]
        return not torch.equal(before, model.lm_head.weight), abs(after - loss)

    assert changed(load(make("alibi", without="weight_changed_by_evaluating")))[0]
    assert changed(load(make("alibi"))) == (False, 0.0)


def test_no_mask_for_every_position(make: Make) -> None:
    model = load(make("alibi", without="alibi_buffer_of_every_position"))
    expected = logits_of(model, prompt("alibi", 30))
    assert model.model.future_mask.shape == (2, 256, 256)
    model = load(make("alibi"))
    assert close(logits_of(model, prompt("alibi", 30)), expected)
    assert not dict(model.named_buffers())


def test_the_loss_is_divided_at_accumulation(make: Make, tmp_path: Path) -> None:
    """The Trainer's own loss over the same 4 rows, as 1 batch of 4 and as 4 of 1."""
    from transformers import Trainer, TrainingArguments

    ids = torch.tensor([prompt("alibi", 10, seed=i) for i in range(4)])
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def loss(folder: Path, size: int) -> float:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "trainer"), per_device_train_batch_size=size, max_steps=1, logging_steps=1,
            gradient_accumulation_steps=4 // size, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(load(folder), arguments, train_dataset=rows)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    one = loss(make("alibi"), 4)
    assert loss(make("alibi"), 1) == pytest.approx(one, rel=1e-3)
    assert loss(make("alibi", without="loss_not_divided"), 1) == pytest.approx(4 * one, rel=1e-3)


@pytest.mark.parametrize("style", CAUSAL)
def test_lora_merges(make: Make, style: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = make(style)
    layers = choose_lora_layers(load(folder), "", None)
    assert not {"lm_head", "output_layer"} & set(layers)
    torch.manual_seed(0)
    model = get_peft_model(load(folder), LoraConfig(r=2, target_modules=layers, task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    assert step(model, style)[0] > 0
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "adapter")
    trusted_tokenizer(folder).save_pretrained(tmp_path / "adapter")
    ids = [prompt(style)]
    target = tmp_path / f"{tmp_path.name}-merged"
    with pytest.raises(UserError, match="trust_remote_code"):
        ChatModel(Checkpoint(tmp_path / "adapter")).save_merged(target, torch.float32, ids)
    trusted = ChatModel(Checkpoint(tmp_path / "adapter", trust_remote_code=True))
    assert trusted.save_merged(target, torch.float32, ids) < 1e-5
    assert {path.name for path in target.glob("*.py")} == {path.name for path in folder.glob("*.py")}


def test_the_output_layer_is_known(make: Make) -> None:
    assert load(make("rotary", without="output_layer_not_found")).get_output_embeddings() is None
    model = load(make("rotary"))
    assert model.get_output_embeddings() is model.transformer.output_layer


@pytest.mark.parametrize("style", ["rotary", "alibi", "prefix"])
def test_a_saved_folder_loads_again(make: Make, style: str, tmp_path: Path) -> None:
    folder = make(style)
    model = load(folder)
    saved = tmp_path / f"{tmp_path.name}-saved"
    model.save_pretrained(saved)
    trusted_tokenizer(folder).save_pretrained(saved)
    assert {path.name for path in saved.glob("*.py")} == {path.name for path in folder.glob("*.py")}
    assert all((saved / path.name).read_text() == path.read_text() for path in folder.glob("*.py"))
    assert json.loads((saved / "config.json").read_text())["torch_dtype"] == "float32"
    assert close(logits_of(load(saved), prompt(style)), logits_of(model, prompt(style)))


@pytest.mark.parametrize("style", CAUSAL)
def test_the_generator_answers_and_ranks(make: Make, style: str) -> None:
    """As evaluation and prediction ask: batched, padded, with a cache. Compared with single passes without one."""
    model = load(make(style))
    prompts = [prompt(style, 12), prompt(style, 7, seed=1)]
    generator = Generator(model, 0, 2)
    assert generator.plain_because
    answers = dict(generator.generate(prompts, [6, 4], [EOP]))
    scores = dict(generator.loglikelihoods(prompts, [[[5], [6, 7]]] * 2))

    def distribution(ids: list[int]) -> torch.Tensor:
        return logits_of(model, ids, use_cache=False)[-1].double().log_softmax(-1)

    for i, limit in enumerate((6, 4)):
        expected: list[int] = []
        while len(expected) < limit and (token := distribution([*prompts[i], *expected]).argmax().item()) != EOP:
            expected.append(int(token))
        assert answers[i].ids == expected
        long = distribution(prompts[i])[6] + distribution([*prompts[i], 6])[7]
        assert scores[i] == pytest.approx([distribution(prompts[i])[5].item(), long.item()], abs=1e-4)


@pytest.mark.parametrize("style", CAUSAL)
def test_the_server_answers(make: Make, style: str) -> None:
    """Rows with limits of their own, as the generator answers them."""
    from llmops.generation.passes import Passes
    from serve.metrics import Metrics
    from serve.model.asked import Sampling
    from serve.model.lanes import Answer, Event, Outbox
    from serve.model.plain import PlainLane
    from serve.model.prefixes import Room
    from serve.model.sampling import Sampler
    from serve.model.text import Detokenizer
    from serve.settings import Limits

    model = load(make(style))
    prompts = [prompt(style, 12), prompt(style, 7, seed=1)]
    expected = dict(Generator(model, 0, 2).generate(prompts, [6, 4], [EOP]))
    metrics = Metrics()
    for name in ("llmops_prompt_tokens_total", "llmops_completion_tokens_total"):
        metrics.counter(name, name)
    lane = PlainLane(Passes(model, 0, True), [EOP], limits=Limits(), budget=1000, metrics=metrics, room=Room(0))
    found: list[Event] = []
    for ids, limit in zip(prompts, (6, 4), strict=True):
        written = Detokenizer(lambda tokens: "".join(map(chr, tokens)))
        sampler = Sampler(Sampling(temperature=0))
        lane.waiting.append(Answer(0, ids, limit, sampler=sampler, detokenizer=written, tell=found.append))
    rows = list(lane.waiting)
    out = Outbox()
    out.post = lambda function, events: function(events)
    assert lane.turn(out)
    out.send()
    assert [row.ids for row in rows] == [expected[0].ids, expected[1].ids]
    assert {event.text for event in found} == {"".join(map(chr, row.ids)) for row in rows}


@pytest.mark.slow
def test_chat_main_trains_an_old_checkpoint(make: Make, small_data: Path) -> None:
    """LoRA under ZeRO 3 with two processes and a merge; the refusal without trust says why."""
    folder = make("prefix", position_encoding_2d=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "chatglm"}))
    code = (folder / "modeling_prefix.py").read_text().replace('model_type = "old_prefix"', 'model_type = "chatglm"')
    (folder / "modeling_prefix.py").write_text(code)
    arguments = (
        "--mount_path", str(small_data), "--model_name_or_path", str(folder), "--mode", "glm", "--lora_dropout", "0",
        "--num_train_epochs", "1", "--max_steps", "2", "--max_seq_len", "256", "--tensorboard", "false",
        "--zero_stage", "3", "--num_processes", "2", "--merge_lora", "true", "--per_device_train_batch_size", "2",
        "--learning_rate", "1e-2", "--lora_module_name", "query_key_value,dense",
        "--retention_file", str(small_data / "datasets" / "test.jsonl"),
    )  # fmt: skip
    refused = chat_main(*arguments)
    assert refused.returncode == 2
    assert "--trust_remote_code true" in refused.stderr
    done = chat_main(*arguments, "--trust_remote_code", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    output = small_data / "output_path"
    assert read_log(output)
    assert (output / "adapter_config.json").is_file()
    assert (
        load(output / "merged").generate(**padded([prompt("prefix")]), max_new_tokens=2, do_sample=False).shape[1] == 11
    )


def test_native_checkpoints_are_not_touched(checkpoints_native: dict[str, Path]) -> None:
    for folder in checkpoints_native.values():
        assert patches.prepare_tokenizer(folder) == patches.prepare_model(folder) == ()
        model = ChatModel(Checkpoint(folder, trust_remote_code=True)).weights(torch.float32)
        assert not any(patches.CURED in c.__dict__ for c in type(model).__mro__)


@pytest.fixture
def checkpoints_native(request: pytest.FixtureRequest) -> dict[str, Path]:
    """The native tiny checkpoints of conftest, under a name that is not that of the module."""
    return request.getfixturevalue("checkpoints")
