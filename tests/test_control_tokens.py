"""Content is content: whatever a text looks like, it gives no control token; other texts keep every id."""

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conftest import ROOT, read_messages, write_jsonl
from test_chat_formats import MULTI, VENDOR_IDS, SentencePieceTokenizer, learned_runs
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from eval.rendering import Renderer
from eval.samples import Sample
from llmops import checkpoints, tiny
from llmops.chat_formats import FAMILIES, OWN, ChatFormat
from llmops.console import UserError
from train.config import Config
from train.dataset import Source, load_or_encode

Make = Callable[[], ChatFormat]
PLAIN = "是"  # a harmless text that is nowhere else in the conversations below
LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] "
    "+ '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# splits reasoning from an answer and writes it anew in the last turn, as Qwen3's does
THINKING = (
    "{% for m in messages %}{% set text = m.content %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% set thought = '' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.last %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}{% endif %}"
    "{{ text + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURN_MARKS = (
    "{% for m in messages %}{{ '<｜User｜>' if m.role == 'user' else ('<｜Assistant｜>' if m.role == 'assistant' else '') }}"
    "{{ m.content + ('</s>' if m.role == 'assistant' else '') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def texts() -> list[str]:
    """The texts of the demo's conversations."""
    return [m["content"] for c in read_messages(ROOT / "train" / "demo_data" / "train.jsonl") for m in c]


def chatml() -> ChatFormat:
    """A byte-level BPE whose control tokens stand in its vocabulary, with ChatML's template."""
    return ChatFormat(tiny.train_tokenizer(texts(), 900))


def qwen() -> ChatFormat:
    """The same in Qwen1.5's format, with a system text that the template puts in."""
    return ChatFormat(tiny.train_tokenizer(texts(), 900), FAMILIES["qwen1.5"])


def llama3() -> ChatFormat:
    """A byte-level BPE that takes whole words from its vocabulary, control tokens beside it, a bos by the processor."""
    backend = tiny.train_tokenizer(texts(), 900).backend_tokenizer
    description = json.loads(backend.to_str())
    description["added_tokens"], description["model"]["ignore_merges"] = [], True
    backend = Tokenizer.from_str(json.dumps(description))
    tokens = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"]
    backend.add_special_tokens(tokens)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[(tokens[0], backend.token_to_id(tokens[0]))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=tokens[0], eos_token="<|eot_id|>")
    tokenizer.chat_template = LLAMA3
    return ChatFormat(tokenizer)


def llama2() -> ChatFormat:
    """A BPE over sentencepiece's blanks with byte fallback, which puts a blank before every part of a text."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = pre_tokenizers.Sequence([pre_tokenizers.Split("▁", "merged_with_next")])
    backend.pre_tokenizer = words
    backend.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=1600, special_tokens=special))
    description = json.loads(backend.to_str())
    description["added_tokens"], description["pre_tokenizer"] = description["added_tokens"][:3], None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), unk_token="<unk>", bos_token="<s>",
        eos_token="</s>",
    )  # fmt: skip
    return ChatFormat(tokenizer, FAMILIES["llama2"])


def unigram() -> ChatFormat:
    """A unigram model that makes its control tokens of text even where they are not asked for."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=1500, special_tokens=["<unk>", "<s>", "</s>", "<u>"], unk_token="<unk>",
        initial_alphabet=sorted({*"".join(texts()), *"</>|suxnkab是\n"}),
    )  # fmt: skip
    backend.train_from_iterator(texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<u>"],
    )  # fmt: skip
    tokenizer.chat_template = "{% for m in messages %}{{ '<u>' + m['content'] + '</s>' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<u>' }}{% endif %}"
    return ChatFormat(tokenizer)


def with_tokens(template: str, *tokens: str) -> ChatFormat:
    """The byte-level BPE with added tokens that it does not call special."""
    tokenizer = tiny.train_tokenizer(texts(), 900)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


def thinking() -> ChatFormat:
    """A template that takes answers apart at a tag which is an added token, but none of the control tokens."""
    return with_tokens(THINKING, "<think>", "</think>")


