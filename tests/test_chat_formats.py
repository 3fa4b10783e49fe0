"""Rendering: learned tokens are exactly the answers and their end tokens; formats equal the published ones."""

from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from transformers import AutoTokenizer

from llmops import tiny
from llmops.chat_formats import FAMILIES, ChatFormat, Rendered, choose_family
from llmops.console import UserError

MULTI = [
    {"role": "system", "content": "请简短回答。"},
    {"role": "user", "content": "怎么续借？"},
    {"role": "assistant", "content": " 点“续借”即可，不用到馆。"},
    {"role": "user", "content": "逾期呢"},
    {"role": "assistant", "content": "每天0.1元\n上限10元"},
]


def learned_runs(tokenizer: object, sample: Rendered) -> list[str]:
    """Decoded runs of learned tokens."""
    edges = [0, *(np.flatnonzero(np.diff(np.asarray(sample.learned, np.int8))) + 1).tolist(), len(sample.ids)]
    return [tokenizer.decode(sample.ids[a:b]) for a, b in pairwise(edges) if sample.learned[a]]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_learned_tokens_are_the_answers_and_end_tokens(checkpoints: dict[str, Path], architecture: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[architecture])
    (sample,) = ChatFormat(tokenizer).conversation(MULTI)
    assert learned_runs(tokenizer, sample) == [m["content"] + "<|im_end|>" for m in MULTI if m["role"] == "assistant"]
    assert tokenizer.decode(sample.ids) == tokenizer.apply_chat_template(MULTI, tokenize=False)


def test_every_demo_conversation(checkpoints: dict[str, Path], conversations: list) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    chat = ChatFormat(tokenizer)
    for messages in conversations:
        (sample,) = chat.conversation(messages)
        answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
        assert learned_runs(tokenizer, sample) == answers


def test_prompt_is_what_precedes_the_answer(checkpoints: dict[str, Path]) -> None:
    """Evaluation's prompt has the very ids that training puts before the last answer."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    chat = ChatFormat(tokenizer)
    (sample,) = chat.conversation(MULTI)
    prompt = chat.prompt(MULTI[:-1])
    assert sample.ids[: len(prompt)] == prompt
    assert sample.learned[len(prompt)]
    assert not sample.learned[len(prompt) - 1]


def test_template_that_rewrites_history_gives_one_sample_per_answer(checkpoints: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '(thinking)' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    samples = ChatFormat(tokenizer).conversation(MULTI)
    runs = [learned_runs(tokenizer, sample) for sample in samples]
    assert runs == [
        ["(thinking)" + MULTI[2]["content"] + "<|im_end|>"],
        ["(thinking)" + MULTI[4]["content"] + "<|im_end|>"],
    ]
    assert "(thinking)" not in tokenizer.decode(samples[1].ids[:40])


def test_llama2_text(checkpoints: dict[str, Path]) -> None:
    """`<s>[INST] {q} [/INST] {a} </s>`, a new `<s>` each turn, the system text in the first user turn."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    chat = ChatFormat(tokenizer, FAMILIES["llama2"])
    messages = [m | {"content": m["content"].strip()} for m in MULTI]
    (sample,) = chat.conversation(messages)
    assert tokenizer.decode(sample.ids) == (
        "<s>[INST] <<SYS>>\n请简短回答。\n<</SYS>>\n\n怎么续借？ [/INST] 点“续借”即可，不用到馆。 </s>"
        "<s>[INST] 逾期呢 [/INST] 每天0.1元\n上限10元 </s>"
    )
    assert [run.strip() for run in learned_runs(tokenizer, sample)] == [
        "点“续借”即可，不用到馆。 </s>",
        "每天0.1元\n上限10元 </s>",
    ]


def test_qwen_default_system(checkpoints: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["qwen2"])
    chat = ChatFormat(tokenizer, FAMILIES["qwen1.5"])
    assert tokenizer.decode(chat.prompt([{"role": "user", "content": "你好"}])) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    )


class PieceTokenizer:
    """Special tokens by the ids of the real vocabularies, text one id per character: shows pieces and their order."""

    is_fast = False
    eos_token_id = 2
    chat_template = None
    specials: ClassVar[dict[str, int]] = {
        "[gMASK]": 64790, "sop": 64792, "<|system|>": 64794, "<|user|>": 64795, "<|assistant|>": 64796,
        "<sop>": 130004, "<eop>": 130005,
    }  # fmt: skip

    def get_command(self, token: str) -> int:
        return self.specials[token]

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [1_000_000 + ord(character) for character in text]}

    def show(self, sample: Rendered) -> tuple[str, str]:
        names = {v: k for k, v in self.specials.items()} | {2: "</s>", 195: "<195>", 196: "<196>"}
        texts = [chr(i - 1_000_000) if i >= 1_000_000 else names[i] for i in sample.ids]
        return "".join(texts), "".join(t for t, flag in zip(texts, sample.learned, strict=True) if flag)


TURNS = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]


@pytest.mark.parametrize(
    ("family", "text", "learned"),
    [
        ("glm2", "[gMASK]sop[Round 1]\n\n问：q1\n\n答：a1</s>\n\n[Round 2]\n\n问：q2\n\n答：a2</s>", "a1</s>a2</s>"),
        ("glm3", "[gMASK]sop<|user|>\nq1<|assistant|>\na1<|user|>\nq2<|assistant|>\na2</s>", "\na1<|user|>\na2</s>"),
        ("baichuan2_13b", "<195>q1<196>a1</s><195>q2<196>a2</s>", "a1</s>a2</s>"),
    ],
)
def test_formats_laid_out_by_id(family: str, text: str, learned: str) -> None:
    tokenizer = PieceTokenizer()
    (sample,) = ChatFormat(tokenizer, FAMILIES[family]).conversation(TURNS)
    assert tokenizer.show(sample) == (text, learned)
    prompt = ChatFormat(tokenizer, FAMILIES[family]).prompt(TURNS[:3])
    assert sample.ids[: len(prompt)] == prompt


def test_chatglm_6b_is_one_sample_per_answer() -> None:
    tokenizer = PieceTokenizer()
    samples = ChatFormat(tokenizer, FAMILIES["glm"]).conversation(TURNS)
    assert [tokenizer.show(sample) for sample in samples] == [
        ("q1[gMASK]<sop>a1<eop>", "a1<eop>"),
        ("[Round 0]\n问：q1\n答：a1\n[Round 1]\n问：q2\n答：[gMASK]<sop>a2<eop>", "a2<eop>"),
    ]


def test_choice_of_family() -> None:
    assert choose_family("auto", {"model_type": "llama"}, True) is None
    assert choose_family("auto", {"model_type": "llama"}, False) is FAMILIES["llama2"]
    assert choose_family("auto", {"model_type": "baichuan"}, False) is FAMILIES["baichuan2_13b"]
    assert choose_family("auto", {"model_type": "chatglm", "position_encoding_2d": True}, False) is FAMILIES["glm"]
    with pytest.raises(UserError, match="is for model_type chatglm"):
        choose_family("glm3", {"model_type": "llama"}, True)
    with pytest.raises(UserError, match=r"put a chat_template\.jinja"):
        choose_family("auto", {"model_type": "gpt2"}, False)
    with pytest.raises(UserError, match="unknown mode"):
        choose_family("vicuna", {}, False)
