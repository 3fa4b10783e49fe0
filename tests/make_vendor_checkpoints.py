"""Tiny checkpoints around a vendor's own code: 2 layers, width 64, a sentencepiece model trained on the spot.

    python tests/make_vendor_checkpoints.py CODE_FOLDER OUTPUT_FOLDER

CODE_FOLDER holds the .py files of ChatGLM-6B, ChatGLM2-6B (or CodeGeeX2), ChatGLM3-6B, Baichuan2-7B or Baichuan2-13B,
and of its config.json, tokenizer_config.json and generation_config.json those that there are; sizes apart, they are
taken as they are. Vocabulary sizes and the ids of special tokens are the vendor's. Weights are random, drawn here and
not by the vendor's code, with enlarged queries, keys and values: with small ones every token would get the same answer.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

HIDDEN, LAYERS, HEADS, INNER = 64, 2, 4, 96
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
EMBEDDINGS = ("transformer.word_embeddings.weight",)
GLM_AUTO = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
}
GLM_TOKENIZER = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
# of a vendor's config.json: what is made tiny here, and what speaks of weights that are packed into integers
SIZES = ("hidden_size", "inner_hidden_size", "intermediate_size", "ffn_hidden_size", "num_layers", "num_hidden_layers",
         "num_attention_heads", "kv_channels", "multi_query_group_num")  # fmt: skip
QUANTIZED = ("quantization_bit", "quantization_embeddings", "quantization_config")
Settings = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Find out whose code it is and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("code", type=Path, help="folder with the vendor's .py files")
    parser.add_argument("output", type=Path, help="where the checkpoint goes")
    options = parser.parse_args(argv)
    make_checkpoint(options.code, options.output)
    print(options.output)
    return 0


def make_checkpoint(code: Path, output: Path, seed: int = 0) -> None:
    """Write a checkpoint folder around the code in `code`."""
    output.mkdir(parents=True, exist_ok=True)
    for path in code.glob("*.py"):
        if path.stat().st_size:
            shutil.copy2(path, output)
    given = vendors_settings(code / "config.json")
    if (code / "modeling_baichuan.py").is_file():
        files = baichuan2(alibi="alibi" in (code / "modeling_baichuan.py").read_text(encoding="utf-8"))
    elif "position_encoding_2d" in (code / "configuration_chatglm.py").read_text(encoding="utf-8"):
        files = glm1(given.get("vocab_size", 130_528))
    else:
        files = glm2(roles="<|assistant|>" in (code / "tokenization_chatglm.py").read_text(encoding="utf-8"))
    vocabulary_name, pieces, config, tokenizer, generation, shapes = files
    write_sentencepiece(output / vocabulary_name, pieces)
    if given:
        kept = {key: value for key, value in given.items() if key not in QUANTIZED}
        config = kept | {key: config[key] for key in SIZES if key in config}
    contents = {
        "config": config,
        "tokenizer_config": vendors_settings(code / "tokenizer_config.json") or tokenizer,
        "generation_config": vendors_settings(code / "generation_config.json") or generation,
    }
    for name, content in contents.items():
        if not content:
            continue
        (output / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    write_weights(output, shapes, seed)


def vendors_settings(path: Path) -> Settings:
    """What a .json file of the vendor says; empty where there is none."""
    found: Settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def texts() -> list[str]:
    """What the sentencepiece model is trained on: the demo's conversations."""
    lines = (ROOT / "train" / "demo_data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [message["content"] for line in lines for message in json.loads(line)["messages"]]


def trained_pieces() -> list[tuple[str, float]]:
    """Pieces with their scores, of a small byte-pair model; without bytes and special tokens."""
    import sentencepiece as spm
    from sentencepiece import sentencepiece_model_pb2 as proto

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "texts.txt"
        source.write_text("\n".join(line for text in texts() for line in text.splitlines() if line), encoding="utf-8")
        spm.SentencePieceTrainer.train(
            input=str(source), model_prefix=f"{folder}/model", vocab_size=1500, model_type="bpe", byte_fallback=True,
            character_coverage=0.9999, minloglevel=2, num_threads=1, hard_vocab_limit=False,
        )  # fmt: skip
        model = proto.ModelProto.FromString((Path(folder) / "model.model").read_bytes())
    return [(piece.piece, piece.score) for piece in model.pieces if piece.type == NORMAL]


def write_sentencepiece(path: Path, pieces: list[tuple[str, float, int]]) -> None:
    """Write a byte-pair model with exactly these pieces in this order."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = any(kind == BYTE for _, _, kind in pieces)
    model.trainer_spec.unk_id, model.trainer_spec.bos_id = (place(pieces, name) for name in ("<unk>", "<s>"))
    model.trainer_spec.eos_id, model.trainer_spec.pad_id = place(pieces, "</s>"), -1
    model.trainer_spec.vocab_size = len(pieces)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    path.write_bytes(model.SerializeToString())


def place(pieces: list[tuple[str, float, int]], name: str) -> int:
    """The id of a piece."""
    return next(i for i, piece in enumerate(pieces) if piece[0] == name)


def filled(head: list[tuple[str, float, int]], size: int) -> list[tuple[str, float, int]]:
    """`head` and the trained pieces, then unused ones up to `size`."""
    pieces = head + [(text, score, NORMAL) for text, score in trained_pieces() if text not in {h[0] for h in head}]
    return pieces + [(f"<filler_{i}>", -1e6, UNUSED) for i in range(len(pieces), size)]


def byte_pieces() -> list[tuple[str, float, int]]:
    """The 256 bytes that any text falls back to."""
    return [(f"<0x{i:02X}>", 0.0, BYTE) for i in range(256)]


def glm1(rows: int) -> tuple[Any, ...]:
    """ChatGLM-6B: 130,344 pieces in ice_text.model, special tokens from 130,000 on.

    `rows` of the embedding: 130,528, or 150,528 where 20,000 ids of images come before those of the vocabulary.
    """
    head = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<pad>", 0.0, CONTROL),
            ("<n>", 0.0, USER_DEFINED), ("<|tab|>", 0.0, USER_DEFINED)]  # fmt: skip
    head += [(f"<|blank_{i}|>", 0.0, USER_DEFINED) for i in range(2, 81)] + byte_pieces()
    pieces = filled(head, 130_344)
    special = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    for i, name in enumerate(special):
        pieces[130_000 + i] = (name, 0.0, USER_DEFINED)
    config = {
        "architectures": ["ChatGLMModel"], "auto_map": GLM_AUTO, "model_type": "chatglm", "bos_token_id": 130_004,
        "eos_token_id": 130_005, "mask_token_id": 130_000, "gmask_token_id": 130_001, "pad_token_id": 3,
        "hidden_size": HIDDEN, "inner_hidden_size": INNER, "layernorm_epsilon": 1e-5, "max_sequence_length": 2048,
        "num_attention_heads": HEADS, "num_layers": LAYERS, "position_encoding_2d": True, "torch_dtype": "float16",
        "transformers_version": "4.23.1", "use_cache": True, "vocab_size": rows,
    }  # fmt: skip
    tokenizer = {
        "name_or_path": "chatglm-6b", "bos_token": "<sop>", "eos_token": "<eop>", "end_token": "</s>",
        "gmask_token": "[gMASK]", "mask_token": "[MASK]", "pad_token": "<pad>", "unk_token": "<unk>",
        "remove_space": False, "do_lower_case": False, "tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 0,
        "auto_map": GLM_TOKENIZER,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.word_embeddings.weight": (rows, HIDDEN), "lm_head.weight": (0,),
        "transformer.final_layernorm.weight": (HIDDEN,), "transformer.final_layernorm.bias": (HIDDEN,),
    }  # fmt: skip
    for i in range(LAYERS):
        layer = f"transformer.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{layer}.{norm}.weight": (HIDDEN,), f"{layer}.{norm}.bias": (HIDDEN,)}
        shapes |= with_bias(f"{layer}.attention.query_key_value", 3 * HIDDEN, HIDDEN)
        shapes |= with_bias(f"{layer}.attention.dense", HIDDEN, HIDDEN)
        shapes |= with_bias(f"{layer}.mlp.dense_h_to_4h", INNER, HIDDEN)
        shapes |= with_bias(f"{layer}.mlp.dense_4h_to_h", HIDDEN, INNER)
        shapes[f"{layer}.attention.rotary_emb.inv_freq"] = (HIDDEN // HEADS // 4, 0)
    return "ice_text.model", pieces, config, tokenizer, {}, shapes


def with_bias(name: str, out: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a linear layer with a bias."""
    return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}


