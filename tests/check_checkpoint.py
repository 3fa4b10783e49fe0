"""The list that a checkpoint must pass, as a table. `bash tests/check_checkpoint.sh --help` says how to start it.

The reference is the checkpoint's own module (or transformers' native class) built directly and given the weight files'
tensors, in a process of its own that patches nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llmops import checkpoints, records
from llmops.chat_formats import ChatFormat
from llmops.console import UserError, log
from train.batches import PaddedCollator, target_losses

DEMO = ROOT / "train" / "demo_data"
TEXTS = ("hello", "你好，世界！ABC and more words", "How many days are in a week? 7, 七天。", "一二三 四五六")
QUESTIONS = ("你好", "What is the capital of France, and of Spain?", "请介绍一下你自己，用一句话。")
SMALL = 1_000_000_000  # weights; up to here every weight is trained as well, above only adapters
UNEQUAL = (4, 11, 7)  # new tokens of the processes that generate together
# what a broken checkpoint raises: its row fails, the other rows go on
EXPECTED = (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, OSError, RuntimeError, TypeError,
            UserError, ValueError)  # fmt: skip


@dataclass
class Subject:
    """The checkpoint under test and what is made of it, each once."""

    folder: Path
    mode: str
    dtype: torch.dtype
    processes: int
    work: Path
    device: torch.device
    outputs: dict[str, Path] = field(default_factory=dict)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return checkpoints.read_config(self.folder)

    @cached_property
    def ships_code(self) -> bool:
        """Whether the model's classes come with the checkpoint."""
        return "auto_map" in self.config

    @cached_property
    def loaded(self) -> tuple[Any, ChatFormat]:
        """Tokenizer and chat format."""
        return checkpoints.load_chat_format(self.folder, self.mode, trust_remote_code=True)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.loaded[0]

    @cached_property
    def model(self) -> Any:
        """The model, in evaluation mode, with every weight as loaded."""
        return self.load(self.folder)

    def load(self, folder: Path) -> Any:
        """A model of this or another folder on the device."""
        return checkpoints.load_model(folder, self.dtype, trust_remote_code=True).to(self.device).eval()

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Prompts of different lengths."""
        return [self.loaded[1].prompt([{"role": "user", "content": text}]) for text in QUESTIONS]

    @property
    def bound(self) -> float:
        """The largest relative difference that is rounding."""
        return {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[self.dtype]

    @cached_property
    def small(self) -> bool:
        """Whether all weights can be trained here."""
        return sum(p.numel() for p in self.model.parameters()) <= SMALL

    def tensor(self, ids: list[int]) -> torch.Tensor:
        """One row of ids on the device."""
        return torch.tensor([ids], device=self.device)

    def batch(self, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts as one padded batch: ids and 2-D attention mask."""
        width = max(map(len, self.prompts))
        ids = torch.full((len(self.prompts), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(self.prompts):
            span = slice(width - len(prompt), width) if left else slice(0, len(prompt))
            ids[i, span], mask[i, span] = torch.tensor(prompt), 1
        return ids.to(self.device), mask.to(self.device)

    @cached_property
    def samples(self) -> list[dict[str, np.ndarray]]:
        """Training samples of the demo's first conversations."""
        rows = (messages for _, messages, _ in records.read_conversations(DEMO / "train.jsonl") if messages)
        rendered = [
            one for _, messages in zip(range(4), rows, strict=False) for one in self.loaded[1].conversation(messages)
        ]
        return [{"ids": np.array(r.ids, np.int32), "learned": np.array(r.learned)} for r in rendered]

    def training_batch(self) -> dict[str, Any]:
        """The first samples as a padded batch on the device, as training makes it."""
        tokenizer = self.tokenizer
        left = tokenizer.padding_side == "left" and not tokenizer.is_fast
        batch = PaddedCollator(tokenizer.pad_token_id, left)(self.samples[:3])
        return {key: value.to(self.device) for key, value in batch.items()}


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    found, expected = found.float().cpu(), expected.float().cpu()
    assert found.isfinite().all(), "not all values are finite"
    return float((found - expected).abs().max() / expected.abs().max())


def within(value: float, bound: float, what: str) -> str:
    """`what` with its difference, which must not pass the bound."""
    assert value <= bound, f"{what} differ by {value:.1e} (bound {bound:.0e})"
    return f"{what} differ by {value:.1e}"


# --- tokenizer ------------------------------------------------------------------------------------------------------


def vocabulary(subject: Subject) -> Any:
    """name -> id, read from the vocabulary file itself; None where it has no such name."""
    paths = sorted(subject.folder.glob("*.model"))
    if paths:
        import sentencepiece as spm

        pieces = spm.SentencePieceProcessor(model_file=str(paths[0]))
        known = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
        return known.get
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(subject.folder / "tokenizer.json")).token_to_id


def special_ids(subject: Subject) -> str:
    """bos, eos, pad, unk and the family's own tokens: the tokenizer's ids, the vocabulary's and config.json's agree."""
    tokenizer, find = subject.tokenizer, vocabulary(subject)
    said = []
    for name in ("bos", "eos", "pad", "unk"):
        token, index = getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")
        if token is None or index is None:
            continue
        assert find(str(token)) == index, f"{name} {token} is {index}, in the vocabulary {find(str(token))}"
        said.append(f"{name} {index}")
        named = subject.config.get(f"{name}_token_id")
        if isinstance(named, int) and name != "pad":
            assert named == index, f"{name} is {index}, in config.json {named}"
    behind = getattr(
        getattr(tokenizer, "tokenizer", None), "special_tokens", {}
    )  # ChatGLM2 and 3 add them in their code
    for name in ("[MASK]", "[gMASK]", "<sop>", "sop", "<eop>", "eop", "<|user|>", "<|assistant|>"):
        index = find(name)
        if index is None and name in behind:
            index = tokenizer.get_command(name)
            assert tokenizer.vocab_size > index >= tokenizer.vocab_size - len(behind), f"{name} is {index}"
        if index is None:
            continue
        found = tokenizer.convert_tokens_to_ids(name)
        assert found == index, f"{name} is {found}, should be {index}"
        said.append(f"{name} {index}")
    for key, name in (("mask_token_id", "[MASK]"), ("gmask_token_id", "[gMASK]")):
        if key in subject.config:
            assert tokenizer.convert_tokens_to_ids(name) == subject.config[key], f"{name} is not config.json's {key}"
    return ", ".join(said)


def round_trip(subject: Subject) -> str:
    """Text to ids and back; plain text gets the vocabulary model's own ids."""
    tokenizer = subject.tokenizer
    for text in (*TEXTS, "第一行\n第二行\n\n  def f(x):\treturn x"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids)
        assert back.strip() == text.strip(), f"{text!r} came back as {back!r}"
    paths = sorted(subject.folder.glob("*.model"))
    if not paths:
        return f"{len(TEXTS) + 1} texts"
    import sentencepiece as spm

    pieces = spm.SentencePieceProcessor(model_file=str(paths[0]))
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == pieces.encode(text), f"{text!r}: {ids}, sentencepiece {pieces.encode(text)}"
    return f"{len(TEXTS) + 1} texts, ids equal sentencepiece's"


def padded_texts(subject: Subject) -> str:
    """tokenizer(texts, padding=True): every row holds its own ids and padding."""
    tokenizer = subject.tokenizer
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    for text, row in zip(TEXTS, batch["input_ids"].tolist(), strict=True):
        ids = tokenizer(text)["input_ids"]
        rest = [tokenizer.pad_token_id] * (len(row) - len(ids))
        assert row == (rest + ids if tokenizer.padding_side == "left" else ids + rest), f"{text!r} became {row}"
    return f"{tuple(batch['input_ids'].shape)}, padding on the {tokenizer.padding_side}"


def added_token(subject: Subject) -> str:
    """A token added to a tokenizer gets an id that no other token has."""
    tokenizer = checkpoints.load_tokenizer(subject.folder, trust_remote_code=True)
    taken = set(tokenizer.get_vocab().values())
    tokenizer.add_tokens(["<a_token_of_the_check>"])
    index = tokenizer.convert_tokens_to_ids("<a_token_of_the_check>")
    assert index not in taken, f"id {index} is taken"
    assert index >= tokenizer.vocab_size, f"id {index} is within the vocabulary"
    text = "a<a_token_of_the_check>b"
    assert index in tokenizer(text)["input_ids"], f"{text!r} has no {index}"
    return f"id {index}"


def chat_format(subject: Subject) -> str:
    """What is learned of a conversation of two turns is its answers; the prompt is the beginning of the sample."""
    tokenizer, chat = subject.loaded
    messages = [
        {"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！有什么可以帮您？"},
        {"role": "user", "content": "2 + 3 = ?"}, {"role": "assistant", "content": "It is 5."},
    ]  # fmt: skip
    samples = chat.conversation(messages)
    learned = [tokenizer.decode([i for i, on in zip(s.ids, s.learned, strict=True) if on]) for s in samples]
    for i in (1, 3):
        assert any(messages[i]["content"] in text for text in learned), f"learned: {learned}"
    prompt = chat.prompt(messages[:3])
    assert samples[-1].ids[: len(prompt)] == prompt, "the prompt is not the beginning of the sample"
    return f"{chat.name}, {len(samples)} sample(s) of two turns"


# --- model ----------------------------------------------------------------------------------------------------------


def patches(subject: Subject) -> str:
    """Native checkpoints are not touched."""
    from llmops import legacy

    cured = legacy.prepare_tokenizer(subject.folder) + legacy.prepare_model(subject.folder)
    if subject.ships_code:
        return f"{len(cured)}: {', '.join(cured)}"
    assert not cured, f"patched: {cured}"
    touched = [c for c in type(subject.model).__mro__ if legacy.CURED in c.__dict__]
    assert not touched, f"patched: {touched}"
    return "none, a native class"


def equals_reference(subject: Subject) -> str:
    """Logits and loss equal those of the module built directly."""
    file = subject.work / "reference.pt"
    given = subject.work / "prompts.json"
    given.write_text(json.dumps(subject.prompts), encoding="utf-8")
    command = [
        sys.executable,
        __file__,
        str(subject.folder),
        "--reference",
        str(given),
        str(file),
        "--dtype",
        str(subject.dtype)[6:],
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the reference cannot be computed: {done.stderr.strip()[-300:]}"
    expected = torch.load(file, weights_only=True)
    worst = loss_gap = 0.0
    with torch.no_grad():
        for prompt, logits, loss in zip(subject.prompts, expected["logits"], expected["losses"], strict=True):
            ids = subject.tensor(prompt)
            output = subject.model(input_ids=ids, labels=ids)
            worst = max(worst, difference(output.logits, logits))
            loss_gap = max(loss_gap, abs(float(output.loss) - loss) / abs(loss))
    within(loss_gap, subject.bound, "losses")
    return f"{within(worst, subject.bound, 'logits')}, losses by {loss_gap:.1e}"


def write_reference(folder: Path, given: Path, file: Path, dtype: torch.dtype) -> None:
    """Build the model directly, without llmops.legacy, and save its logits and losses for the prompts."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = settings.get("auto_map", {})
    if names:
        config = get_class_from_dynamic_module(names["AutoConfig"], str(folder)).from_pretrained(str(folder))
        reference = names.get("AutoModelForCausalLM") or names.get("AutoModelForSeq2SeqLM") or names["AutoModel"]
        kind = get_class_from_dynamic_module(reference, str(folder))
        if "max_length" not in vars(config) and hasattr(config, "seq_length"):
            config.max_length = config.seq_length
    else:
        config = transformers.AutoConfig.from_pretrained(str(folder))
        kind = getattr(transformers, config.architectures[0])
    config.dtype = dtype
    torch.set_default_dtype(dtype)
    model = kind(config)
    torch.set_default_dtype(torch.float32)
    model = model.to(dtype)
    weights = read_weights(folder)
    missing = set(model.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, strict=False).missing_keys)
    head = {"lm_head.weight"}
    if missing & head:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    assert all("inv_freq" in name for name in missing - head), f"the weight files lack {sorted(missing)}"
    model = model.to(device).eval()
    logits, losses = [], []
    with torch.no_grad():
        for prompt in json.loads(given.read_text(encoding="utf-8")):
            ids = torch.tensor([prompt], device=device)
            output = model(input_ids=ids, labels=ids, use_cache=False, return_dict=True)
            logits.append(output.logits.float().cpu())
            losses.append(float(output.loss))
    torch.save({"logits": logits, "losses": losses}, file)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the weight files."""
    weights: dict[str, torch.Tensor] = {}
    shards = sorted(folder.glob("model*.safetensors"))
    if shards:
        from safetensors.torch import load_file

        for path in shards:
            weights |= load_file(path)
    for path in [] if shards else sorted(folder.glob("pytorch_model*.bin")):
        weights |= torch.load(path, map_location="cpu", weights_only=True)
    return weights


def padded_logits(subject: Subject) -> str:
    """A row's logits are the same alone and in a padded batch, on either side, without position_ids."""
    worst = 0.0
    with torch.no_grad():
        alone = [subject.model(input_ids=subject.tensor(prompt)).logits[0, -1] for prompt in subject.prompts]
        for left in (True, False):
            ids, mask = subject.batch(left)
            logits = subject.model(input_ids=ids, attention_mask=mask).logits
            for i, expected in enumerate(alone):
                last = -1 if left else len(subject.prompts[i]) - 1
                worst = max(worst, difference(logits[i, last], expected))
    return within(worst, subject.bound, "logits")


def chosen_logits(subject: Subject) -> str:
    """Logits at chosen positions only (where the labels are) equal those of the full forward."""
    ids, mask = subject.batch(left=True)
    kept = torch.tensor([0, 2, ids.shape[1] - 1], device=subject.device)
    with torch.no_grad():
        full = subject.model(input_ids=ids, attention_mask=mask).logits
        part = subject.model(input_ids=ids, attention_mask=mask, logits_to_keep=kept).logits
    assert part.shape[1] == 3, f"{part.shape[1]} positions"
    return within(difference(part, full[:, kept]), subject.bound, "logits")


def trainable(subject: Subject) -> Any:
    """A second copy of the model to train: all weights of a small one, adapters of a large one."""
    model = subject.load(subject.folder)
    model.config.use_cache = False
    return model if subject.small else with_lora(subject, model)


def with_lora(subject: Subject, model: Any) -> Any:
    """The model with adapters on its family's layers."""
    from peft import LoraConfig, get_peft_model

    layers = checkpoints.choose_lora_layers(model, "", checkpoints.lora_defaults(subject.folder))
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=layers, task_type="CAUSAL_LM"))


def gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and the gradients of one backward pass in training mode."""
    model.train()
    model.zero_grad()
    loss = target_losses(model, batch).mean()
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(subject: Subject) -> str:
    """Loss and gradients are finite, and every trained weight but unused embeddings gets one."""
    loss, grads = gradients(trainable(subject), subject.training_batch())
    assert np.isfinite(loss), f"loss {loss}"
    assert grads, "no gradients"
    broken = [name for name, grad in grads.items() if not grad.isfinite().all()]
    assert not broken, f"not finite: {broken[:3]}"
    silent = [name for name, grad in grads.items() if not grad.any() and "lora_A" not in name]
    assert not silent, f"zero: {silent[:3]}"
    return f"loss {loss:.4f}, {len(grads)} gradients"


def recomputation(subject: Subject) -> str:
    """Gradient checkpointing: same loss and gradients, and every layer really runs twice."""
    model, batch = trainable(subject), subject.training_batch()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    counts: list[int] = []
    watched = [
        layer
        for name, layer in base.named_modules()
        if name.endswith(("dense_h_to_4h", "mlp.up_proj", "mlp.gate_up_proj"))
    ]
    assert watched, "no layer to watch"
    for layer in watched:
        layer.register_forward_pre_hook(lambda *_: counts.append(1))
    plain, expected = gradients(model, batch)
    once = len(counts)
    base.activation_checkpointing_enable({"use_reentrant": False})
    counts.clear()
    loss, found = gradients(model, batch)
    assert len(counts) == 2 * once == 2 * len(watched), f"{len(counts)} forward passes of {len(watched)} layers"
    gap = max(difference(found[name], grad) for name, grad in expected.items() if grad.any())
    within(abs(loss - plain) / plain, subject.bound, "losses")
    return f"{len(counts)} passes of {len(watched)} layers, {within(gap, 10 * subject.bound, 'gradients')}"


def evaluation_writes_nothing(subject: Subject) -> str:
    """An evaluation in mid-training leaves weights and the loss after it as they were."""
    model, batch = trainable(subject), subject.training_batch()
    before = gradients(model, batch)[0]
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        target_losses(model, batch)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, stored[name])]
    assert not changed, f"changed: {changed[:3]}"
    after = gradients(model, batch)[0]
    return within(abs(after - before) / before, subject.bound, "losses before and after")


def adapters(subject: Subject) -> str:
    """LoRA on the family's layers learns."""
    model = with_lora(subject, subject.load(subject.folder))
    model.config.use_cache = False
    batch = subject.training_batch()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    for _ in range(6):
        loss = target_losses(model.train(), batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], f"losses {losses}"
    names = sorted(model.peft_config["default"].target_modules)
    return f"{', '.join(names)}: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps"


