"""Formats that are laid out by id, and slow tokenizers: a text is never one of their control tokens."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conftest import ROOT, read_messages
from test_chat_formats import MULTI, VENDOR_IDS, SentencePieceTokenizer
from test_control_tokens import PLAIN, conversation_with, texts

from llmops.formats.chat_format import Asked, ChatFormat
from llmops.formats.families import families
from llmops.legacy import patches

TYPED = ["\n", "[gMASK]", "<sop>", "<eop>", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
RESERVED = ["<reserved_106>", "<reserved_107>"]  # Baichuan2's 195 and 196


@pytest.fixture(scope="module")
def typed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model that knows control tokens as symbols of its own, as ChatGLM-6B's and Baichuan2's do."""
    return train_typed(tmp_path_factory.mktemp("sentencepiece"), "identity")


def train_typed(folder: Path, normalizer: str) -> Path:
    """A model with the control tokens as pieces."""
    (folder / "text.txt").write_text("\n".join(texts()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "spm"), vocab_size=2200, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, minloglevel=2, num_threads=1,
        user_defined_symbols=[*TYPED, *(f"<filler_{i}>" for i in range(len(TYPED) + 3, 195)), *RESERVED],
        normalization_rule_name=normalizer, remove_extra_whitespaces=False,
    )  # fmt: skip
    return folder / "spm.model"


class TypedTokenizer(SentencePieceTokenizer):
    """As SentencePieceTokenizer, but the control tokens are pieces: typed as text, they would become themselves."""

    def __init__(self, model: Path, names: list[str]) -> None:
        super().__init__(model, {})
        self.specials = {name: self.text.piece_to_id(name) for name in names}

    def convert_ids_to_tokens(self, i: int) -> str:
        """The piece."""
        return self.text.id_to_piece(i)

    def decode(self, ids: list[int]) -> str:
        """The text."""
        return self.text.decode(ids)


LAID_OUT = {
    "glm": ["[gMASK]", "<sop>", "<eop>"], "glm2": ["[gMASK]", "sop"],
    "glm3": ["[gMASK]", "sop", *TYPED[-4:]], "baichuan2_13b": RESERVED,
}  # fmt: skip


@pytest.mark.parametrize("mode", LAID_OUT)
def test_a_text_is_no_token_of_a_layout(mode: str, sentencepiece_model: Path) -> None:
    """A message that is nothing but the name of a control token is encoded as any text: every id by the model alone."""
    names = [*VENDOR_IDS[mode], "</s>", "<|user|>", "[gMASK]", "sop", "<sop>", "<eop>", "</s></s>"]
    tokenizer = SentencePieceTokenizer(sentencepiece_model, VENDOR_IDS[mode])
    chat = ChatFormat(tokenizer, families()[mode])
    for name in names:
        for role in ("user", "assistant"):
            messages = conversation_with(name, role)
            expected: list[int] = []
            for piece in chat.layout(messages, False):
                expected += [chat._special_id(piece.content)] if piece.control else tokenizer.text.encode(piece.content)
            (sample,) = chat.conversation(messages)
            assert sample.ids == expected
            assert sum(i in chat.controls.ids for i in sample.ids) == sum(
                piece.control for piece in chat.layout(conversation_with("x", role), False)
            )


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without such symbols."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("\n".join(texts()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "spm"), vocab_size=1800, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, minloglevel=2, num_threads=1, user_defined_symbols=["\n"],
    )  # fmt: skip
    return folder / "spm.model"


@pytest.mark.parametrize("mode", LAID_OUT)
def test_pieces_that_are_control_tokens_are_taken_apart(mode: str, typed_model: Path) -> None:
    """Where the model itself makes control tokens of text, texts with them are encoded in parts and decode the same."""
    tokenizer = TypedTokenizer(typed_model, LAID_OUT[mode])
    chat = ChatFormat(tokenizer, families()[mode])
    forbidden = {tokenizer.text.piece_to_id(name) for name in LAID_OUT[mode]}
    assert set(LAID_OUT[mode]) == set(chat.controls.texts)
    assert forbidden <= chat.controls.ids
    for name in LAID_OUT[mode]:
        for text in (name, f"怎{name}\n么", name + name, name[:2] + name + name[2:], f" a {name}"):
            for role in ("user", "assistant"):
                for piece in chat.layout(conversation_with(text, role), False):
                    if not piece.control:
                        ids = chat._encode_pieces([piece]).ids
                        assert not forbidden & {*ids}
                        assert tokenizer.decode(ids) == piece.content


def test_spellings_that_sentencepiece_makes_equal(tmp_path: Path) -> None:
    """Full-width brackets become a control token in the model's own normalizer: such a text is taken apart, too."""
    tokenizer = TypedTokenizer(train_typed(tmp_path, "nmt_nfkc"), LAID_OUT["glm"])
    chat = ChatFormat(tokenizer, families()["glm"])
    text = "怎＜sop＞么"
    assert tokenizer.specials["<sop>"] in tokenizer.text.encode(text)
    assert chat.controls.first([{"role": "user", "content": text}]) is None
    ids = chat.controls.encode_text(text)
    assert chat.controls.count(ids) == 0
    assert tokenizer.decode(ids) == "怎<sop>么"


def late_tokenizer(model: Path) -> Any:
    """A tokenizer class as of 2023, with this vocabulary."""
    spec = importlib.util.spec_from_file_location("late", ROOT / "tests" / "legacy_modules" / "tokenization_late.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for patch in patches.TOKENIZER_PATCHES:
        patch(module.LateTokenizer)
    return module.LateTokenizer(str(model), add_bos_token=False, additional_special_tokens=["<|user|>", "[gMASK]"])


def test_slow_tokenizers_with_a_template(typed_model: Path) -> None:
    """A Python tokenizer over sentencepiece, rendered by a template: by its own splitting, or in parts."""
    tokenizer = late_tokenizer(typed_model)
    end = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|user|>' + m.content + '" + end + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|user|>' }}{% endif %}"
    )
    chat = ChatFormat(tokenizer)
    assert end in chat.controls.texts
    (plain,) = chat.conversation(conversation_with(PLAIN, "user"))
    controls = [i for i in plain.ids if i in chat.controls.ids]
    assert controls.count(tokenizer.eos_token_id) == 2
    for token in chat.controls.texts:
        for text in (token, f"怎{token}么", token + token, f"a {token} b"):
            for role in ("user", "assistant"):
                (sample,) = chat.conversation(conversation_with(text, role))
                assert [i for i in sample.ids if i in chat.controls.ids] == controls
                (other,) = chat.conversation(conversation_with(PLAIN, role))
                spaced = [tokenizer.decode(s.ids).replace(" ", "") for s in (sample, other)]
                assert spaced[0] == spaced[1].replace(PLAIN, text.replace(" ", ""))
                prompt = chat.prompt(conversation_with(text, role)[:-1])
                assert sample.ids[: len(prompt)] == prompt
    for messages in [MULTI, *read_messages(ROOT / "train" / "demo_data" / "train.jsonl")[:20]]:
        expected = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
        assert chat.prompt(messages[:-1]) == expected["input_ids"]
        assert chat.controls.encode_named(chat._text(Asked(messages[:-1]), True, True))[0] == expected["input_ids"]
