"""Fine-tune a local causal language model with TRL's SFTTrainer on the CPU and print one JSON line of figures.

The loss is taken on the assistant's text and its end token only. TRL needs ``{% generation %}`` marks in the chat
template for that and ships such templates only for the model families it knows, so the driver brings a ChatML
template with the marks and checks that it renders the same ids as the tokenizer's own template.
"""

from __future__ import annotations

import tempfile
from typing import Any

import peer_common

TRAINING_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def check_template(tokenizer: Any, conversations: list[list[dict[str, str]]]) -> None:
    """Stop if the training template does not render the ids of the tokenizer's own template."""
    for index, messages in enumerate(conversations):
        own = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        ours = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, chat_template=TRAINING_TEMPLATE
        )["input_ids"]
        if own != ours:
            raise SystemExit(f"conversation {index}: the training template renders other ids than the tokenizer's own")


def main() -> None:
    """Run the benchmark."""
    parser = peer_common.build_parser("TRL SFTTrainer on the CPU")
    parser.add_argument(
        "--packing_strategy",
        choices=("bfd", "bfd_split", "wrapped"),
        default="bfd",
        help="wrapped joins all conversations to one stream and cuts it: no boundaries, conversations cut in two",
    )
    args = parser.parse_args()
    packing = args.packing == "on"
    micro, accumulation = peer_common.split_batch(args.batch_size, args.micro_batch_size)
    peer_common.prepare_environment(args.threads)

    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    conversations = peer_common.load_conversations(args.data)
    check_template(tokenizer, conversations[: args.batch_size])
    tokenizer.chat_template = TRAINING_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation=args.attn)

    def count_rows(dataset: Any) -> list[float]:
        """Return the number of original conversations in every row."""
        if "seq_lengths" in dataset.column_names:
            return [float(len(lengths)) for lengths in dataset["seq_lengths"]]
        if packing:  # wrapped: rows hold equal shares of the stream, whatever conversation a token is from
            tokens = [len(ids) for ids in dataset["input_ids"]]
            return [len(conversations) * count / sum(tokens) for count in tokens]
        return [1.0] * len(dataset)

    record = peer_common.RunRecord()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                fp16=False,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=accumulation,
                gradient_checkpointing=False,
                learning_rate=peer_common.LEARNING_RATE,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                num_train_epochs=1,
                max_steps=args.max_steps or -1,
                max_length=args.max_length,
                assistant_only_loss=True,
                packing=packing,
                packing_strategy=args.packing_strategy,
                train_sampling_strategy="sequential",
                dataloader_num_workers=0,
                dataloader_pin_memory=False,
                logging_steps=1,
                save_strategy="no",
                eval_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=peer_common.SEED,
            ),
            train_dataset=Dataset.from_list([{"messages": messages} for messages in conversations]),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=peer_common.LORA_RANK,
                lora_alpha=peer_common.LORA_ALPHA,
                lora_dropout=0.0,
                target_modules=list(peer_common.LORA_TARGETS),
            ),
            callbacks=[peer_common.make_callback(record, count_rows)],
        )
        trainer.train()
    name = args.packing_strategy if packing else "off"
    peer_common.print_report("trl", trl.__version__, name, args.batch_size, micro, record)


if __name__ == "__main__":
    main()