def saved_again(subject: Subject) -> str:
    """The saved folder has the .py files and loads with the same logits; its tokenizer gives the same ids."""
    folder = subject.work / "saved"
    size = sum(p.nbytes for p in subject.model.parameters())
    subject.model.save_pretrained(folder, max_shard_size=size // 2 + 1)
    subject.tokenizer.save_pretrained(folder)
    shipped = {path.name for path in subject.folder.glob("*.py")} if subject.ships_code else set()
    used = {name.split("--")[-1].split(".")[0] + ".py" for name in auto_map_values(subject.config)}
    present = {path.name for path in folder.glob("*.py")}
    assert used & shipped <= present, f"missing beside the weights: {sorted(used & shipped - present)}"
    again = checkpoints.load_tokenizer(folder, trust_remote_code=True)
    for text in TEXTS:
        assert again(text)["input_ids"] == subject.tokenizer(text)["input_ids"], f"{text!r} gets other ids"
    model = subject.load(folder)
    with torch.no_grad():
        worst = max(
            difference(model(input_ids=subject.tensor(p)).logits, subject.model(input_ids=subject.tensor(p)).logits)
            for p in subject.prompts
        )
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    return f"{within(worst, 1e-6, 'logits')}, {len(files)} .safetensors, {len(present)} .py files"


def auto_map_values(config: dict[str, Any]) -> Iterator[str]:
    """Every class that an auto_map names."""
    for value in config.get("auto_map", {}).values():
        yield from (part for part in (value if isinstance(value, list) else [value]) if part)


# --- generation -----------------------------------------------------------------------------------------------------


def answers(
    subject: Subject, ids: torch.Tensor, mask: torch.Tensor | None = None, model: Any = None, **options: Any
) -> list[list[int]]:
    """New tokens of each row."""
    torch.manual_seed(1)
    settings = {
        "max_new_tokens": 12,
        "do_sample": False,
        "repetition_penalty": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "temperature": 1.0,
    }
    settings |= {"pad_token_id": subject.tokenizer.pad_token_id} | options
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        found = (model or subject.model).generate(input_ids=ids, attention_mask=mask, **settings)
    return found[:, ids.shape[1] :].tolist()


def cached_generation(subject: Subject) -> str:
    """Greedy, sampled and beam search give the same tokens with a cache as without."""
    ids, mask = subject.batch(left=True)
    different = 0
    for name, options in {"greedy": {}, "sampled": {"do_sample": True}, "beams": {"num_beams": 3}}.items():
        fast, slow = (answers(subject, ids, mask, use_cache=use, **options) for use in (True, False))
        assert fast == slow or subject.dtype != torch.float32, f"{name}: {fast} with a cache, {slow} without"
        different = max(different, len({token for row in fast for token in row}))
    gap = stepwise_gap(subject)
    return f"greedy, sampled, 3 beams; {different} different tokens; {within(gap, subject.bound, 'logits')}"


def stepwise_gap(subject: Subject) -> float:
    """Largest difference of logits between a full forward and one that goes on from a cache, in a padded batch."""
    ids, mask = subject.batch(left=True)
    extra = torch.tensor([[5, 9, 7]], device=subject.device).repeat(len(ids), 1)
    whole, ones = torch.cat([ids, extra], 1), torch.ones_like(extra)
    seen = torch.cat([mask, ones], 1)
    # said at every call: left to themselves, native models count padding when there is no cache
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    width = ids.shape[1]
    with torch.no_grad():
        expected = subject.model(input_ids=whole, attention_mask=seen, position_ids=positions).logits[:, -3:]
        past, found = None, []
        for start, end in ((0, width), (width, width + 1), (width + 1, width + 3)):
            output = subject.model(
                input_ids=whole[:, start:end], attention_mask=seen[:, :end], position_ids=positions[:, start:end],
                past_key_values=past, use_cache=True,
            )  # fmt: skip
            past = output.past_key_values
            found.append(output.logits)
    found = found[1:]
    return difference(torch.cat(found, 1), expected)


def batch_generation(subject: Subject) -> str:
    """Prompts of different lengths get the same answers together as alone."""
    ids, mask = subject.batch(left=True)
    together = answers(subject, ids, mask)
    alone = [answers(subject, subject.tensor(prompt))[0] for prompt in subject.prompts]
    for a, b in zip(together, alone, strict=True):
        width = min(len(a), len(b))
        assert a[:width] == b[:width] or subject.dtype != torch.float32, f"{a} together, {b} alone"
    assert len({tuple(row) for row in alone}) > 1, "every prompt gets the same answer: the row shows nothing"
    return f"{len(alone)} prompts of {', '.join(str(len(p)) for p in subject.prompts)} tokens"


# --- training through chat_main.sh ----------------------------------------------------------------------------------


def start(subject: Subject, output: Path, *arguments: str) -> dict[int, float]:
    """Train through chat_main.sh; losses by step."""
    data = subject.work / "data"
    if not data.exists():
        data.mkdir()
        for name, count in (("train", 8 * subject.processes), ("test", 4)):
            lines = (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
            (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (data / "retention.jsonl").write_text(
            "\n".join((ROOT / "train" / "retention.jsonl").read_text(encoding="utf-8").splitlines()[:4]) + "\n",
            encoding="utf-8",
        )
    command = [
        "bash", str(ROOT / "chat_main.sh"), "--model_name_or_path", str(subject.folder), "--mode", subject.mode,
        "--train_file", str(data / "train.jsonl"), "--test_file", str(data / "test.jsonl"),
        "--output_path", str(output), "--retention_file", str(data / "retention.jsonl"),
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
        "--num_train_epochs", "2", "--max_seq_len", "256", "--lora_dropout", "0",
        "--tensorboard", "false", "--trust_remote_code", "true", "--num_processes", str(subject.processes), "--dtype",
        {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[subject.dtype], *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 143):
        log(done.stdout[-2000:] + done.stderr[-6000:])
        raise AssertionError(f"chat_main.sh ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    lines = [json.loads(line) for line in (output / "log.txt").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def same_losses(found: dict[int, float], expected: dict[int, float], bound: float) -> str:
    """Losses of two runs agree at every step."""
    assert found.keys() == expected.keys(), f"steps {sorted(found)} and {sorted(expected)}"
    gap = max(abs(found[step] - loss) / abs(loss) for step, loss in expected.items())
    return within(gap, bound, f"{len(found)} losses")


def losses_of(subject: Subject, name: str) -> dict[int, float]:
    """Losses of a run of an earlier row."""
    assert name in subject.outputs, f"the run {name} did not succeed"
    lines = (subject.outputs[name] / "log.txt").read_text(encoding="utf-8").splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


def lora_zero2(subject: Subject) -> str:
    """A LoRA run under ZeRO 2 with several processes leaves an adapter that loads."""
    output = subject.work / "lora2"
    losses = start(subject, output, "--zero_stage", "2", "--learning_rate", "3e-3", "--merge_lora", "true")
    subject.outputs["lora2"] = output
    assert (output / "adapter_config.json").is_file(), "no adapter"
    checkpoints.load_tokenizer(output, trust_remote_code=True)
    first, last = losses[min(losses)], losses[max(losses)]
    assert last < first, f"loss {first} -> {last}"
    return f"{subject.processes} processes, loss {first:.3f} -> {last:.3f}"


def merged(subject: Subject) -> str:
    """output_path/merged answers like base + adapter."""
    assert "lora2" in subject.outputs, "there was no run"
    output = subject.outputs["lora2"]
    adapted = checkpoints.load_trained(output, subject.dtype, trust_remote_code=True).to(subject.device).eval()
    whole = subject.load(output / "merged")
    with torch.no_grad():
        worst = max(
            difference(whole(input_ids=subject.tensor(p)).logits, adapted(input_ids=subject.tensor(p)).logits)
            for p in subject.prompts
        )
        moved = difference(adapted(input_ids=subject.tensor(subject.prompts[0])).logits,
                           subject.model(input_ids=subject.tensor(subject.prompts[0])).logits)  # fmt: skip
    assert moved > 10 * worst, f"the adapter changes nothing ({moved:.1e})"
    ids, mask = subject.batch(left=True)
    both = [answers(subject, ids, mask, model) for model in (adapted, whole)]
    assert both[0] == both[1] or subject.dtype != torch.float32, f"{both[0]} with the adapter, {both[1]} merged"
    return f"{within(worst, subject.bound, 'logits')} (the adapter moved them by {moved:.1e})"


def lora_zero3(subject: Subject) -> str:
    """ZeRO 3 gives the losses of ZeRO 2."""
    losses = start(subject, subject.work / "lora3", "--zero_stage", "3", "--learning_rate", "3e-3")
    return same_losses(losses, losses_of(subject, "lora2"), 10 * subject.bound)


def full_zero2(subject: Subject) -> str:
    """Training of every weight under ZeRO 2 leaves a whole model that loads, with its code."""
    output = subject.work / "full2"
    losses = start(subject, output, "--train_type", "all", "--zero_stage", "2", "--learning_rate", "1e-3")
    subject.outputs["full2"] = output
    model = subject.load(output)
    with torch.no_grad():
        moved = difference(model(input_ids=subject.tensor(subject.prompts[0])).logits,
                           subject.model(input_ids=subject.tensor(subject.prompts[0])).logits)  # fmt: skip
    assert moved > 1e-3, f"nothing was learned ({moved:.1e})"
    return f"loss {losses[min(losses)]:.3f} -> {losses[max(losses)]:.3f}, the result loads"


def full_zero3_resumed(subject: Subject) -> str:
    """A run under ZeRO 3 that is ended after its first step and started again reaches the losses of ZeRO 2."""
    output = subject.work / "full3"
    arguments = ("--train_type", "all", "--zero_stage", "3", "--learning_rate", "1e-3")
    interrupted = start_and_stop(subject, output, *arguments)
    losses = start(subject, output, *arguments)
    assert interrupted < len(losses), "the run was not interrupted"
    gap = same_losses(losses, losses_of(subject, "full2"), 10 * subject.bound)
    return f"resumed at step {interrupted} of {len(losses)}; {gap}"


def lora_resumed(subject: Subject) -> str:
    """A LoRA run that is ended after its first step and started again reaches the losses of the undisturbed one."""
    output = subject.work / "lora_resumed"
    arguments = ("--zero_stage", "2", "--learning_rate", "3e-3")
    interrupted = start_and_stop(subject, output, *arguments)
    losses = start(subject, output, *arguments)
    return f"resumed at step {interrupted}; {same_losses(losses, losses_of(subject, 'lora2'), 10 * subject.bound)}"


def start_and_stop(subject: Subject, output: Path, *arguments: str) -> int:
    """Start a run that a STOP file ends after a step; how many steps it made."""
    import threading

    def stop_soon() -> None:
        while not (output / "log.txt").is_file():
            time.sleep(0.05)
        (output / "STOP").touch()

    threading.Thread(target=stop_soon, daemon=True).start()
    return max(start(subject, output, *arguments), default=0)


def zero3_generation(subject: Subject) -> str:
    """Under ZeRO 3 every process answers its own prompts, of unequal lengths, as one process does alone."""
    given, file = subject.work / "prompts.json", subject.work / "zero3"
    given.write_text(json.dumps(subject.prompts), encoding="utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(subject.processes), "--standalone",
        __file__, str(subject.folder), "--zero3_generation", str(given), str(file), "--dtype", str(subject.dtype)[6:],
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr.strip()[-300:]}"
    for rank in range(subject.processes):
        found = json.loads(Path(f"{file}.{rank}").read_text(encoding="utf-8"))
        prompt = subject.prompts[rank % len(subject.prompts)]
        expected = answers(subject, subject.tensor(prompt), max_new_tokens=UNEQUAL[rank % len(UNEQUAL)])[0]
        assert found == expected or subject.dtype != torch.float32, f"process {rank}: {found}, alone {expected}"
    return f"{subject.processes} processes, {', '.join(map(str, UNEQUAL[: subject.processes]))} new tokens"


def write_zero3_answers(folder: Path, given: Path, file: Path, dtype: torch.dtype) -> None:
    """One process of the row above."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    settings = {
        "zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "train_batch_size": world,
        "bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16},
    }  # fmt: skip
    kept = HfDeepSpeedConfig(settings)  # from_pretrained looks at it as long as it lives
    model = checkpoints.load_model(folder, dtype, trust_remote_code=True)
    engine = deepspeed.initialize(model=model, config=kept.config)[0]
    engine.module.eval()
    prompts = json.loads(given.read_text(encoding="utf-8"))
    ids = torch.tensor([prompts[rank % len(prompts)]], device=engine.device)
    settings = {"max_new_tokens": UNEQUAL[rank % len(UNEQUAL)], "do_sample": False, "repetition_penalty": 1.0}
    with torch.no_grad():
        found = engine.module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), synced_gpus=True, pad_token_id=0, **settings
        )
    Path(f"{file}.{rank}").write_text(json.dumps(found[0, ids.shape[1] :].tolist()), encoding="utf-8")
    torch.distributed.destroy_process_group()


TOKENIZER_ROWS: dict[str, Callable[[Subject], str]] = {
    "tokenizer ids equal the vocabulary's": special_ids,
    "encode and decode round trip": round_trip,
    "padded batch of texts": padded_texts,
    "an added token's id is free": added_token,
    "chat format": chat_format,
}
MODEL_ROWS: dict[str, Callable[[Subject], str]] = {
    "patches": patches,
    "logits and loss equal the module built directly": equals_reference,
    "padded equals unpadded": padded_logits,
    "logits at chosen positions": chosen_logits,
    "backward finite": backward,
    "gradient checkpointing": recomputation,
    "evaluation writes no weight": evaluation_writes_nothing,
    "LoRA": adapters,
    "save and reload": saved_again,
    "cached generation equals uncached": cached_generation,
    "batch generation equals single": batch_generation,
}

TRAINING_ROWS: dict[str, Callable[[Subject], str]] = {
    "LoRA training, ZeRO 2": lora_zero2,
    "merge equals adapter": merged,
    "LoRA training, ZeRO 3": lora_zero3,
    "generation under ZeRO 3": zero3_generation,
}
SMALL_ROWS: dict[str, Callable[[Subject], str]] = {
    "full training, ZeRO 2": full_zero2,
    "full training, ZeRO 3, resumed": full_zero3_resumed,
}
LARGE_ROWS: dict[str, Callable[[Subject], str]] = {"LoRA training, resumed": lora_resumed}


def check(subject: Subject, training: bool) -> bool:
    """Print the table; whether every row is ok."""
    rows = TOKENIZER_ROWS | MODEL_ROWS
    if training:
        rows = rows | TRAINING_ROWS | (SMALL_ROWS if subject.small else LARGE_ROWS)
    width = max(map(len, rows))
    good = True
    for name, row in rows.items():
        log(f"{name} ...")
        started = time.monotonic()
        try:
            mark, detail = "ok", row(subject)
        except EXPECTED as error:
            log(traceback.format_exc())
            mark, detail, good = "FAIL", f"{type(error).__name__}: {str(error).strip()[:300]}", False
        log(f"    {mark} after {time.monotonic() - started:.1f} s")
        print(f"| {name:<{width}} | {mark:<4} | {' '.join(detail.split())} |", flush=True)
    return good


@contextmanager
def work_folder(chosen: Path | None) -> Iterator[Path]:
    """A folder for what the runs write: the chosen one, kept, or a temporary one."""
    if chosen:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
        return
    folder = Path(tempfile.mkdtemp(prefix="check_checkpoint."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def main(argv: list[str] | None = None) -> int:
    """Check one folder; exit code 0 when every row is ok."""
    parser = argparse.ArgumentParser(description="Check that a chat model's checkpoint works here, row by row.")
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument("--mode", default="auto", help="chat format, as chat_main.sh takes it")
    parser.add_argument(
        "--dtype", default="auto", help="float32, float16, bfloat16; auto: config.json's on a GPU, else float32"
    )
    parser.add_argument("--processes", type=int, default=0, help="processes of a training run; 0: the GPUs, or 2")
    parser.add_argument(
        "--work", type=Path, help="where the runs write (kept); needs room for some copies of the model"
    )
    parser.add_argument("--no_training", action="store_true", help="leave out the runs of chat_main.sh")
    parser.add_argument("--reference", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--zero3_generation", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        if not (options.folder / "config.json").is_file():
            raise UserError(f"{options.folder} has no config.json; give the folder of a checkpoint")
        folder = options.folder.resolve()
        dtype = choose_dtype(options.dtype, checkpoints.read_config(folder))
        if options.reference:
            write_reference(folder, *options.reference, dtype)
            return 0
        if options.zero3_generation:
            write_zero3_answers(folder, *options.zero3_generation, dtype)
            return 0
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with work_folder(options.work) as work:
            processes = options.processes or torch.cuda.device_count() or 2
            subject = Subject(folder, options.mode, dtype, processes, work, device)
            return 0 if check(subject, not options.no_training) else 1
    except UserError as error:
        log(f"error: {error}")
        return 2


def choose_dtype(name: str, config: dict[str, Any]) -> torch.dtype:
    """The dtype of a name, or the checkpoint's own on a GPU."""
    if name == "auto":
        name = config.get("torch_dtype") or config.get("dtype") or "float32"
        name = name if torch.cuda.is_available() else "float32"
    name = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(name, name)
    if name not in ("float32", "float16", "bfloat16"):
        raise UserError(f"--dtype {name} is none of float32, float16, bfloat16")
    return getattr(torch, name)


if __name__ == "__main__":
    sys.exit(main())