def glm2(roles: bool) -> tuple[Any, ...]:
    """ChatGLM2 and 3: 64,789 pieces in tokenizer.model, special tokens added behind them by the tokenizer."""
    head = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), *byte_pieces()]
    channels, groups = HIDDEN // HEADS, 2
    config = {
        "architectures": ["ChatGLMModel"], "model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True,
        "auto_map": GLM_AUTO | {"AutoModelForCausalLM": GLM_AUTO["AutoModel"]}, "attention_dropout": 0.0,
        "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "ffn_hidden_size": INNER,
        "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": HIDDEN, "kv_channels": channels,
        "layernorm_epsilon": 1e-5, "multi_query_attention": True, "multi_query_group_num": groups,
        "num_attention_heads": HEADS, "num_layers": LAYERS, "original_rope": True, "padded_vocab_size": 65_024,
        "post_layer_norm": True, "rmsnorm": True, "seq_length": 8192 if roles else 32_768, "use_cache": True,
        "torch_dtype": "float16", "transformers_version": "4.30.2", "tie_word_embeddings": False, "eos_token_id": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    tokenizer = {
        "name_or_path": "chatglm", "remove_space": False, "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer", "auto_map": GLM_TOKENIZER,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (65_024, HIDDEN),
        "transformer.rotary_pos_emb.inv_freq": (channels // 4, 0),
        "transformer.encoder.final_layernorm.weight": (HIDDEN,), "transformer.output_layer.weight": (65_024, HIDDEN),
    }  # fmt: skip
    for i in range(LAYERS):
        layer = f"transformer.encoder.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (HIDDEN,)
        shapes |= with_bias(f"{layer}.self_attention.query_key_value", HIDDEN + 2 * groups * channels, HIDDEN)
        shapes[f"{layer}.self_attention.dense.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{layer}.mlp.dense_h_to_4h.weight"] = (2 * INNER, HIDDEN)
        shapes[f"{layer}.mlp.dense_4h_to_h.weight"] = (HIDDEN, INNER)
    return "tokenizer.model", filled(head, 64_789), config, tokenizer, {}, shapes


def baichuan2(alibi: bool) -> tuple[Any, ...]:
    """Baichuan2-13B, or 7B, which has rotary positions in the place of ALiBi: 125,696 pieces, roles 195 and 196."""
    head = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    head += [(f"<filler_{i}>", -1e6, UNUSED) for i in range(3, 90)]
    head += [(f"<reserved_{i - 89}>", 0.0, USER_DEFINED) for i in range(90, 346)] + byte_pieces()
    config = {
        "architectures": ["BaichuanForCausalLM"], "tokenizer_class": "BaichuanTokenizer", "bos_token_id": 1,
        "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig",
                     "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
        "eos_token_id": 2, "gradient_checkpointing": False, "hidden_act": "silu", "hidden_size": HIDDEN,
        "initializer_range": 0.02, "intermediate_size": INNER, "model_max_length": 4096, "model_type": "baichuan",
        "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "pad_token_id": 0, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.29.2", "use_cache": True,
        "vocab_size": 125_696,
    }  # fmt: skip
    if not alibi:
        config["max_position_embeddings"] = 4096
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": True}
    tokenizer = {
        "add_bos_token": False, "add_eos_token": False, "bos_token": token | {"content": "<s>"},
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
        "clean_up_tokenization_spaces": False, "eos_token": token | {"content": "</s>"}, "model_max_length": 4096,
        "pad_token": token | {"content": "<unk>"}, "sp_model_kwargs": {}, "tokenizer_class": "BaichuanTokenizer",
        "unk_token": token | {"content": "<unk>"},
    }  # fmt: skip
    generation = {
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "user_token_id": 195, "assistant_token_id": 196,
        "max_new_tokens": 2048, "temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05,
        "do_sample": True, "transformers_version": "4.29.2",
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (125_696, HIDDEN), "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (125_696, HIDDEN),
    }  # fmt: skip
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (HIDDEN,)
        shapes[f"{layer}.self_attn.W_pack.weight"] = (3 * HIDDEN, HIDDEN)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
    return "tokenizer.model", filled(head, 125_696), config, tokenizer, generation, shapes


def write_weights(output: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """Random weights in two .bin shards with an index, as the vendors ship them.

    A shape (n, 0) is a rotary inv_freq of n values, a shape (0,) a head tied to the embedding.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    tied = shapes.get("lm_head.weight") == (0,)
    for name, shape in shapes.items():
        if shape == (0,):
            continue
        if len(shape) == 2 and shape[1] == 0:
            weights[name] = (1.0 / (10000 ** (torch.arange(0, 2 * shape[0], 2).float() / (2 * shape[0])))).half()
        elif "norm" in name and name.endswith("weight"):
            weights[name] = 1 + 0.1 * torch.randn(shape, generator=generator)
        elif name.endswith("bias"):
            weights[name] = 0.1 * torch.randn(shape, generator=generator)
        else:
            # ChatGLM-6B scales its residual up and ties its head: small layers would repeat the last token for ever
            large = "query_key_value" in name or "W_pack" in name or tied
            weights[name] = (0.5 if large and name not in EMBEDDINGS else 0.12) * torch.randn(
                shape, generator=generator
            )
    if tied:
        weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"]
    names = list(weights)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    index: dict[str, Any] = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": {}}
    for i, part in enumerate(parts, start=1):
        file = f"pytorch_model-{i:05d}-of-{len(parts):05d}.bin"
        torch.save({name: weights[name].clone() for name in part}, output / file)
        index["weight_map"] |= dict.fromkeys(part, file)
    (output / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
