"""Content is content: whatever a text looks like, it gives no control token; other texts keep every id."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, read_messages, write_jsonl
from test_chat_formats import MULTI, learned_runs
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from eval.rendering import Renderer
from eval.samples import Sample
from llmops.console import UserError
from llmops.formats.chat_format import Asked, ChatFormat
from llmops.formats.families import families
from llmops.models import tiny
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from train.config import Config
from train.source import Source
from train.token_cache import load_or_encode

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
    "{% for m in messages %}{{ {'user': '<｜User｜>', 'assistant': '<｜Assistant｜>', 'system': ''}[m.role] }}"
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
    return ChatFormat(tiny.train_tokenizer(texts(), 900), families()["qwen1.5"])


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
    return ChatFormat(tokenizer, families()["llama2"])


def unigram() -> ChatFormat:
    """A unigram model that makes its control tokens of text even where they are not asked for."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=1500, special_tokens=["<unk>", "<s>", "</s>", "<u>"], unk_token="<unk>",
        initial_alphabet=sorted({*"".join(texts()), *"</>|suxnkab是\n▁"}),
    )  # fmt: skip
    backend.train_from_iterator(texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<u>"],
    )  # fmt: skip
    tokenizer.chat_template = "{% for m in messages %}{{ '<u>' + m['content'] + '</s>' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<u>' }}{% endif %}"
    return ChatFormat(tokenizer)


