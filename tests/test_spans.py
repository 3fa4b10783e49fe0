"""Which tokens of a text overlap an answer: by the bytes of byte-level tokens, and by offsets where that cannot be."""

import random
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmops.formats.spans import SpanEncoder, token_bytes

TEXTS = (
    "<|im_start|>user\n索书号怎么查？<|im_end|>\n<|im_start|>assistant\n在大厅检索机或官网输入书名。 <|im_end|>\n",
    "  two  blanks,\ttab\r\n\n\n🙂👩‍👩‍👧 ﷽ e\u0301 café naïve ２０２４年 \u00a0\u3000 end ",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # 注释\n",
)


def byte_level(*more: AddedToken, normalizer: Any = None) -> Tokenizer:
    """A small byte-level tokenizer."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(TEXTS * 3, trainer)
    made.add_special_tokens(["<|im_start|>", AddedToken("<|im_end|>", special=True), *more])
    return made


def spans_of(text: str, seed: int) -> list[tuple[int, int]]:
    """Spans in order and apart, not empty."""
    edges = sorted(random.Random(seed).sample(range(len(text) + 1), 6))
    return list(pairwise(edges))[::2]


def by_hand(backend: Tokenizer, text: str, ids: list[int], spans: list[tuple[int, int]]) -> list[bool]:
    """Each token's bytes, counted one after the other, held against the bytes of the spans' characters."""
    wanted = {
        len(text[:k].encode()) + byte for a, b in spans for k in range(a, b) for byte in range(len(text[k].encode()))
    }
    found, place = [], 0
    added = backend.get_added_tokens_decoder()
    for i in ids:
        size = len(added[i].content.encode()) if i in added else len(backend.id_to_token(i))
        found.append(bool(wanted & set(range(place, place + size))))
        place += size
    assert place == len(text.encode())
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_of_bytes(text: str) -> None:
    backend = byte_level()
    encoder = SpanEncoder(backend)
    for seed in range(40):
        spans = spans_of(text, seed)
        ids, learned = encoder.encode(text, spans)
        assert ids == backend.encode(text, add_special_tokens=False).ids
        assert learned == by_hand(backend, text, ids, spans)
        assert any(learned)
        assert not all(learned)


def test_nothing_to_learn_and_no_text() -> None:
    encoder = SpanEncoder(byte_level())
    assert encoder.encode("", []) == ([], [])
    ids, learned = encoder.encode("检索", [])
    assert learned == [False] * len(ids)
    assert encoder.encode("检索", [(2, 2)])[1] == [False] * len(ids)


@pytest.mark.parametrize(
    ("more", "normalizer"),
    [
        ([], normalizers.NFC()),  # e and its accent become one character, of fewer bytes
        ([AddedToken("naïve", lstrip=True, rstrip=True)], None),  # a token that takes the blanks around it along
    ],
)
def test_where_tokens_do_not_hold_the_texts_bytes_their_offsets_count(more: list[AddedToken], normalizer: Any) -> None:
    backend = byte_level(*more, normalizer=normalizer)
    encoder, text = SpanEncoder(backend), TEXTS[1]
    for seed in range(40):
        spans = spans_of(text, seed)
        encoding = backend.encode(text, add_special_tokens=False)
        expected = [any(start < b and end > a for a, b in spans) for start, end in encoding.offsets]
        assert encoder.encode(text, spans) == (encoding.ids, expected)


def test_other_kinds_of_tokens_have_no_bytes() -> None:
    other = Tokenizer(models.Unigram())
    other.decoder = decoders.Metaspace()
    assert token_bytes(other) is None
    assert token_bytes(Tokenizer(models.BPE())) is None
    sizes = token_bytes(backend := byte_level())
    assert sizes is not None
    assert sizes[backend.token_to_id("<|im_end|>")] == len("<|im_end|>")
