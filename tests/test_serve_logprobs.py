"""What is told of tokens: their bytes, where they begin in the text, in both routes and while they come."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serve_inside import ask, opened, user
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from serve.model import lanes
from serve.model.asked import read_completion
from serve.model.exchange import Exchange
from serve.model.forms import Form, gathered
from serve.model.lanes import Event
from serve.model.sampling import Logprob
from serve.model.text import Offsets, token_bytes, token_name
from serve.settings import Model

TEXT = "naïve 世界 🦊🦊  two\n\nééé 好"


@pytest.fixture(scope="module")
def service(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tiny model whose tokens are bytes, and what was often together."""
    with opened(Model(checkpoints["llama"]), tmp_path_factory.mktemp("x") / "feedback.jsonl") as found:
        yield found


def llama2() -> PreTrainedTokenizerFast:
    """Sentencepiece's blanks, with bytes for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁▁", "a", "▁a", "世", "�"]
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def begins_of(raws: list[bytes]) -> list[int]:
    """Where tokens begin, by hand: the whole characters of all bytes before them."""
    before = [b"".join(raws[:k]) for k in range(len(raws))]
    return [len(one.decode(errors="ignore")) for one in before]


def test_bytes_of_tokens_add_up_to_the_text(service: Any) -> None:
    ids = service.model.tokenizer(TEXT)["input_ids"]
    raws = [service.token_bytes(token) for token in ids]
    assert b"".join(raws) == TEXT.encode()
    halves = [raw for raw in raws if "�" in raw.decode(errors="replace")]
    assert len(halves) > 3
    assert token_name("世".encode()[:2]) == r"\xe4\xb8"
    assert token_name(" 世".encode()[:2], "bytes:") == r"bytes: \xe4"
    assert service.token_bytes(service.model.tokenizer.convert_tokens_to_ids("<|im_end|>")) == b"<|im_end|>"
    llama = llama2()
    pieces = ["▁a", "▁▁", "<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>", "世", "▁", "�"]
    raws = [token_bytes(llama, token) for token in llama.convert_tokens_to_ids(pieces)]
    assert raws == [b" a", b"  ", b"\xf0", b"\x9f", b"\xa6", b"\x8a", "世".encode(), b" ", "�".encode()]
    tiktoken = SimpleNamespace(decode=lambda ids: "�", convert_ids_to_tokens=lambda token: b"\xe4\xbd")  # Qwen-7B's
    assert token_bytes(tiktoken, 5) == b"\xe4\xbd"
    assert token_bytes(SimpleNamespace(decode=lambda ids: "", convert_ids_to_tokens=lambda token: None), 5) == b""


def test_offsets_are_of_the_text(service: Any) -> None:
    ids = service.model.tokenizer(TEXT)["input_ids"]
    offsets = Offsets(service.decode)
    assert [offsets.place(token) for token in ids] == begins_of([service.token_bytes(token) for token in ids])
    llama = llama2()
    pieces = ["▁a", "<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>", "<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>", "世", "</s>", "▁a"]
    offsets = Offsets(lambda ids: llama.decode(ids, skip_special_tokens=True))
    found = [offsets.place(token) for token in llama.convert_tokens_to_ids(pieces)]
    assert found == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 4]  # "a🦊🦊世 a": the first blank is not in the text
    whole = {1: "好�", 2: "好的"}  # a token that ends a character and begins another one
    assert [Offsets(lambda ids: whole.get(len(ids), "")).place(0)] == [0]
    mixed = Offsets(lambda ids: whole.get(len(ids), ""))
    assert [mixed.place(7), mixed.place(8), mixed.place(9)] == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_answers_of_parts_of_characters(service: Any, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """The model is made to write TEXT: both routes tell its bytes and where each token of it begins."""
    ids = service.model.tokenizer(TEXT)["input_ids"]
    said = iter([*ids, *ids])
    monkeypatch.setattr(lanes, "choose", lambda samplers, seen, logits: [next(said) for _ in samplers])
    both = {"max_tokens": len(ids), "stream": stream}
    completion = ask(service, ("/v1/completions", both | {"prompt": "A book", "logprobs": 5}))[0][1]
    chat = both | {"messages": user("x"), "logprobs": True, "top_logprobs": 5}
    chatted = ask(service, ("/v1/chat/completions", chat))[0][1]
    if not stream:
        completion, chatted = [completion], [chatted]
    found = [choice["logprobs"] for event in completion for choice in event["choices"] if choice["logprobs"]]
    assert "".join(choice["text"] for event in completion for choice in event["choices"]) == TEXT
    raws = [service.token_bytes(token) for token in ids]
    assert [place for one in found for place in one["text_offset"]] == begins_of(raws)
    assert [name for one in found for name in one["tokens"]] == [token_name(raw, "bytes:") for raw in raws]
    assert all(len(top) == 5 for one in found for top in one["top_logprobs"])  # no two of them have one name
    told = [choice["logprobs"] for event in chatted for choice in event["choices"] if choice["logprobs"]]
    assert b"".join(bytes(one["bytes"]) for part in told for one in part["content"]) == TEXT.encode()


@pytest.mark.parametrize("chat", [False, True])
def test_others_are_served_while_many_are_written(service: Any, chat: bool) -> None:
    count, done = 4000, list[Any]()
    found = [Logprob(i % service.vocabulary, -1.0, [(i % 7, -2.0)]) for i in range(count)]
    asked = read_completion({"prompt": "x", "logprobs": 1}, service.limits).asked

    async def in_order(work: Any) -> Any:
        """As the service's, which tells what was done."""
        result = await type(service).in_order(service, work)
        done.append(len(result) if isinstance(result, dict) else "prompt")
        return result

    async def told() -> Any:
        yield 0, Event("x", found[:1000])
        yield 0, Event("y", found[1000:], "length")

    async def both() -> Any:
        form = Form(Exchange(service, asked, [[1]]), chat)
        whole = asyncio.ensure_future(gathered(form, told()))
        while not done:
            await asyncio.sleep(0)
        await service.prompt(user("x"), [], {})
        return await whole

    service.in_order = in_order
    try:
        body = json.loads(asyncio.run(both()).body)
    finally:
        del service.in_order
    assert "prompt" in done[1:-8]
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {count}
    assert (choice["message"]["content"] if chat else choice["text"]) == "xy"
    assert body["usage"]["total_tokens"] == 1
