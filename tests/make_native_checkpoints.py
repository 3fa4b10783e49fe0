"""Tiny checkpoints of transformers' own classes, to check beside the old ones.

    python tests/make_native_checkpoints.py llama|qwen2|qwen3|glm4 OUTPUT_FOLDER

2 layers, width 64, random weights with enlarged queries, keys and values, a byte-level tokenizer with a chat template.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "glm4": "Glm4"}


def make_checkpoint(name: str, output: Path) -> None:
    """Write a checkpoint folder of one architecture."""
    import torch
    import transformers

    from llmops.models import tiny

    lines = (ROOT / "train" / "demo_data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = tiny.train_tokenizer((m["content"] for line in lines for m in json.loads(line)["messages"]), 1500)
    config = getattr(transformers, f"{CLASSES[name]}Config")(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{CLASSES[name]}ForCausalLM")(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.5 if any(part in key for part in ("q_proj", "k_proj", "v_proj")) else 0.12)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main(argv: list[str] | None = None) -> int:
    """Make one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", choices=CLASSES)
    parser.add_argument("output", type=Path, help="where the checkpoint goes")
    options = parser.parse_args(argv)
    make_checkpoint(options.architecture, options.output)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
