"""Tiny chat models made on the spot, so that everything runs on a bare machine: demo, tests, benchmarks.

The tokenizer is a byte-level BPE trained on the given texts, with ChatML's role tokens and a chat template.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ARCHITECTURES = ("llama", "qwen2")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, words: str = "", lowercase: bool = False
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE with at most `vocab_size` tokens that ends answers with `<|im_end|>`.

    `words`: a regular expression for what may become one token; "" is GPT-2's, which splits at underscores.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words)
    split = [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def make_model(
    architecture: str, vocab_size: int, hidden: int, layers: int, heads: int, eos_id: int, seed: int = 0, **extra: Any
) -> "PreTrainedModel":
    """A randomly initialised causal model: `llama` or `qwen2`, with `heads` // 2 key/value heads, at least one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    make_config, make = classes[architecture]
    settings = {
        "vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": hidden * 11 // 4 // 8 * 8,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": eos_id, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(seed)
    return make(make_config(**(settings | extra)))


def write_checkpoint(
    folder: Path, texts: Iterable[str], architecture: str = "llama", vocab_size: int = 2000, hidden: int = 16,
    layers: int = 2, heads: int = 2, seed: int = 0, words: str = "", lowercase: bool = False,
    **extra: Any,
) -> Path:  # fmt: skip
    """Train a tokenizer on `texts`, make a model for it and save both as a checkpoint folder."""
    tokenizer = train_tokenizer(texts, vocab_size, words, lowercase)
    model = make_model(architecture, len(tokenizer), hidden, layers, heads, tokenizer.eos_token_id, seed, **extra)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
