"""A tiny embedding model for tests: random, plain or in sentence-transformers' layout."""

import json
from pathlib import Path

from conftest import ROOT

SAMPLE = ROOT / "eval" / "eval_datasets" / "faq_similar" / "combine_data.json"
TEXTS = [
    "怎么修改登录密码",
    "How do I reset my PIN?",
    "退款",
    "我的快递 到哪里了",
    "a",
    "长" * 200,
    "我要申请退款，多久到账",
]
KEY_OF = {
    "mean": ("pooling_mode_mean_tokens",), "cls": ("pooling_mode_cls_token",), "max": ("pooling_mode_max_tokens",),
    "mean_sqrt_len_tokens": ("pooling_mode_mean_sqrt_len_tokens",), "lasttoken": ("pooling_mode_lasttoken",),
    "weightedmean": ("pooling_mode_weightedmean_tokens",),
}  # fmt: skip


def write_embedding_model(folder: Path, pooling: str = "", dense: str = "", seed: int = 0) -> Path:
    """A random two-layer BERT of width 32; with `pooling` in sentence-transformers' layout, else plain."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator([*TEXTS, SAMPLE.read_text(encoding="utf-8")], vocab_size=600, show_progress=False)
    tokenizer = BertTokenizerFast(tokenizer_object=trained._tokenizer, model_max_length=64)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=96, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    if not pooling:
        return folder
    modules = ["Transformer", "Pooling", *(["Dense"] if dense else []), "Normalize"]
    listed = [
        {"idx": k, "name": str(k), "path": f"{k}_{kind}" if k else "", "type": f"sentence_transformers.models.{kind}"}
        for k, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24, "do_lower_case": false}')
    for entry in listed[1:]:
        (folder / entry["path"]).mkdir()
    settings = {"word_embedding_dimension": 32} | {
        key: key in KEY_OF[pooling] for keys in KEY_OF.values() for key in keys
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    if dense:
        settings = {"in_features": 32, "out_features": 20, "bias": True, "activation_function": f"torch.nn.{dense}"}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(settings))
        weights = {"linear.weight": torch.randn(20, 32), "linear.bias": torch.randn(20)}
        save_file(weights, folder / "2_Dense" / "model.safetensors")
    return folder
