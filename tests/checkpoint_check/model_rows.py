"""Rows of the table: the model in this process."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from checkpoint_check.subject import ENTRY, TEXTS, Subject, difference, within
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from llmops.models.lora_layers import choose_lora_layers
from train.batches import target_losses


def patches(subject: Subject) -> str:
    """Native checkpoints are not touched."""
    from llmops.legacy import patches

    cured = patches.prepare_tokenizer(subject.folder) + patches.prepare_model(subject.folder)
    if subject.ships_code:
        return f"{len(cured)}: {', '.join(cured)}"
    assert not cured, f"patched: {cured}"
    touched = [c for c in type(subject.model).__mro__ if patches.CURED in c.__dict__]
    assert not touched, f"patched: {touched}"
    return "none, a native class"


def equals_reference(subject: Subject) -> str:
    """Logits and loss equal those of the module built directly."""
    file = subject.work / "reference.pt"
    given = subject.work / "prompts.json"
    given.write_text(json.dumps(subject.prompts), encoding="utf-8")
    # in bf16 some vendors' modules are wrong by themselves; against fp32, ours is not measured by their faults
    dtype = torch.float32 if subject.small else subject.dtype
    command = [
        sys.executable, str(ENTRY), str(subject.folder), "--reference", str(given), str(file),
        "--dtype", str(dtype)[6:],
    ]  # fmt: skip
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

    layers = choose_lora_layers(model, "", Checkpoint(subject.folder).lora_layers)
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
    again = ChatModel(Checkpoint(folder, trust_remote_code=True)).tokenizer
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
