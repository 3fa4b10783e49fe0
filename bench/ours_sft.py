"""Our side of the fine-tuning benchmark: the work of bench/peers, through the product's own Trainer and DeepSpeed."""

import os
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "peers")]

from peer_common import (
    LEARNING_RATE,
    LORA_ALPHA,
    LORA_RANK,
    LORA_TARGETS,
    RunRecord,
    build_parser,
    prepare_environment,
    print_report,
    split_batch,
)


def work_of(trainer: Any, data: Any) -> dict[str, float]:
    """FLOPs of a conversation that LoRA cannot do without, shared beginnings counted each time, and the machine's rate.

    4 a weight and token: forward, and backward towards the inputs; the head at learned tokens only.
    """
    import torch

    from llmops.machine import cpu_kernels

    model = trainer.model.get_base_model()
    head = model.get_output_embeddings()
    layers = sum(
        module.weight.numel() for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and "lora_" not in name
    )  # fmt: skip
    tokens = data.train.lengths.mean()
    learned = sum(int(data.train[i]["learned"].sum()) for i in range(len(data.train))) / len(data.train)
    kernels = cpu_kernels.probe()
    return {
        "flops_per_sample": 4 * float(layers * tokens + head.weight.numel() * learned),
        "best_flops_per_second": max(kernel.rate for kernel in kernels) if kernels else 0.0,
    }


def main() -> None:
    """Train once and print the report as the last line of stdout."""
    parser = build_parser(__doc__ or "")
    parser.add_argument("--scenario", default="general", choices=("general", "faq"))
    parser.add_argument("--cpu_kernels", default="auto", choices=("auto", "default"))
    parser.add_argument("--micro_batch_tokens", type=int, default=0, help="0: as the product chooses")
    args = parser.parse_args()
    prepare_environment(args.threads)
    os.environ["DS_ACCELERATOR"] = "cpu"
    micro, accumulation = split_batch(args.batch_size, args.micro_batch_size)

    from llmops.console import stdout_to_stderr

    report: dict[str, Any] = {}
    with stdout_to_stderr(), tempfile.TemporaryDirectory() as folder:
        import torch
        from torch.utils.data import SequentialSampler
        from transformers import TrainerCallback

        from train import session
        from train.config import Config
        from train.training_log import TrainingLog

        torch.set_num_threads(args.threads)
        config = Config(
            scenario=args.scenario, model_name_or_path=args.model, output_path=folder,
            train_file=args.data, test_file=args.data,
            lora_module_name=",".join(LORA_TARGETS), lora_dim=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0,
            per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation, max_seq_len=args.max_length,
            learning_rate=LEARNING_RATE, num_train_epochs=1, max_steps=args.max_steps or -1,
            lr_scheduler_type="constant", warmup_ratio=0.0,
            gradient_checkpointing="false", packing=args.packing == "on", dtype="fp32", cpu_kernels=args.cpu_kernels,
            micro_batch_tokens=args.micro_batch_tokens,
        )  # fmt: skip
        data = session.prepare_data(config, encodes=True)
        trainer, schedule = session.build_trainer(config, data)
        trainer._get_train_sampler = lambda *_: SequentialSampler(data.train)  # the peers read in the file's order
        schedule.evaluate = lambda: None  # no evaluation and no checkpoint, as with the peers
        schedule._evaluate_and_save = lambda *_: None
        trainer.remove_callback(TrainingLog)
        report.update(work_of(trainer, data))
        record = RunRecord(row_counts=[1.0] * len(data.train))
        record.supervised_first = sum(
            int(data.train[i]["learned"].sum()) for i in range(min(args.batch_size, len(data.train)))
        )

        class Clock(TrainerCallback):
            """The peers' clock: from on_train_begin to on_train_end."""

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.start = time.perf_counter()

            def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
                if "loss" in logs:
                    record.losses.append(float(logs["loss"]))

            def on_train_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
                record.seconds = time.perf_counter() - self.start
                record.steps = state.global_step

        trainer.add_callback(Clock())
        trainer.train()
    version = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    print_report("llmops", version, args.packing, args.batch_size, micro, record, report)


if __name__ == "__main__":
    main()
