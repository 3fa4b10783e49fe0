"""Rows of the table: generation."""

import copy
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from checkpoint_check.subject import ENTRY, QUESTIONS, UNEQUAL, Subject, difference, within


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


def vendors_chat(subject: Subject) -> str:
    """The class's own `chat` answers, and its stream says the same; some leave out the last token of a stream."""
    model, tokenizer = subject.model, subject.tokenizer
    if "messages" in inspect.signature(model.chat).parameters:
        settings = copy.deepcopy(model.generation_config)
        settings.update(do_sample=False, max_new_tokens=12)
        messages = [{"role": "user", "content": QUESTIONS[0]}]
        whole = model.chat(tokenizer, messages, generation_config=settings)
        *_, last = model.chat(tokenizer, messages, stream=True, generation_config=settings)
    else:
        options = {"do_sample": False, "max_length": len(subject.prompts[0]) + 16}
        whole, _ = model.chat(tokenizer, QUESTIONS[0], history=[], **options)
        *_, (last, *_) = model.stream_chat(tokenizer, QUESTIONS[0], history=[], **options)
    whole, last = str(whole), str(last)
    assert last, "the stream says nothing"
    assert whole.startswith(last), f"{whole!r} from chat, {last!r} from its stream"
    return f"{len(whole)} characters, {len(last)} from the stream"


def zero3_generation(subject: Subject) -> str:
    """Under ZeRO 3 every process answers its own prompts, of unequal lengths, as one process does alone."""
    given, file = subject.work / "prompts.json", subject.work / "zero3"
    given.write_text(json.dumps(subject.prompts), encoding="utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(subject.processes), "--standalone",
        str(ENTRY), str(subject.folder), "--zero3_generation", str(given), str(file), "--dtype", str(subject.dtype)[6:],
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr.strip()[-300:]}"
    for rank in range(subject.processes):
        found = json.loads(Path(f"{file}.{rank}").read_text(encoding="utf-8"))
        prompt = subject.prompts[rank % len(subject.prompts)]
        expected = answers(subject, subject.tensor(prompt), max_new_tokens=UNEQUAL[rank % len(UNEQUAL)])[0]
        assert found == expected or subject.dtype != torch.float32, f"process {rank}: {found}, alone {expected}"
    return f"{subject.processes} processes, {', '.join(map(str, UNEQUAL[: subject.processes]))} new tokens"
