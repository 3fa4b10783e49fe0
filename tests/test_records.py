"""Validation: every kind of bad line is named with its number; good files pass."""

import json
from pathlib import Path

import pytest

from llmops import files
from llmops.console import UserError
from llmops.conversations.data_files import read_conversations, validate_files
from llmops.conversations.records import BadRow
from llmops.conversations.shapes import convert

GOOD = {"messages": [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "Pong!"}]}


def messages(*turns: tuple[str, object]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}).encode()


@pytest.mark.parametrize(
    ("raw", "phrase"),
    [
        (b'{"messages": [', "broken JSON"),
        (b'["no", "object"]', "expected an object"),
        (b'{"text": "x"}', "no 'messages' (keys found: 'text')"),
        (b'{"messages": []}', "'messages' is empty"),
        (b'{"messages": "hello"}', "not a list"),
        (b'{"messages": [1, 2]}', "no object with 'role' and 'content'"),
        (messages(("user", "a"), ("bot", "b")), "unknown role 'bot'"),
        (messages(("user", "a"), ("user", "b"), ("assistant", "c")), "two user messages in a row"),
        (messages(("user", "a"), ("assistant", "b"), ("user", "c")), "expected the assistant's answer"),
        (messages(("assistant", "a"), ("user", "b")), "expected system or user here"),
        (messages(("user", "a"), ("system", "s"), ("assistant", "b")), "has the role system, expected assistant"),
        (messages(("user", "a"), ("assistant", 3)), "content is a JSON int, expected a string"),
        (messages(("user", "a"), ("assistant", None)), "content is a JSON NoneType"),
        (messages(("user", " "), ("assistant", "b")), "message 1 (user) is empty"),
        ('{"messages": "你好"}'.encode("gb18030"), "not UTF-8"),
        (b"[" * 100_000, "broken JSON"),
    ],
)
def test_bad_line_is_named(raw: bytes, phrase: str) -> None:
    assert phrase in str(problem_of(raw))


def problem_of(raw: bytes) -> str | None:
    """What is wrong with a line."""
    value, problem = files.parse_line(raw)
    try:
        return problem or (convert(value) and None)
    except BadRow as error:
        return str(error)


def test_good_lines_pass() -> None:
    for raw in (
        json.dumps(GOOD).encode(),
        messages(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        messages(("system", ""), ("user", "a"), ("assistant", "b")),
    ):
        assert problem_of(raw) is None


def test_all_bad_lines_at_once_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), b"{", b"", b'{"messages": []}', json.dumps(GOOD).encode()]))
    with pytest.raises(UserError) as caught:
        validate_files([path])
    text = str(caught.value)
    assert f"{path}:2: broken JSON" in text
    assert f"{path}:4: 'messages' is empty" in text
    assert "2 of 4 lines" in text
    found = validate_files([path], skip_bad_lines=True)
    assert (found.good, found.bad) == (2, 2)


def test_many_bad_lines_are_all_numbered(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"{\n" * 50)
    with pytest.raises(UserError, match=r"and 30 more, lines 21, .* 50$"):
        validate_files([path])


def test_another_encoding_is_explained_once_for_its_file(tmp_path: Path) -> None:
    line = '{"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好"}]}\n'
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_bytes(line.encode("gb18030") * 12)
    second.write_bytes(line.encode() + line.encode("gb18030") * 2 + b"{\n")
    with pytest.raises(UserError) as caught:
        validate_files([first, second])
    text = str(caught.value)
    assert text.count("from GBK: iconv") == 2
    assert f"{first}:1: not UTF-8" in text
    assert f"{second}:2: not UTF-8" in text
    assert f"{second}:4: broken JSON" in text
    assert text.endswith("and 12 more, lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 3")


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"PK\x03\x04\x14\n{}\n\xff\xfe\n", "but an Office document or archive; save the table as csv"),
        ("\ufeff你好\n".encode("utf-16-le") * 3, "but UTF-16"),
        (b"\x1f\x8b\x08\n\n\n", "but compressed"),
    ],
)
def test_what_is_no_text_is_told_before_its_lines(tmp_path: Path, content: bytes, phrase: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    for skip in (False, True):
        with pytest.raises(UserError, match=phrase) as caught:
            validate_files([path], skip_bad_lines=skip)
        assert str(caught.value).startswith(f"{path}: not UTF-8 but ")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"{\n"])
def test_file_without_a_usable_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no usable line"):
        validate_files([path], skip_bad_lines=True)


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert [row.conversation.messages for row in read_conversations(path)] == [GOOD["messages"]]
