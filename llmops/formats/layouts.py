"""Formats whose role tokens must be inserted by id: functions that lay out messages as pieces.

Sources of the formats: the vendors' own demos and fine-tuning code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmops.conversations.records import Message


@dataclass(frozen=True)
class Piece:
    """A run of text or, where it says so, one token by its name or id, in a format that is laid out by id."""

    content: str | int
    learned: bool = False
    control: bool = False


Layout = Callable[[Sequence[Message], bool], list[Piece]]


def control(token: str | int, learned: bool = False) -> Piece:
    """A control token of the format."""
    return Piece(token, learned, control=True)


def glm_layout(messages: Sequence[Message], generate: bool) -> list[Piece]:
    """ChatGLM-6B: `[Round i]\\n问：q\\n答：` as text, [gMASK] sop, the answer, eop. Only the last answer is learned."""
    system, turns = split_system(messages)
    rounds = [turns[i : i + 2] for i in range(0, len(turns), 2)]
    history = "".join(
        f"[Round {i}]\n问：{q['content']}\n答：{a['content']}\n" for i, (q, a) in enumerate(full(rounds[:-1]))
    )
    question = rounds[-1][0]["content"]
    # the vendor's chat API sends a single question bare and numbers rounds from 0
    prompt = f"{history}[Round {len(rounds) - 1}]\n问：{question}\n答：" if history else question
    pieces = [Piece(system + prompt), control("[gMASK]"), control("<sop>")]
    if not generate:
        pieces += [Piece(rounds[-1][1]["content"], True), control("<eop>", True)]
    return pieces


def glm2_layout(messages: Sequence[Message], generate: bool) -> list[Piece]:
    """ChatGLM2: `[gMASK]sop[Round i]\\n\\n问：q\\n\\n答：a</s>`, blank lines between rounds; the end token by id."""
    system, turns = split_system(messages)
    pieces = [control("[gMASK]"), control("sop")]
    for i in range(0, len(turns), 2):
        lead = system if i == 0 else "\n\n"
        pieces.append(Piece(f"{lead}[Round {i // 2 + 1}]\n\n问：{turns[i]['content']}\n\n答："))
        if i + 1 < len(turns):
            learned = is_learned(turns[i + 1])
            pieces += [Piece(turns[i + 1]["content"], learned), control("</s>", learned)]
    return pieces


def glm3_layout(messages: Sequence[Message], generate: bool) -> list[Piece]:
    """ChatGLM3: role tokens by id, `\\n ` and the text encoded apart.

    An answer ends with the next `<|user|>`, the last with eos.
    """
    pieces = [control("[gMASK]"), control("sop")]
    for i, message in enumerate(messages):
        answer = is_learned(message)
        after_answer = i > 0 and is_learned(messages[i - 1])
        pieces += [
            control(f"<|{message['role']}|>", after_answer),
            Piece("\n", answer),
            Piece(message["content"], answer),
        ]
    pieces.append(control("<|assistant|>") if generate else control("</s>", is_learned(messages[-1])))
    return pieces


def baichuan2_layout(messages: Sequence[Message], generate: bool) -> list[Piece]:
    """Baichuan2: system as a raw prefix, `<reserved_106>` (195) q `<reserved_107>` (196) a, eos after every answer."""
    system, turns = split_system(messages)
    pieces = [Piece(system)] if system else []
    for message in turns:
        if message["role"] == "user":
            pieces += [control(195), Piece(message["content"])]
        else:
            learned = is_learned(message)
            pieces += [control(196), Piece(message["content"], learned), control("</s>", learned)]
    return pieces + ([control(196)] if generate else [])


def is_learned(message: Message) -> bool:
    """Whether a message is an answer that is learned; `learned` says where an answer is not."""
    return message["role"] == "assistant" and message.get("learned", True)


def split_system(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """(system text or "", the turns after it)."""
    if messages[0]["role"] == "system":
        return messages[0]["content"], list(messages[1:])
    return "", list(messages)


def full(rounds: list[list[Message]]) -> list[tuple[Message, Message]]:
    """Rounds as (question, answer) pairs; all of them are complete."""
    return [(r[0], r[1]) for r in rounds]


LAYOUTS: dict[str, Layout] = {
    "glm": glm_layout,
    "glm2": glm2_layout,
    "glm3": glm3_layout,
    "baichuan2": baichuan2_layout,
}
# what the layouts insert by id
OWN_TOKENS: dict[str, tuple[str | int, ...]] = {
    "glm": ("[gMASK]", "<sop>", "<eop>"),
    "glm2": ("[gMASK]", "sop", "</s>"),
    "glm3": ("[gMASK]", "sop", "</s>", "<|system|>", "<|user|>", "<|assistant|>"),
    "baichuan2": (195, 196, "</s>"),
}
