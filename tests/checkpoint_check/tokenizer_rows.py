"""Rows of the table: tokenizer and chat format."""

from typing import Any

from checkpoint_check.subject import TEXTS, Subject
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint


def vocabulary(subject: Subject) -> Any:
    """name -> id, read from the vocabulary file itself; None where it has no such name."""
    paths = sorted(subject.folder.glob("*.model"))
    if paths:
        import sentencepiece as spm

        pieces = spm.SentencePieceProcessor(model_file=str(paths[0]))
        first = first_id(subject)
        known = {pieces.id_to_piece(i): first + i for i in range(pieces.get_piece_size())}
        return known.get
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(subject.folder / "tokenizer.json")).token_to_id


def first_id(subject: Subject) -> int:
    """The id of the vocabulary's first piece: in ChatGLM-6B ids of images can come before it."""
    return getattr(getattr(subject.tokenizer, "sp_tokenizer", None), "num_image_tokens", 0)


def special_ids(subject: Subject) -> str:
    """bos, eos, pad, unk and the family's own tokens: the tokenizer's ids, the vocabulary's and config.json's agree."""
    tokenizer, find = subject.tokenizer, vocabulary(subject)
    said = []
    for name in ("bos", "eos", "pad", "unk"):
        token, index = getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")
        if token is None or index is None:
            continue
        assert find(str(token)) == index, f"{name} {token} is {index}, in the vocabulary {find(str(token))}"
        said.append(f"{name} {index}")
        named = subject.config.get(f"{name}_token_id")
        if isinstance(named, int) and name != "pad":
            ends = name == "eos" and named in subject.chat.stop_ids()
            assert named == index or ends, f"{name} is {index}, in config.json {named}"
    behind = getattr(
        getattr(tokenizer, "tokenizer", None), "special_tokens", {}
    )  # ChatGLM2 and 3 add them in their code
    for name in ("[MASK]", "[gMASK]", "<sop>", "sop", "<eop>", "eop", "<|user|>", "<|assistant|>"):
        index = find(name)
        if index is None and name in behind:
            index = tokenizer.get_command(name)
            assert tokenizer.vocab_size > index >= tokenizer.vocab_size - len(behind), f"{name} is {index}"
        if index is None:
            continue
        found = tokenizer.convert_tokens_to_ids(name)
        assert found == index, f"{name} is {found}, should be {index}"
        said.append(f"{name} {index}")
    for key, name in (("mask_token_id", "[MASK]"), ("gmask_token_id", "[gMASK]")):
        if key in subject.config:
            assert tokenizer.convert_tokens_to_ids(name) == subject.config[key], f"{name} is not config.json's {key}"
    return ", ".join(said)


def round_trip(subject: Subject) -> str:
    """Text to ids and back; plain text gets the vocabulary model's own ids."""
    tokenizer = subject.tokenizer
    for text in (*TEXTS, "第一行\n第二行\n\n  def f(x):\treturn x"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids)
        assert back.strip() == text.strip(), f"{text!r} came back as {back!r}"
    paths = sorted(subject.folder.glob("*.model"))
    if not paths:
        return f"{len(TEXTS) + 1} texts"
    import sentencepiece as spm

    pieces = spm.SentencePieceProcessor(model_file=str(paths[0]))
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = [first_id(subject) + index for index in pieces.encode(text)]
        assert ids == expected, f"{text!r}: {ids}, sentencepiece {expected}"
    return f"{len(TEXTS) + 1} texts, ids equal sentencepiece's"


def padded_texts(subject: Subject) -> str:
    """tokenizer(texts, padding=True): every row holds its own ids and padding."""
    tokenizer = subject.tokenizer
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    for text, row in zip(TEXTS, batch["input_ids"].tolist(), strict=True):
        ids = tokenizer(text)["input_ids"]
        if not tokenizer.is_fast:
            expected = tokenizer.build_inputs_with_special_tokens(
                tokenizer(text, add_special_tokens=False)["input_ids"]
            )
            assert ids == expected, f"{text!r} became {ids}, expected {expected}"
        rest = [tokenizer.pad_token_id] * (len(row) - len(ids))
        assert row == (rest + ids if tokenizer.padding_side == "left" else ids + rest), f"{text!r} became {row}"
    return f"{tuple(batch['input_ids'].shape)}, padding on the {tokenizer.padding_side}"


def added_token(subject: Subject) -> str:
    """A token added to a tokenizer gets an id that no other token has."""
    tokenizer = ChatModel(Checkpoint(subject.folder, trust_remote_code=True)).tokenizer
    taken = set(tokenizer.get_vocab().values())
    tokenizer.add_tokens(["<a_token_of_the_check>"])
    index = tokenizer.convert_tokens_to_ids("<a_token_of_the_check>")
    assert index not in taken, f"id {index} is taken"
    assert index >= tokenizer.vocab_size, f"id {index} is within the vocabulary"
    text = "a<a_token_of_the_check>b"
    assert index in tokenizer(text)["input_ids"], f"{text!r} has no {index}"
    return f"id {index}"


def chat_format(subject: Subject) -> str:
    """What is learned of a conversation of two turns is its answers; the prompt is the beginning of the sample."""
    tokenizer, chat = subject.tokenizer, subject.chat
    messages = [
        {"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！有什么可以帮您？"},
        {"role": "user", "content": "2 + 3 = ?"}, {"role": "assistant", "content": "It is 5."},
    ]  # fmt: skip
    samples = chat.conversation(messages)
    learned = [tokenizer.decode([i for i, on in zip(s.ids, s.learned, strict=True) if on]) for s in samples]
    for i in (1, 3):
        assert any(messages[i]["content"] in text for text in learned), f"learned: {learned}"
    prompt = chat.prompt(messages[:3])
    assert samples[-1].ids[: len(prompt)] == prompt, "the prompt is not the beginning of the sample"
    return f"{chat.name}, {len(samples)} sample(s) of two turns"
