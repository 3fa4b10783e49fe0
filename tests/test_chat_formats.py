"""Rendering: learned tokens are exactly the answers and their end tokens; formats equal the published ones."""

import json
import shutil
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmops.console import UserError
from llmops.formats.chat_format import ChatFormat, Rendered
from llmops.formats.families import TEMPLATES, choose_family, families, read_families
from llmops.models import tiny
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint

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
    chat = ChatFormat(tokenizer, families()["llama2"])
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
    chat = ChatFormat(tokenizer, families()["qwen1.5"])
    assert tokenizer.decode(chat.prompt([{"role": "user", "content": "你好"}])) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    )


class SentencePieceTokenizer:
    """A sentencepiece model trained on the spot, with the vendors' special tokens at the vendors' ids, outside of it.

    As in the vendors' tokenizers of ChatGLM2 and 3, special tokens typed as text are encoded as text.
    """

    is_fast = False
    eos_token_id = 2
    chat_template = None

    def __init__(self, model: Path, specials: dict[str, int]) -> None:
        self.text = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.specials = specials

    def get_command(self, token: str) -> int:
        return self.specials[token]

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": self.text.encode(text)}


# ids of the published vocabularies, as in the vendors' tokenizer and generation configurations
VENDOR_IDS = {
    "glm": {"[gMASK]": 130001, "<sop>": 130004, "<eop>": 130005},
    "glm2": {"[gMASK]": 64790, "sop": 64792},
    "glm3": {
        "[gMASK]": 64790, "sop": 64792, "<|system|>": 64794, "<|user|>": 64795, "<|assistant|>": 64796,
        "<|observation|>": 64797,
    },
    "baichuan2_13b": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory, conversations: list) -> Path:
    """A BPE model with byte fallback and a dummy prefix, like those of ChatGLM and Baichuan."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = folder / "text.txt"
    text.write_text("\n".join(m["content"] for c in conversations for m in c), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spm"), vocab_size=2200, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, minloglevel=2, user_defined_symbols=["\n"],
    )  # fmt: skip
    return folder / "spm.model"


TURNS = [
    {"role": "user", "content": "怎么续借？"},
    {"role": "assistant", "content": "点“续借”即可。"},
    {"role": "user", "content": "逾期呢"},
    {"role": "assistant", "content": "每天0.1元\n上限10元"},
]
Q1, A1, Q2, A2 = (m["content"] for m in TURNS)
# expected layouts, written out from the vendors' published code: an int is a token id, a text is encoded on its own;
# what is learned stands in a tuple
EXACT = {
    "glm2": [[64790, 64792, f"[Round 1]\n\n问：{Q1}\n\n答：", (A1, 2),
              f"\n\n[Round 2]\n\n问：{Q2}\n\n答：", (A2, 2)]],
    "glm3": [[64790, 64792, 64795, "\n", Q1, 64796, ("\n", A1, 64795), "\n", Q2, 64796, ("\n", A2, 2)]],
    "baichuan2_13b": [[195, Q1, 196, (A1, 2), 195, Q2, 196, (A2, 2)]],
    "glm": [[Q1, 130001, 130004, (A1, 130005)],
            [f"[Round 0]\n问：{Q1}\n答：{A1}\n[Round 1]\n问：{Q2}\n答：", 130001, 130004, (A2, 130005)]],
}  # fmt: skip


@pytest.mark.parametrize("mode", EXACT)
def test_token_exact_by_id(mode: str, sentencepiece_model: Path) -> None:
    """Every id, and where the learned tokens begin and end, over two turns; the prompt is what precedes an answer."""
    tokenizer = SentencePieceTokenizer(sentencepiece_model, VENDOR_IDS[mode])
    chat = ChatFormat(tokenizer, families()[mode])
    samples = chat.conversation(TURNS)
    assert len(samples) == len(EXACT[mode])
    for sample, layout in zip(samples, EXACT[mode], strict=True):
        ids: list[int] = []
        learned: list[bool] = []
        for part in layout:
            for piece in part if isinstance(part, tuple) else (part,):
                encoded = [piece] if isinstance(piece, int) else tokenizer.text.encode(piece)
                ids += encoded
                learned += [isinstance(part, tuple)] * len(encoded)
        assert sample.ids == ids
        assert sample.learned == learned
    prompt = chat.prompt(TURNS[:3])
    assert samples[-1].ids[: len(prompt)] == prompt
    assert samples[-1].learned[len(prompt)]
    assert not samples[-1].learned[len(prompt) - 1]


def test_where_answers_stop(sentencepiece_model: Path) -> None:
    """ChatGLM3 also ends an answer with the token of the next speaker."""
    expected = {"glm2": [2], "glm3": [2, 64795, 64797]}
    for mode, ids in expected.items():
        tokenizer = SentencePieceTokenizer(sentencepiece_model, VENDOR_IDS[mode])
        assert ChatFormat(tokenizer, families()[mode]).stop_ids() == ids


GEMMA = (
    "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\\n' + m.content + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\\n' }}{% endif %}"
)
GLM4 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + '\\n' + (c.function.arguments | tojson) }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "names", "ends"),
    [(GEMMA, ["<start_of_turn>", "<end_of_turn>"], ["<end_of_turn>"]),
     (GLM4, ["<|user|>", "<|assistant|>", "<|tool|>"], ["<|user|>", "<|tool|>"])],
)  # fmt: skip
def test_where_a_templates_answers_stop(
    checkpoints: dict[str, Path], tmp_path: Path, template: str, names: list[str], ends: list[str]
) -> None:
    """At the end token, at what ends a rendered answer or follows it, and where generation_config.json says."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["llama"], folder)
    tokenizer = bpe_tokenizer(folder, {"eos_token": "<|im_end|>", "additional_special_tokens": names})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    eos, first = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")
    own = {eos, *tokenizer.convert_tokens_to_ids(ends)}
    for named, more in (([eos, first, 10**6], {first}), (first, {first}), (None, set())):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}), encoding="utf-8")
        assert ChatModel(Checkpoint(folder)).chat.stop_ids() == sorted(own | more)
    (folder / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}', encoding="utf-8")
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id is .*, expected the ids of"):
        _ = ChatModel(Checkpoint(folder)).chat


