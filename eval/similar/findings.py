"""From similar texts to findings: which questions, which intents, in which of the two lists, in which order."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.similar.questions import Questions
from eval.similar.search import Pairs, cosines, norms_of
from llmops import json_text
from llmops.console import UserError

if TYPE_CHECKING:
    import numpy as np

# Vectors that are computed again in other company (a cache that was lost, another batch size) differ in their last
# bits, about 1e-7: cosines that agree to this many decimals rank by their place in the file, the same in every run.
COSINE_DECIMALS = 4


@dataclass(frozen=True)
class Findings:
    """Pairs of questions (rows of `questions`, the earlier one of the file first), the most similar first.

    `merge`: the intents' texts are similar, too. `intent_a`, `intent_b`: rows of `questions.intents`.
    """

    questions: Questions
    a: "np.ndarray"
    b: "np.ndarray"
    cosine: "np.ndarray"
    intent_a: "np.ndarray"
    intent_b: "np.ndarray"
    intent_cosine: "np.ndarray"
    merge: "np.ndarray"
    text_of: "np.ndarray"


def cross(
    first: "np.ndarray", count: "np.ndarray", other_first: "np.ndarray", other_count: "np.ndarray"
) -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
    """Every combination of two ranges, for many pairs of ranges: (which pair of ranges, left, right)."""
    import numpy as np

    sizes = count * other_count
    which = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(which)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return which, first[which] + place // other_count[which], other_first[which] + place % other_count[which]


def find(
    questions: Questions, pairs: Pairs, intent_vectors: "np.ndarray", intent_threshold: float, max_pairs: int
) -> Findings:
    """The findings of similar texts; a text that stands under several intents is similar to itself."""
    import numpy as np

    q = questions
    double = np.nonzero(q.node_count > 1)[0]
    u, v = np.concatenate([pairs.i, double]).astype(int), np.concatenate([pairs.j, double]).astype(int)
    cosine = np.concatenate([pairs.cosine, np.ones(len(double))])
    which, left, right = cross(q.node_start[u], q.node_count[u], q.node_start[v], q.node_count[v])
    differ = (q.node_intent[left] != q.node_intent[right]) & ((u[which] != v[which]) | (left < right))
    which, left, right = which[differ], left[differ], right[differ]
    total = int((q.count[left] * q.count[right]).sum())
    if total > max_pairs:
        raise UserError(
            f"{total} pairs of questions with different intents reach the threshold (texts that occur many times), "
            f"more than --max_pairs {max_pairs}; remove repeated questions or raise --max_pairs"
        )
    node, a, b = cross(q.first[left], q.count[left], q.first[right], q.count[right])
    cosine = cosine[which][node]
    intent_a, intent_b = q.node_intent[left][node], q.node_intent[right][node]
    swapped = q.order[a] > q.order[b]
    a, b = np.where(swapped, b, a), np.where(swapped, a, b)
    intent_a, intent_b = np.where(swapped, intent_b, intent_a), np.where(swapped, intent_a, intent_b)
    between = intent_cosines(intent_vectors, intent_a, intent_b)
    order = np.lexsort((q.order[b], q.order[a], -np.round(cosine, COSINE_DECIMALS)))
    text_of = np.repeat(q.node_text, q.count)
    a, b, cosine, intent_a, intent_b, between = (x[order] for x in (a, b, cosine, intent_a, intent_b, between))
    return Findings(q, a, b, cosine, intent_a, intent_b, between, between >= intent_threshold, text_of)


def intent_cosines(vectors: "np.ndarray", a: "np.ndarray", b: "np.ndarray") -> "np.ndarray":
    """Cosine of the intents of every finding; computed once per pair of intents."""
    import numpy as np

    keys, back = np.unique(np.minimum(a, b) * len(vectors) + np.maximum(a, b), return_inverse=True)
    return cosines(vectors, norms_of(vectors), keys // len(vectors), keys % len(vectors))[back]


def row(found: Findings, k: int) -> dict[str, Any]:
    """Finding `k` in full, in the words of the JSON."""
    q = found.questions
    first, second = (q.records[q.record[side[k]]] for side in (found.a, found.b))
    return {
        "questionPair": [q.texts[found.text_of[found.a[k]]], q.texts[found.text_of[found.b[k]]]],
        "intent1": first.intent, "intent2": second.intent, "answer1": first.reply, "answer2": second.reply,
        "lineNumbers": [first.index, second.index],
    }  # fmt: skip


def mismatched(found: Findings) -> Iterator[dict[str, Any]]:
    """Similar questions under intents that are not: one of the two is probably mislabelled."""
    return (row(found, int(k)) for k in (~found.merge).nonzero()[0])


def similar(found: Findings) -> Iterator[dict[str, Any]]:
    """Similar questions under similar intents, which probably mean the same."""
    for k in found.merge.nonzero()[0]:
        full = row(found, int(k))
        yield {"intentPair": [full["intent1"], full["intent2"]], "lineNumbers": full["lineNumbers"]}


def json_parts(found: Findings) -> Iterator[str]:
    """The documented JSON object in parts, so that millions of pairs need no second copy."""
    yield '{"code": 0, "msg": "Success", "data": {"mismatched_intents": ['
    for k, entry in enumerate(mismatched(found)):
        yield (", " if k else "") + json_text.dumps(entry)
    yield '], "similar_intents": ['
    for k, entry in enumerate(similar(found)):
        yield (", " if k else "") + json_text.dumps(entry)
    yield "]}}\n"
