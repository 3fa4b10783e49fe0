"""Tokenizers of old checkpoints: each symptom there without its patch, gone with it.

`tests/check_checkpoint.sh` runs the same and more on the vendors' real code.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm

from legacy.styles import Make, trusted_tokenizer
from llmops.console import UserError


def test_special_tokens_get_the_vocabularys_ids(make: Make) -> None:
    with pytest.raises(UserError, match=r"AttributeError|TypeError"):
        trusted_tokenizer(make("alibi", without="special_tokens_before_vocabulary"))
    folder = make("alibi")
    tokenizer = trusted_tokenizer(folder)
    pieces = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer("hello 你好")["input_ids"] == pieces.encode("hello 你好")
    assert tokenizer.decode(pieces.encode("hello 你好")) == "hello 你好"


def test_old_pad_is_called_without_padding_side(make: Make) -> None:
    texts = ["hello", "hello and more 你好"]
    with pytest.raises(TypeError, match="padding_side"):
        trusted_tokenizer(make("rotary", without="padding_side_not_accepted"))(texts, padding=True)
    tokenizer = trusted_tokenizer(make("rotary"))
    batch = tokenizer(texts, padding=True)
    for text, row, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        ids = tokenizer(text)["input_ids"]
        assert row[-len(ids) :] == ids
        assert mask == [0] * (len(row) - len(ids)) + [1] * len(ids)


def test_an_added_token_gets_a_free_id(make: Make) -> None:
    def added(folder: Path) -> tuple[int, int]:
        tokenizer = trusted_tokenizer(folder)
        tokenizer.add_tokens(["<new>"])
        return tokenizer.convert_tokens_to_ids("<new>"), tokenizer.vocab_size

    index, size = added(make("rotary", without="ids_without_a_name"))
    assert index < size  # the id of another token
    index, size = added(make("rotary"))
    assert index == size


def test_an_id_beyond_the_vocabulary_is_no_text(make: Make) -> None:
    with pytest.raises(IndexError):
        trusted_tokenizer(make("alibi", without="ids_beyond_the_vocabulary")).decode([200, 299])
    tokenizer = trusted_tokenizer(make("alibi"))
    assert tokenizer.decode([200, 299]) == tokenizer.decode([200])


def saved_again(tokenizer: Any, tmp_path: Path) -> Any:
    """A tokenizer that was saved and loaded from there."""
    saved = tmp_path / f"saved-{len(list(tmp_path.iterdir()))}"
    tokenizer.save_pretrained(saved)
    return trusted_tokenizer(shutil.copytree(saved, config_beside(saved, tmp_path)))


def test_a_saved_tokenizer_keeps_its_settings(make: Make, tmp_path: Path) -> None:
    """add_bos_token is not saved by the library; spare_ids, which moves every id, was not handed to it."""
    lost = saved_again(trusted_tokenizer(make("alibi", without="settings_not_saved")), tmp_path)
    tokenizer = trusted_tokenizer(make("alibi"))
    expected = tokenizer("hello")["input_ids"]
    assert lost("hello")["input_ids"] == [1, *(200 + index for index in expected)]
    assert saved_again(tokenizer, tmp_path)("hello")["input_ids"] == expected
    tokenizer.add_bos_token = True  # changed after it was loaded
    assert saved_again(tokenizer, tmp_path)("hello")["input_ids"] == [1, *expected]


def test_a_prompt_is_ended_once(make: Make) -> None:
    """The library builds the inputs a second time, for their token types; the class lengthens the list it gets."""

    def ended(folder: Path) -> list[int]:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"add_eos_token": True}), encoding="utf-8")
        return trusted_tokenizer(folder)("hello")["input_ids"]

    plain = trusted_tokenizer(make("alibi"))("hello")["input_ids"]
    assert ended(make("alibi", without="prompt_ended_twice")) == [*plain, 2, 2]
    assert ended(make("alibi")) == [*plain, 2]


def test_an_end_token_that_has_an_id_and_no_name(make: Make) -> None:
    with pytest.raises(UserError, match="has no end token"):
        trusted_tokenizer(make("rotary", without="end_token_without_a_name"))
    tokenizer = trusted_tokenizer(make("rotary"))
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 2)
    assert None not in tokenizer(["hello", "a"], padding=True)["input_ids"]


def test_a_setting_that_is_given_twice(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple values for keyword argument 'clean_up_tokenization_spaces'"):
        saved_again(trusted_tokenizer(make("rotary", without="setting_given_twice")), tmp_path)
    tokenizer = trusted_tokenizer(make("rotary"))
    assert saved_again(tokenizer, tmp_path)("hello")["input_ids"] == tokenizer("hello")["input_ids"]


def config_beside(saved: Path, tmp_path: Path) -> Path:
    """Give a saved tokenizer the config.json of a model, as a whole checkpoint has; the folder to copy it to."""
    (saved / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {}}), encoding="utf-8")
    return tmp_path / f"{tmp_path.name}-{saved.name}-copy"


def test_a_vocabulary_file_that_was_not_kept_is_saved(make: Make, tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="vocab_file"):
        trusted_tokenizer(make("rotary", without="vocabulary_file_forgotten")).save_pretrained(tmp_path)
    folder = make("rotary")
    trusted_tokenizer(folder).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_batch_encode_plus_is_another_name(make: Make) -> None:
    """What the vendors' `model.chat` calls."""
    with pytest.raises(AttributeError, match="batch_encode_plus"):
        trusted_tokenizer(make("rotary", without="batches_only_by_calling")).batch_encode_plus(["hello"])
    tokenizer = trusted_tokenizer(make("rotary"))
    assert tokenizer.batch_encode_plus(["hello", "a"])["input_ids"] == tokenizer(["hello", "a"])["input_ids"]