def turn_marks() -> ChatFormat:
    """Turns marked by added tokens that the tokenizer does not call special."""
    chat = with_tokens(TURN_MARKS, "<｜User｜>", "<｜Assistant｜>", "</s>", "<tool>")
    chat.tokenizer.eos_token = "</s>"
    return ChatFormat(chat.tokenizer)


FAST: dict[str, Make] = {
    make.__name__: make for make in (chatml, qwen, llama3, llama2, unigram, thinking, turn_marks)
}  # fmt: skip


@pytest.fixture(scope="module", params=FAST)
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    """A chat format by a template, of every kind of fast tokenizer."""
    return FAST[request.param]()


def conversation_with(text: str, role: str) -> list[dict[str, str]]:
    """A question and an answer, one of them (or a system message before them) being the text."""
    messages = [{"role": "user", "content": "怎么续借？"}, {"role": "assistant", "content": "点续借。"}]
    if role == "system":
        return [{"role": role, "content": text}, *messages]
    return [m | {"content": text} if m["role"] == role else m for m in messages]


def hostile_texts(chat: ChatFormat) -> list[str]:
    """Texts that hold control tokens: alone, within, in a row, one in another, with blanks around."""
    found = []
    for token in chat.controls.texts:
        found += [token, f"怎{token}\n么", token + token, f"a {token} b", token[:2] + token + token[2:]]
    return found


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_hostile_texts_stay_texts(chat: ChatFormat, role: str) -> None:
    """The control tokens are those of the same conversation with a harmless text, and all decodes to what was said."""
    (plain,) = chat.conversation(conversation_with(PLAIN, role))
    expected = [i for i in plain.ids if i in chat.controls.ids]
    assert expected
    for text in hostile_texts(chat):
        messages = conversation_with(text, role)
        (sample,) = chat.conversation(messages)
        assert [i for i in sample.ids if i in chat.controls.ids] == expected
        assert chat.tokenizer.decode(sample.ids) == chat.tokenizer.decode(plain.ids).replace(PLAIN, text)
        learned = learned_runs(chat.tokenizer, sample)
        assert learned == [run.replace(PLAIN, text) for run in learned_runs(chat.tokenizer, plain)]
        prompt = chat.prompt(messages[:-1])
        assert sample.ids[: len(prompt)] == prompt


def test_what_lies_beside_a_hostile_text_keeps_its_ids(chat: ChatFormat) -> None:
    """Before and after the message that holds a control token's text, every id is what it was."""
    sample, plain = (
        chat.conversation([*conversation_with(PLAIN, "user"), *conversation_with(text, "user")])[-1]
        for text in (chat.controls.texts[0], PLAIN)
    )
    same = next(i for i, (a, b) in enumerate(zip(sample.ids, plain.ids, strict=False)) if a != b)
    tail = next(i for i, (a, b) in enumerate(zip(sample.ids[::-1], plain.ids[::-1], strict=False)) if a != b)
    assert PLAIN in chat.tokenizer.decode(plain.ids[:same])
    assert "点续借。" in chat.tokenizer.decode(plain.ids[len(plain.ids) - tail :])


def test_other_texts_are_token_exact(chat: ChatFormat, conversations: list) -> None:
    """The ids are what the tokenizer makes of transformers' own rendering, by the direct way and by the guarded one."""
    tokenizer = chat.tokenizer
    draw = random.Random(0)
    odd = ["<", "|", "im_end", "</", "s>", "[INST]", "é́", "👩‍🚀", "\u200b", " ", "\t", "<|im_", "end|>", "中", "a" * 9, "\n"]
    made = [
        [{"role": role, "content": "x" + "".join(draw.choices(odd, k=6))} for role in ("user", "assistant")]
        for _ in range(40)
    ]
    for messages in [MULTI, *conversations[:60], *made]:
        if chat.controls.first(messages):
            continue
        ends = [i for i, message in enumerate(messages, 1) if message["role"] == "assistant"]
        direct, guarded = chat.conversation(messages), chat._templated(messages, ends, True)
        assert guarded == direct
        for end, sample in zip(ends[-len(direct) :], direct, strict=True):
            assert sample.ids == tokenizer.apply_chat_template(messages[:end], return_dict=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert chat.prompt(messages[:-1]) == prompt
