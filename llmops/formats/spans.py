"""Which tokens of a text overlap some of its characters.

Byte-level tokenizers (GPT-2's kind: Qwen, Llama 3, GLM-4, DeepSeek) write every byte of a text into exactly one token,
so the places of tokens follow from their lengths; asking the tokenizer for them costs as much again as the tokens.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

Span = tuple[int, int]  # first character, the one after the last


class SpanEncoder:
    """Encodes with a fast tokenizer's own backend, whose truncation and padding are off."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.bytes = token_bytes(backend)

    def encode(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """(ids, whether each token overlaps one of the spans, which are in order and apart)."""
        if self.bytes is not None:
            ids = self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
            ends = self.bytes[ids].cumsum()
            if len(ids) and ends[-1] == len(text.encode()):  # else a normalizer or a blank that a token takes along
                return ids, overlapping(np.concatenate([[0], ends[:-1]]), ends, in_bytes(text, spans))
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, self.marked(encoding.offsets, spans)

    @staticmethod
    def marked(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
        """Whether each token, from (start, end) in characters, overlaps one of the spans."""
        places = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2)
        return overlapping(places[:, 0], places[:, 1], spans)


def token_bytes(backend: Any) -> np.ndarray | None:
    """How many bytes of a text each token stands for, int64 [largest id + 1]; None where they are not such tokens."""
    from tokenizers import decoders

    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    vocabulary, added = backend.get_vocab(with_added_tokens=True), backend.get_added_tokens_decoder()
    found = np.zeros(max(vocabulary.values(), default=-1) + 1, np.int64)
    for token, i in vocabulary.items():
        found[i] = len(token.encode()) if i in added else len(token)  # a character for each byte
    return found


def in_bytes(text: str, spans: Sequence[Span]) -> list[Span]:
    """Spans of characters as spans of the text's bytes."""
    if text.isascii():
        return list(spans)
    found, place, before = [], 0, 0
    for span in spans:
        ends = []
        for end in span:
            before += len(text[place:end].encode())
            place = end
            ends.append(before)
        found.append((ends[0], ends[1]))
    return found


def overlapping(starts: np.ndarray, ends: np.ndarray, spans: Sequence[Span]) -> list[bool]:
    """Whether each of [starts, ends), both [tokens], overlaps one of the spans, which are in order and apart."""
    if not spans:
        return [False] * len(starts)
    begin, end = np.asarray(spans).T
    first = np.searchsorted(end, starts, side="right")  # the first span that ends after the token begins
    return ((first < len(end)) & (ends > begin[np.minimum(first, len(end) - 1)])).tolist()
