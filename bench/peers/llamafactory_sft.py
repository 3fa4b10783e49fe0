"""Fine-tune a local causal language model with LLaMA-Factory on the CPU and print one JSON line of figures.

The run goes through LLaMA-Factory's own ``run_exp`` with its built-in ``chatml`` template. That template also trains
on the line break that follows the assistant's end token; the driver masks that one label, so that the loss is on the
same tokens in every peer, and checks that the ids are those of the tokenizer's own chat template.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import wraps
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import peer_common


def stub_torchaudio() -> None:
    """Put an empty ``torchaudio`` module in place for this process if there is no real one.

    LLaMA-Factory imports torchaudio at the top of its multimodal code, also for text-only training, and uses it only
    to read audio files. The torchaudio wheel on the package index is built against another torch with CUDA and fails
    to load beside a CPU-only torch ("Could not load this library"), so install.sh leaves it out.
    """
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        module = ModuleType("torchaudio")
        module.__spec__ = ModuleSpec("torchaudio", loader=None)
        sys.modules["torchaudio"] = module


def mask_after_end_token(ids: list[int], labels: list[int], end_id: int) -> list[int]:
    """Return labels in which the assistant's part ends with the end-of-turn token."""
    ignore = peer_common.IGNORE_INDEX
    masked = list(labels)
    for index in range(1, len(ids)):
        if labels[index - 1] == end_id and labels[index] != ignore:
            masked[index] = ignore
    return masked


def patch_labels(processor_class: Any, own_template: str, check_first: int, max_length: int) -> None:
    """Wrap the encoder of one conversation: check its ids and mask the line break after the end token."""
    encode: Callable[..., tuple[list[int], list[int]]] = processor_class._encode_data_example
    seen = 0

    @wraps(encode)
    def wrapper(self: Any, **kwargs: Any) -> tuple[list[int], list[int]]:
        nonlocal seen
        ids, labels = encode(self, **kwargs)
        if seen < check_first:
            seen += 1
            messages = list(kwargs["prompt"]) + list(kwargs["response"])
            if kwargs["system"]:
                messages.insert(0, {"role": "system", "content": kwargs["system"]})
            own = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, chat_template=own_template
            )["input_ids"]
            # Conversations over the limit are cut by a rule of LLaMA-Factory's own, so only whole ones compare.
            if len(own) < max_length and list(own) != list(ids):
                raise SystemExit(f"conversation {seen - 1}: the ids differ from those of the tokenizer's own template")
        end_id = self.tokenizer.convert_tokens_to_ids(peer_common.END_OF_TURN)
        return ids, mask_after_end_token(ids, labels, end_id)

    processor_class._encode_data_example = wrapper


def count_rows(dataset: Any) -> list[float]:
    """Return the number of original conversations in every row."""
    if "position_ids" not in dataset.column_names:
        return [1.0] * len(dataset)
    # Positions restart at 0 with every conversation; the padding at the end is a run of zeros.
    counts = []
    for positions in dataset["position_ids"]:
        counts.append(float(sum(a == 0 and b == 1 for a, b in pairwise(positions))))
    return counts


def main() -> None:
    """Run the benchmark."""
    parser = peer_common.build_parser("LLaMA-Factory on the CPU")
    parser.add_argument(
        "--packing_mode",
        choices=("plain", "neat"),
        default="neat",
        help="neat keeps packed conversations apart; plain lets them attend to each other",
    )
    args = parser.parse_args()
    packing = args.packing == "on"
    micro, accumulation = peer_common.split_batch(args.batch_size, args.micro_batch_size)
    peer_common.prepare_environment(args.threads)

    import torch
    import transformers

    torch.set_num_threads(args.threads)
    stub_torchaudio()  # after transformers, which must not take the stub for the real package
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.train.tuner import run_exp

    own_template = transformers.AutoTokenizer.from_pretrained(args.model).chat_template
    patch_labels(SupervisedDatasetProcessor, own_template, args.batch_size, args.max_length)

    record = peer_common.RunRecord()
    with tempfile.TemporaryDirectory() as folder:
        info = {
            "bench": {
                "file_name": str(Path(args.data).resolve()),
                "formatting": "sharegpt",
                "columns": {"messages": "messages"},
                "tags": {
                    "role_tag": "role",
                    "content_tag": "content",
                    "user_tag": "user",
                    "assistant_tag": "assistant",
                    "system_tag": "system",
                },
            }
        }
        Path(folder, "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        options: dict[str, Any] = {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": args.model,
            "cache_dir": str(Path(folder, "cache")),
            "dataset_dir": folder,
            "dataset": "bench",
            "template": "chatml",
            "cutoff_len": args.max_length,
            "packing": packing,
            "neat_packing": packing and args.packing_mode == "neat",
            "finetuning_type": "lora",
            "lora_target": ",".join(peer_common.LORA_TARGETS),
            "lora_rank": peer_common.LORA_RANK,
            "lora_alpha": peer_common.LORA_ALPHA,
            "lora_dropout": 0.0,
            "flash_attn": "sdpa" if args.attn == "sdpa" else "disabled",
            "disable_gradient_checkpointing": True,
            "disable_shuffling": True,
            "output_dir": str(Path(folder, "out")),
            "use_cpu": True,
            "bf16": False,
            "fp16": False,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": peer_common.LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "num_train_epochs": 1.0,
            "max_steps": args.max_steps or -1,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": "none",
            "plot_loss": False,
            "disable_tqdm": True,
            "seed": peer_common.SEED,
        }
        run_exp(options, callbacks=[peer_common.make_callback(record, count_rows)])
    name = args.packing_mode if packing else "off"
    peer_common.print_report("llamafactory", version("llamafactory"), name, args.batch_size, micro, record)


if __name__ == "__main__":
    main()
