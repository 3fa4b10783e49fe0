"""Findings gathered by pair of intents, for people: how many, how similar, and what to do about them."""

from collections import Counter, defaultdict
from dataclasses import dataclass

from eval.similar.findings import Findings

CLEAR = 2  # pairs that one question must be in before it is named as the one to relabel


@dataclass(frozen=True)
class Group:
    """Two intents (rows of `questions.intents`) and the findings between them, the most similar first."""

    intents: tuple[int, int]
    rows: list[int]
    merge: bool
    intent_cosine: float


def gather(found: Findings) -> list[Group]:
    """Groups, those with the most pairs first."""
    rows: dict[tuple[int, int], list[int]] = defaultdict(list)
    for k, pair in enumerate(zip(found.intent_a.tolist(), found.intent_b.tolist(), strict=True)):
        rows[min(pair), max(pair)].append(k)
    groups = [Group(pair, of, bool(found.merge[of[0]]), float(found.intent_cosine[of[0]])) for pair, of in rows.items()]
    return sorted(groups, key=lambda group: (-len(group.rows), group.rows[0]))


def suggestion(found: Findings, group: Group) -> str:
    """What to do about a group, in Chinese."""
    names = [found.questions.intents[intent] for intent in group.intents]
    if group.merge:
        return f"两个意图的名称也很相似，很可能是同一个意图：建议合并为一个（「{names[0]}」或「{names[1]}」）。"
    same = sum(found.text_of[found.a[k]] == found.text_of[found.b[k]] for k in group.rows)
    if same == len(group.rows):
        return "同一个问题标了两个意图：建议只保留正确的一个。"
    seen: Counter[tuple[int, int]] = Counter()
    for k in group.rows:
        seen[int(found.text_of[found.a[k]]), int(found.intent_a[k])] += 1
        seen[int(found.text_of[found.b[k]]), int(found.intent_b[k])] += 1
    (best, most), *rest = seen.most_common(2)
    second = rest[0][1] if rest else 0
    if most >= CLEAR and most > second:
        other = names[1] if best[1] == group.intents[0] else names[0]
        text = found.questions.texts[best[0]]
        return f"「{text}」与「{other}」的 {most} 个问题相似：建议先核对它，可能应改标为「{other}」。"
    if len(group.rows) >= 2 * CLEAR:
        return "两个意图的多个问题互相相似：建议核对两者的界线，确实同义就合并，否则改写或改标这些问题。"
    return "其中一个问题很可能标错了意图：建议核对后改标。"
