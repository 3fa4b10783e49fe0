"""The part of bench/gpu.sh that trains with transformers and PEFT by hand: what our Trainer is compared with."""

import shutil
import time
from typing import Any

from gpu_bench import Bench
from gpu_speed import release, settings_of


def peer_lora_7b(bench: Bench) -> None:
    """transformers and PEFT by hand on the same conversations: padded rows, labels, AdamW, no DeepSpeed."""
    config = settings_of(bench, "tiny" if bench.small else "7b", "lora")
    for recompute in (False, True):
        for rows in (2,) if bench.small else (4, 8, 16):
            name = f"{rows} rows at once{', recomputing' if recompute else ''}"
            bench.each(name, lambda r=rows, c=recompute: peer_run(bench, config, r, c))


def peer_run(bench: Bench, config: Any, rows: int, recompute: bool) -> dict[str, Any]:
    """Seconds and memory of steps of 32 conversations in micro-batches of `rows`."""
    import torch

    from train import session
    from train.estimates import empty_model

    shutil.rmtree(config.output_path, ignore_errors=True)
    data = session.prepare_data(config, encodes=True).train
    bench.memory_gib(start=True)
    model = empty_model(config, bench.dtype, device=bench.device).train()
    model.config.use_cache = False  # as ours: no keys and values are kept beside those of the backward pass
    if recompute:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    size, count, dropped = (8, 3, 1) if bench.small else (32, 6, 2)
    marks, tokens = [], []
    for number in range(count):
        chosen = [data[(number * size + i) % len(data)] for i in range(size)]
        tokens.append(sum(len(sample["ids"]) for sample in chosen))
        for start in range(0, size, rows):
            model(**padded(chosen[start : start + rows], bench.device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bench.wait()
        marks.append(time.perf_counter())
    rate = sum(tokens[dropped:]) / (marks[-1] - marks[dropped - 1])
    weights = sum(p.numel() for p in model.parameters())
    found = {"tokens_per_second": rate, "mfu": rate * 4 * weights / bench.peak_flops(), "mfu_counts": "4NT",
             "peak_gib": bench.memory_gib()}  # fmt: skip
    del model, optimizer
    release(bench)
    return found


def padded(samples: list[Any], device: Any) -> dict[str, Any]:
    """Rows with labels as transformers takes them."""
    import torch

    longest = max(len(sample["ids"]) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, sample in enumerate(samples):
        n, row = len(sample["ids"]), torch.tensor(sample["ids"], dtype=torch.int64)
        ids[i, :n], mask[i, :n] = row, 1
        labels[i, :n] = torch.where(torch.tensor(sample["learned"]), row, -100)
    return {"input_ids": ids.to(device), "labels": labels.to(device), "attention_mask": mask.to(device)}