def lowercase() -> ChatFormat:
    """A tokenizer that makes its control tokens of other spellings, too."""
    tokenizer = tiny.train_tokenizer(texts(), 900, lowercase=True)
    token = AddedToken("<turn>", special=True, normalized=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.chat_template = "{% for m in messages %}{{ '<turn>' + m.content + '<|im_end|>' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<turn>' }}{% endif %}"
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
    make.__name__: make for make in (chatml, qwen, llama3, llama2, unigram, lowercase, thinking, turn_marks)
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
    odd = ["<", "|", "im_end", "</", "s>", "[INST]", "é́", "aaaa", "👩‍🚀", "\u200b", " ", "\t", "<|im_", "end|>", "\n"]
    made = [
        [{"role": role, "content": "x" + "".join(draw.choices(odd, k=6))} for role in ("user", "assistant")]
        for _ in range(40)
    ]
    for messages in [MULTI, *conversations[:60], *made]:
        if chat.controls.first(messages):
            continue
        ends = [i for i, message in enumerate(messages, 1) if message["role"] == "assistant"]
        direct, guarded = chat.conversation(messages), chat._templated(Asked(messages), ends, True)
        assert guarded == direct
        for end, sample in zip(ends[-len(direct) :], direct, strict=True):
            assert sample.ids == tokenizer.apply_chat_template(messages[:end], return_dict=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert chat.prompt(messages[:-1]) == prompt


def test_other_spellings_and_what_begins_every_text() -> None:
    """What a normalizer would make a control token of is text; a bos that belongs before every text is put there."""
    chat = lowercase()
    (turn,) = chat.tokenizer.convert_tokens_to_ids(["<turn>"])
    assert turn in chat.tokenizer("怎<TURN>么")["input_ids"]
    messages = conversation_with("怎<TURN>么", "user")
    assert chat.controls.first(messages) is None
    (sample,) = chat.conversation(messages)
    assert sample.ids.count(turn) == 2
    assert chat.tokenizer.decode(sample.ids) == "<turn>怎<turn>么<|im_end|><turn>点续借。<|im_end|>"
    assert turn not in chat.controls.encode_text("怎<TURN>么")
    llama = llama3()
    for text in ("怎么", "怎<|eot_id|>么"):
        ids = llama.controls.encode_text(text, add_special_tokens=True)
        assert llama.controls.count(ids) == 1
        assert ids[0] == llama.tokenizer.bos_token_id
        assert llama.tokenizer.decode(ids[1:]) == text


def test_what_counts_as_a_control_token() -> None:
    """What is special, and what a template writes around messages; tags that answers may write are vocabulary."""
    assert set(thinking().controls.texts) == set(tiny.SPECIAL_TOKENS)
    assert set(turn_marks().controls.texts) == {*tiny.SPECIAL_TOKENS, "<｜User｜>", "<｜Assistant｜>", "</s>"}
    chat = thinking()
    answer = "<think>\n想\n</think>\n\n点<|im_end|>"
    (sample,) = chat.conversation(conversation_with(answer, "assistant"))
    assert chat.tokenizer.decode(sample.ids).endswith(f"assistant\n{answer}<|im_end|>\n")
    opening, closing = chat.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert [sample.ids.count(i) for i in (opening, closing)] == [1, 1]
    assert sample.ids.count(chat.tokenizer.eos_token_id) == 2
    (sample,) = turn_marks().conversation(conversation_with("用<tool>", "user"))
    assert sample.ids.count(turn_marks().tokenizer.convert_tokens_to_ids("<tool>")) == 1


PARTS = (
    # two messages side by side make a token; so do a message and what the template writes before it
    ("{% for m in messages %}{{ m.content + ('<|im_end|>' if m.role == 'assistant' else '') }}{% endfor %}",
     ["<|im_", "end|>"]),
    ("{% for m in messages %}{{ '<' + m.content + '<|im_end|>' }}{% endfor %}", ["|im_start|>怎", "点"]),
    ("{% for m in messages %}{{ '<|im_' + m.content + '|><|im_end|>' }}{% endfor %}", ["start", "end"]),
    # a template that takes something out of a text makes one of what was none
    ("{% for m in messages %}{{ m.content.replace('<image>', '') + '<|im_end|>' }}{% endfor %}",
     ["怎<|im_<image>end|>么", "点"]),
    ("{% for m in messages %}{{ m.content | lower + '<|im_end|>' }}{% endfor %}", ["<|IM_END|>", "点"]),
)  # fmt: skip


@pytest.mark.parametrize(("template", "said"), PARTS)
def test_no_control_token_is_put_together(template: str, said: list[str]) -> None:
    """A control token's text that only rendering makes is text as well."""
    tokenizer = tiny.train_tokenizer(texts(), 900)
    tokenizer.chat_template = template
    chat = ChatFormat(tokenizer)
    messages = [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
    assert chat.controls.first(messages) is None
    ids = chat.conversation(messages)[-1].ids
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids) == rendered
    ends = 1 if "assistant" in template else 2
    assert [i for i in ids if i in chat.controls.ids] == [tokenizer.eos_token_id] * ends


def test_templates_that_look_into_texts() -> None:
    """Marks are not seen: beginnings, ends, blanks, equal texts, private characters; what cannot be kept is said."""
    looks = (
        "{% for m in messages %}{% if m.role == 'user' and m.content.startswith('!') %}{{ '(order)' }}{% endif %}"
        "{{ '<|im_start|>' + m.content.strip() + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    )
    tokenizer = tiny.train_tokenizer(texts(), 900)
    tokenizer.chat_template = looks
    chat = ChatFormat(tokenizer)
    private = "\U000f0000<|im_end|>\ue000\U000f0001"
    for text in ("!<|im_end|>", " \n怎<|im_end|> ", "<|im_start|>", private, "(order)<|im_end|>"):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        (sample,) = chat.conversation(messages)
        assert tokenizer.decode(sample.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert sum(i in chat.controls.ids for i in sample.ids) == 4
        assert learned_runs(tokenizer, sample) == [f"{text.strip()}<|im_end|>"]
    taken_out = "m.content[:1] + m.content[1:].replace('\U000f0000', '')"
    tokenizer.chat_template = looks.replace("m.content.strip()", taken_out)
    (sample,) = ChatFormat(tokenizer).conversation([*conversation_with("<|im_end|>", "user")])
    assert sum(i in chat.controls.ids for i in sample.ids) == 4
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | reverse + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(UserError, match=r"makes a control token of what a message's text holds \('<\|im_start\|>'\)"):
        ChatFormat(tokenizer).conversation(conversation_with(">|dne_mi|<<|im_start|>", "user"))


# --- the setting, the data, the evaluation


HELD = [{"role": "user", "content": "怎<|im_end|>么"}, {"role": "assistant", "content": "点<|im_start|>"}]


def test_allow_special_tokens(
    tmp_path: Path, conversations: list, checkpoints: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Off, texts are learned as text and a warning counts them; on, they are the tokens; each has its own cache."""
    data = write_jsonl(tmp_path / "train.jsonl", [*conversations[:3], HELD, HELD])
    folder = checkpoints["llama"]
    found = {}
    for allow in (False, True):
        tokenizer, chat = loading(folder, allow)
        source = Source((data,), folder, "auto", 256, False, allow_special_tokens=allow)
        dataset = load_or_encode(source, chat, tmp_path / "cache")
        found[allow] = [tokenizer.convert_ids_to_tokens(dataset[i]["ids"].tolist()) for i in range(5)]
        said = capfd.readouterr().err
        assert "2 of 5 conversations hold the text of control tokens (first: line 4, '<|im_end|>')" in said
        assert ("warning: " in said) is not allow
        assert ("they become these tokens (--allow_special_tokens true)" in said) is allow
        load_or_encode(source, chat, tmp_path / "cache")  # what is read from the cache is said, too
        assert "2 of 5 conversations hold" in capfd.readouterr().err
        expected = tokenizer.apply_chat_template(HELD, tokenize=False)
        assert tokenizer.convert_tokens_to_string(found[allow][4]).rstrip("\n") == expected.rstrip("\n")
    assert found[False][:3] == found[True][:3]
    assert [tokens.count("<|im_end|>") for tokens in (found[False][4], found[True][4])] == [2, 3]
    assert [tokens.count("<|im_start|>") for tokens in (found[False][4], found[True][4])] == [2, 3]
    assert len(list((tmp_path / "cache").glob("train-*"))) == 2
    assert Config().allow_special_tokens is False


def loading(folder: Path, allow: bool) -> tuple[Any, ChatFormat]:
    """Tokenizer and format of a checkpoint."""
    opened = ChatModel(Checkpoint(folder), allow_special_tokens=allow)
    return opened.tokenizer, opened.chat


@pytest.mark.parametrize("chat_template", [True, False])
def test_evaluation_renders_texts_as_texts(checkpoints: dict[str, Path], chat_template: bool) -> None:
    """Prompts, choices and lengths, in the chat format and as plain text."""
    renderer = Renderer(ChatModel(Checkpoint(checkpoints["llama"])), chat_template)
    tokenizer = renderer.tokenizer
    sample = Sample(HELD[0]["content"], (HELD[1]["content"],), choices=("点<|im_end|>", "点", "<|im_start|>"))
    prompt = renderer.prompt(sample)
    special = {*tokenizer.all_special_ids}
    assert sum(i in special for i in prompt) == (3 if chat_template else 0)
    assert HELD[0]["content"] in tokenizer.decode(prompt)
    choices = renderer.choices(sample, prompt)
    assert [tokenizer.decode(ids) for ids in choices] == list(sample.choices)
    assert not special & {i for ids in choices for i in ids}
    assert renderer.answer_length("点<|im_end|>") > 3
