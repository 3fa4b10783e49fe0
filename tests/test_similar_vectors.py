"""Similar questions: vectors are those of plain transformers, the search is a double loop."""

import json
from pathlib import Path

import numpy as np
import pytest
from embedding_model import TEXTS, write_embedding_model

from eval.similar import search
from llmops.embedding import encoder
from llmops.embedding.folder import read_folder

POOLINGS = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@pytest.mark.parametrize("threshold", [0.95, 0.6, 0.0, 1.0])
@pytest.mark.parametrize("product", ["FloatProduct", "ByteProduct"])
def test_the_search_is_exact(monkeypatch: pytest.MonkeyPatch, product: str, threshold: float) -> None:
    """Several blocks, near and equal vectors, a component that dwarfs the others; both products, one double loop."""
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((30, 48))
    vectors = centres[draw.integers(0, 30, 300)] + 0.4 * draw.standard_normal((300, 48))
    vectors[:, 0] += 4
    vectors[200:220] = vectors[:20]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    groups = np.sort(draw.integers(-1, 4, 300))
    monkeypatch.setattr(search, "ROWS", 32)
    monkeypatch.setattr(search, "COLUMNS", 64)
    made = getattr(search, product)
    monkeypatch.setattr(search, "choose_product", lambda vectors, threshold, device: made(vectors, threshold))
    found = search.similar_pairs(vectors, threshold, groups, 10**6)
    wanted = []
    for i in range(300):
        for j in range(i + 1, 300):
            a, b = vectors[i].astype(float), vectors[j].astype(float)
            cosine = round(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))), 9)
            if cosine >= threshold and (groups[i] != groups[j] or groups[i] < 0):
                wanted.append((i, j, cosine))
    assert [pair[:2] for pair in wanted] == list(zip(found.i.tolist(), found.j.tolist(), strict=True))
    assert np.allclose(found.cosine, [pair[2] for pair in wanted], atol=2e-9)
    assert wanted


def test_bytes_propose_little_and_lose_nothing() -> None:
    """The int8 margin is a bound, not a guess: no rounding error is larger, and it is small enough to be of use."""
    draw = np.random.default_rng(1)
    vectors = draw.standard_normal((400, 384)).astype(np.float32)
    vectors[200:] = vectors[:200] + 0.4 * draw.standard_normal((200, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    product = search.ByteProduct(vectors, 0.9)
    exact = vectors.astype(float) @ vectors.astype(float).T
    rounded = product.rows.numpy().astype(float) * product.step
    assert (np.abs(exact - rounded @ rounded.T) <= product.error[:, None] + product.error * 1.02 + 1e-4).all()
    assert product.error.max() < 0.02
    i, j = product.propose(slice(0, 400), slice(0, 400))
    proposed = set(zip(i.tolist(), j.tolist(), strict=True))
    assert {tuple(pair) for pair in np.argwhere(exact >= 0.9).tolist()} <= proposed
    assert all(exact[pair] > 0.9 - 0.045 for pair in proposed)


@pytest.mark.parametrize(
    ("pooling", "dense"), [("", ""), *((name, "") for name in POOLINGS), ("mean", "Tanh"), ("cls", "Identity")]
)
def test_vectors_are_those_of_one_text_at_a_time(tmp_path: Path, pooling: str, dense: str) -> None:
    """Against plain transformers without batches and padding, pooled in float64 by the definitions."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    folder = write_embedding_model(tmp_path / "model", pooling, dense)
    made = encoder.Encoder(read_folder(folder), "cpu", "fp32", False)
    made.tokens_per_batch = 40
    found = made.encode(TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModel.from_pretrained(folder).eval()
    for text, vector in zip(TEXTS, found, strict=True):
        ids = tokenizer(text, truncation=True, max_length=24 if pooling else 64, return_tensors="pt")
        with torch.no_grad():
            hidden = plain(**ids).last_hidden_state[0].double().numpy()
        weights = np.arange(1, len(hidden) + 1)[:, None]
        wanted = {
            "": hidden.mean(0), "mean": hidden.mean(0), "cls": hidden[0], "max": hidden.max(0), "lasttoken": hidden[-1],
            "mean_sqrt_len_tokens": hidden.sum(0), "weightedmean": (hidden * weights).sum(0) / weights.sum(),
        }[pooling]  # fmt: skip
        if pooling == "mean_sqrt_len_tokens":
            wanted = wanted / len(hidden) ** 0.5
        if dense:
            layer = load_file(folder / "2_Dense" / "model.safetensors")
            wanted = layer["linear.weight"].double().numpy() @ wanted + layer["linear.bias"].double().numpy()
            wanted = np.tanh(wanted) if dense == "Tanh" else wanted
        assert np.abs(vector - wanted / np.linalg.norm(wanted)).max() < 1e-5


def test_vectors_are_sentence_transformers(tmp_path: Path) -> None:
    """Also those of several poolings, with a prompt that is left out of them, and of cut vectors."""
    import sentence_transformers as library

    cases = [(name, "", {}) for name in POOLINGS] + [("mean", "Tanh", {}), ("", "", {})]
    cases += [("cls", "", {"pooling_mode": ["cls", "max"], "include_prompt": False})]
    for number, (pooling, dense, more) in enumerate(cases):
        folder = write_embedding_model(tmp_path / f"model{number}", pooling, dense)
        if more:
            settings = {"word_embedding_dimension": 32} | more
            (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
            general = {"prompts": {"q": "怎么 "}, "default_prompt_name": "q", "truncate_dim": 24}
            (folder / "config_sentence_transformers.json").write_text(json.dumps(general))
        wanted = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, normalize_embeddings=True)
        made = encoder.Encoder(read_folder(folder), "cpu", "fp32", False)
        made.tokens_per_batch = 60
        found = made.encode(TEXTS)
        assert found.shape == wanted.shape == (len(TEXTS), 24 if more else 20 if dense else 32)
        assert np.abs(found - wanted).max() < 1e-5, pooling