def test_a_system_text_by_id(sentencepiece_model: Path) -> None:
    system = {"role": "system", "content": "请简短回答。"}
    expected = {
        "glm3": [64790, 64792, 64794, "\n", "请简短回答。", 64795, "\n", Q1, 64796],
        "baichuan2_13b": ["请简短回答。", 195, Q1, 196],
    }
    for mode, layout in expected.items():
        tokenizer = SentencePieceTokenizer(sentencepiece_model, VENDOR_IDS[mode])
        encoded = [[part] if isinstance(part, int) else tokenizer.text.encode(part) for part in layout]
        assert ChatFormat(tokenizer, families()[mode]).prompt([system, TURNS[0]]) == list(chain(*encoded))


def bpe_tokenizer(folder: Path, tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    """The tiny byte-level tokenizer with the special tokens of a family as single tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(tokens)
    return tokenizer


def test_token_exact_as_text(checkpoints: dict[str, Path]) -> None:
    """Qwen1.5 and Llama-2: special tokens are single ids, the learned tokens are answer and end token."""
    qwen = bpe_tokenizer(checkpoints["qwen2"], {"eos_token": "<|im_end|>"})
    start, end = qwen.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    encode = lambda text: qwen(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    (sample,) = ChatFormat(qwen, families()["qwen1.5"]).conversation(TURNS)
    parts = [[start], encode("system\nYou are a helpful assistant."), [end], encode("\n")]
    flags = [False] * 4
    for message in TURNS:
        answer = message["role"] == "assistant"
        role = encode(f"{message['role']}\n")
        parts += [[start], role, encode(message["content"]), [end], encode("\n")]
        flags += [False, False, answer, answer, False]
    assert sample.ids == list(chain(*parts))
    assert sample.learned == [flag for part, flag in zip(parts, flags, strict=True) for _ in part]

    llama = bpe_tokenizer(checkpoints["llama"], {"bos_token": "<s>", "eos_token": "</s>"})
    bos, eos = llama.convert_tokens_to_ids(["<s>", "</s>"])
    (sample,) = ChatFormat(llama, families()["llama2"]).conversation(TURNS)
    assert [i for i in sample.ids if i in (bos, eos)] == [bos, eos, bos, eos]
    assert [flag for i, flag in zip(sample.ids, sample.learned, strict=True) if i in (bos, eos)] == [False, True] * 2
    assert llama.decode(sample.ids) == f"<s>[INST] {Q1} [/INST] {A1} </s><s>[INST] {Q2} [/INST] {A2} </s>"
    assert learned_runs(llama, sample) == [f" {A1} </s>", f" {A2} </s>"]


def test_choice_of_family() -> None:
    chatglm = {"model_type": "chatglm", "multi_query_attention": True}
    known = families()
    assert choose_family("auto", {"model_type": "llama"}, "", True) is known["auto"]
    assert choose_family("auto", {"model_type": "llama"}, "", False) is known["llama2"]
    assert choose_family("auto", {"model_type": "baichuan"}, "", False) is known["baichuan2_13b"]
    assert choose_family("auto", {"model_type": "chatglm", "position_encoding_2d": True}, "", False) is known["glm"]
    assert choose_family("auto", chatglm, "class ChatGLMTokenizer", False) is known["glm2"]
    unnamed = {key: value for key, value in chatglm.items() if key != "model_type"}  # as ChatGLM2 first came
    assert choose_family("auto", unnamed, "class ChatGLMTokenizer", False) is known["glm2"]
    assert choose_family("auto", chatglm, 'role_special_tokens = ["<|user|>"]', False) is known["glm3"]
    with pytest.raises(UserError, match="is for model_type chatglm, the checkpoint is 'llama'"):
        choose_family("glm3", {"model_type": "llama"}, "", True)
    with pytest.raises(UserError, match=r"glm3 is for tokenizers with <\|user\|>, which this checkpoint's lacks"):
        choose_family("glm3", chatglm, "class ChatGLMTokenizer", False)
    with pytest.raises(UserError, match=r"position_encoding_2d in config\.json, which this one lacks"):
        choose_family("glm", chatglm, "", False)
    with pytest.raises(UserError, match=r"put a chat_template\.jinja"):
        choose_family("auto", {"model_type": "gpt2"}, "", False)
    with pytest.raises(UserError, match="unknown mode 'vicuna'"):
        choose_family("vicuna", {}, "", False)


def test_a_model_is_added_with_one_file(tmp_path: Path) -> None:
    for path in TEMPLATES.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    new = {"model_types": ["falcon"], "chat_template": "{{ messages[0].content }}", "faq": {"none": "其他"}}
    (tmp_path / "falcon.json").write_text(json.dumps(new), encoding="utf-8")
    family = read_families(tmp_path)["falcon"]
    assert family.faq["none"] == "其他"
    assert family.faq["prompt"] == families()["auto"].faq["prompt"]  # what a file leaves out is auto's
    own = new | {"faq": {"prompt": "{instruction} {candidates} {question}"}}
    (tmp_path / "falcon.json").write_text(json.dumps(own), encoding="utf-8")
    family = read_families(tmp_path)["falcon"]
    assert "prompt" not in family.faq_en  # a wording of its own is for English data, too
    assert family.faq_en["instruction"] == families()["auto"].faq_en["instruction"]
    for text, phrase in (
        ("{", "falcon.json is not JSON"),
        ('{"lora": []}', "unknown key lora"),
        ('{"layout": "x"}', "unknown layout 'x'"),
    ):
        (tmp_path / "falcon.json").write_text(text)
        with pytest.raises(UserError, match=phrase):
            read_families(tmp_path)
