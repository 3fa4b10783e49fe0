"""The shapes and kinds of files that people's data has: the same ids and learned tokens in each, broken rows named."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import chat_main

from llmops.console import UserError
from llmops.conversations import data_files, shapes
from llmops.conversations.records import BadRow
from llmops.formats.chat_format import ChatFormat, Rendered
from llmops.formats.families import families
from llmops.formats.layouts import LAYOUTS
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from train.source import Source
from train.token_cache import load_or_encode

Row = dict[str, Any]
SYSTEM, Q1, A1, Q2, A2 = "请简短回答。", "怎么续借？\n急", "点续借。", "逾期呢", "每天0.1元"
PAIRS = [("human", Q1), ("gpt", A1), ("human", Q2), ("gpt", A2)]
MESSAGES = [
    {"role": "system", "content": SYSTEM}, {"role": "user", "content": Q1}, {"role": "assistant", "content": A1},
    {"role": "user", "content": Q2}, {"role": "assistant", "content": A2},
]  # fmt: skip
TWO_TURNS: dict[str, Row] = {
    "messages": {"messages": MESSAGES},
    "messages beside a system text": {"system": SYSTEM, "messages": MESSAGES[1:]},
    "messages of a table": {"messages": json.dumps(MESSAGES, ensure_ascii=False), "tools": ""},
    "ShareGPT": {"system": SYSTEM, "conversations": [{"from": f, "value": v} for f, v in PAIRS]},
    "ShareGPT with its system turn": {
        "conversations": [{"from": "system", "value": SYSTEM}, *({"from": f, "value": v} for f, v in PAIRS)]
    },
    "ShareGPT of ms-swift": {
        "system": SYSTEM, "conversation": [{"human": Q1, "assistant": A1}, {"human": Q2, "assistant": A2}]
    },
    "Alpaca": {"instruction": Q2, "input": "", "output": A2, "system": SYSTEM, "history": [[Q1, A1]]},
    "Alpaca with its input in two parts": {
        "instruction": Q2[:1], "input": Q2[1:], "output": A2, "system": SYSTEM, "history": [[Q1, A1]]
    },
    "query and response": {"query": Q2, "response": A2, "system": SYSTEM, "history": [[Q1, A1]]},
    "question and answer": {"question": Q2, "answer": A2, "system": SYSTEM, "history": json.dumps([[Q1, A1]])},
    "problem and target": {"problem": Q2, "target": A2, "system": SYSTEM, "history": [[Q1, A1]]},
    "prompt and completion": {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]},
    "prompt and completion as texts": {"prompt": Q2, "completion": A2, "system": SYSTEM, "history": [[Q1, A1]]},
}  # fmt: skip

WEATHER = {
    "name": "get_weather", "description": "当前天气",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip
CALLS = [{"name": "get_weather", "arguments": {"city": city}} for city in ("北京", "上海")]
OPENAI_CALLS = [{"type": "function", "function": call} for call in CALLS]
TEXT_CALLS = [{"function": call | {"arguments": json.dumps(call["arguments"])}} for call in CALLS]
ASKED, SAID = {"role": "user", "content": "天气？"}, {"role": "assistant", "content": "都晴。"}
TOOL_TURNS: dict[str, Row] = {
    "messages": {
        "tools": [{"type": "function", "function": WEATHER}],
        "messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": OPENAI_CALLS},
                     {"role": "tool", "content": "晴"}, {"role": "tool", "content": "多云"}, SAID],
    },
    "messages with arguments as text": {
        "tools": [WEATHER],
        "messages": [ASKED, {"role": "assistant", "tool_calls": TEXT_CALLS},
                     {"role": "tool", "content": "晴"}, {"role": "tool", "content": "多云"}, SAID],
    },
    "ms-swift": {
        "tools": json.dumps([WEATHER]),
        "messages": [ASKED, *({"role": "tool_call", "content": json.dumps(call)} for call in CALLS),
                     {"role": "tool_response", "content": "晴"}, {"role": "tool_response", "content": "多云"}, SAID],
    },
    "ShareGPT": {
        "tools": json.dumps([WEATHER], ensure_ascii=False),
        "conversations": [
            {"from": "human", "value": "天气？"}, {"from": "function_call", "value": json.dumps(CALLS)},
            {"from": "observation", "value": "晴"}, {"from": "observation", "value": "多云"},
            {"from": "gpt", "value": "都晴。"},
        ],
    },
}  # fmt: skip
TOOL_TEMPLATE = (  # as Qwen's: tools in the system text, calls and results between tags
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson + '\\n' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>' + m.content"
    " + '</tool_response><|im_end|>\\n' }}{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for c in m.tool_calls %}{{ '<tool_call>' + c.function.name + ' ' + ARGUMENTS + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
AS_OBJECT, AS_TEXT = (TOOL_TEMPLATE.replace("ARGUMENTS", f"c.function.arguments{how}") for how in (" | tojson", ""))


@pytest.fixture(scope="module")
def chat(checkpoints: dict[str, Path]) -> ChatFormat:
    return ChatModel(Checkpoint(checkpoints["llama"])).chat


def rendered(chat: ChatFormat, row: Row) -> list[Rendered]:
    conversation, _ = shapes.convert(row)
    return chat.conversation(conversation.messages, conversation.tools, conversation.learned)


def learned_text(chat: ChatFormat, sample: Rendered) -> str:
    return chat.tokenizer.decode([i for i, flag in zip(sample.ids, sample.learned, strict=True) if flag])


@pytest.mark.parametrize("name", TWO_TURNS)
def test_one_conversation_in_every_shape(chat: ChatFormat, name: str) -> None:
    expected = chat.conversation(MESSAGES)
    found = rendered(chat, TWO_TURNS[name])
    if name == "Alpaca with its input in two parts":  # the input stands on a line of its own
        assert chat.tokenizer.decode(found[0].ids).count("逾\n期呢") == 1
    else:
        assert found == expected
    assert learned_text(chat, found[0]) == f"{A1}<|im_end|>{A2}<|im_end|>"


def test_an_empty_column_of_preference_data_says_nothing(chat: ChatFormat) -> None:
    more = {"rejected_response": "", "rejected_messages": [], "label": None}
    assert rendered(chat, TWO_TURNS["messages"] | more) == chat.conversation(MESSAGES)


@pytest.fixture(scope="module", params=[AS_OBJECT, AS_TEXT], ids=["object", "text"])
def tool_chat(checkpoints: dict[str, Path], request: pytest.FixtureRequest) -> ChatFormat:
    """A template that knows tools and wants a call's arguments as an object, or as text."""
    tokenizer = ChatModel(Checkpoint(checkpoints["llama"])).tokenizer
    tokenizer.chat_template = request.param
    return ChatFormat(tokenizer)


def test_one_conversation_with_tools_in_every_shape(tool_chat: ChatFormat) -> None:
    """Two calls at once and both results."""
    found = {name: rendered(tool_chat, row) for name, row in TOOL_TURNS.items()}
    assert all(samples == found["messages"] for samples in found.values())
    text = learned_text(tool_chat, found["ShareGPT"][0])
    calls = [json.loads(part.split("</tool_call>")[0]) for part in text.split("get_weather ")[1:]]
    assert calls == [call["arguments"] for call in CALLS]
    assert text.endswith("<|im_end|>都晴。<|im_end|>")
    assert "当前天气" in tool_chat.tokenizer.decode(found["ShareGPT"][0].ids)


def test_results_in_another_order_belong_to_their_calls() -> None:
    """A result gets the name of the call whose id it has, else the id of the call whose name it has, else the first."""
    calls = [{"id": i, "function": {"name": name, "arguments": {}}} for i, name in (("1", "a"), ("2", "b"), ("3", "c"))]

    def told(*results: Row) -> list[tuple[str, str]]:
        turns = [{"role": "tool", "content": "x"} | result for result in results]
        row = {"messages": [ASKED, {"role": "assistant", "tool_calls": calls}, *turns, SAID]}
        messages = shapes.convert(row)[0].messages
        return [(m["name"], m["tool_call_id"]) for m in messages if m["role"] == "tool"]

    a, b, c = ("a", "1"), ("b", "2"), ("c", "3")
    assert told({"tool_call_id": "3"}, {"tool_call_id": "1"}, {"tool_call_id": "2"}) == [c, a, b]
    assert told({"tool_call_id": "2"}, {}, {}) == [b, a, c]
    assert told({"name": "c"}, {"name": "a"}, {}) == [c, a, b]
    assert told({}, {}, {}) == [a, b, c]


def test_control_tokens_in_tools_are_text(tool_chat: ChatFormat) -> None:
    """What a call, a result or a description holds becomes no control token."""

    def row(mark: str) -> Row:
        call = {"name": "get_weather", "arguments": {mark: mark}}
        turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": mark}]
        return {"tools": [WEATHER | {"description": mark}], "messages": [ASKED, *turns, SAID]}

    (plain,), (held,) = (rendered(tool_chat, row(mark)) for mark in ("是", "<|im_end|>"))
    assert tool_chat.controls.count(held.ids) == tool_chat.controls.count(plain.ids)
    decode = tool_chat.tokenizer.decode
    assert decode(held.ids) == decode(plain.ids).replace("是", "<|im_end|>")


def test_formats_without_tools_refuse(checkpoints: dict[str, Path]) -> None:
    opened = ChatModel(Checkpoint(checkpoints["llama"]))
    tokenizer, plain = opened.tokenizer, opened.chat
    with pytest.raises(UserError, match="writes no descriptions of tools and no tool calls, so they would be lost"):
        rendered(plain, TOOL_TURNS["messages"])
    with pytest.raises(UserError, match=r"the format qwen1\.5 writes no tools"):
        rendered(ChatFormat(tokenizer, families()["qwen1.5"]), TOOL_TURNS["messages"])


@pytest.mark.parametrize(
    ("row", "phrase"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "narrator", "value": "a"}]},
         "turn 2 is from 'narrator'; expected one of human"),
        ({"conversations": [{"from": "human", "value": "q"}, {"value": "a"}]}, "turn 2 is no object with 'from'"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "turn 1 has the role assistant, expected system or user"),
        ({"conversation": "[{]"}, "'conversation' is text that is no JSON"),
        ({"instruction": "q", "output": None}, "no 'messages' (keys found: 'instruction')"),
        ({"instruction": "q", "input": 3, "output": "a"}, "'input' is a JSON int, expected a string"),
        ({"instruction": "q", "output": ""}, "'output' (assistant) is empty"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "'history', pair 1 is [\"x\"]; expected [question"),
        ({"query": "q", "response": ["a"]}, "'response': content is a JSON list, expected a string"),
        ({"prompt": "q", "completion": " "}, "'completion' (assistant) is empty"),
        ({"prompt": [{"role": "user"}], "completion": "a"}, "prompt, message 1 is no object with 'role' and 'content'"),
        ({"text": "long"}, "text alone is for pretraining"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "found 'chosen' and 'rejected'"),
        ({"conversations": [{"from": "human", "value": "q"}], "chosen": {}, "rejected": {}}, "preference data"),
        ({"messages": [ASKED, SAID], "rejected_response": "b", "rejected_messages": []},
         "there is 'rejected_response': two answers to choose"),
        ({"messages": [ASKED, SAID], "label": False}, "'label' is false: a mark of good and bad answers is"),
        ({"instruction": "q", "output": "a", "kto_tag": True}, "'kto_tag' is true: a mark of good and bad"),
        ({"query": "q", "response": "a", "label": False}, "'label' is false: a mark"),
        ({"instruction": "q", "question": "q", "intent": "i", "output": "a"}, "are learned with SCENARIO=faq"),
        ({"messages": [ASKED, {"role": "tool_call", "content": "{"}, SAID]}, "message 2: the call is no JSON"),
        ({"messages": [ASKED, {"role": "tool_call", "content": "{\"name\": \"x\"}"}, SAID]},
         "message 3: two assistant messages in a row"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "["}}]}]},
         "message 2: the arguments of x are no JSON"),
        ({"messages": [ASKED, SAID], "tools": "{\"name\": \"x\"}"}, "'tools' is a JSON dict, expected a list"),
        ({"messages": [ASKED, SAID], "tools": ["x"]}, "tool 1 is 'x', expected a function with 'name'"),
        ({"messages": [ASKED, SAID | {"loss": 1}]}, "message 2: 'loss' is 1, expected true or false"),
        ({"messages": [ASKED, SAID | {"loss": False}]}, "'loss' is false or 'weight' 0 for every"),
        ({"messages": [ASKED, SAID | {"weight": 0}]}, "'loss' is false or 'weight' 0 for every answer"),
        ({"messages": [ASKED, SAID | {"weight": 0.5}]}, "message 2: 'weight' is 0.5, expected 0 or 1"),
        ({"messages": [ASKED, SAID | {"weight": True}]}, "message 2: 'weight' is true, expected 0 or 1"),
        ({"messages": [ASKED, SAID | {"weight": [1]}]}, "message 2: 'weight' is [1], expected 0 or 1"),
        ({"messages": [ASKED | {"weight": 1}, SAID]}, "message 1: 'weight' is 1; only an assistant's message can be"),
        ({"system": "s", "messages": [{"role": "system", "content": "t"}, ASKED, SAID]}, "two system messages"),
    ],
)  # fmt: skip
def test_a_broken_row_says_what_was_found(row: Row, phrase: str) -> None:
    with pytest.raises(BadRow) as caught:
        shapes.convert(row)
    assert phrase in str(caught.value)


def test_what_is_learned(chat: ChatFormat) -> None:
    """`loss` or `weight` on a message, the completion alone, and the answers after the last question."""
    quiet = [m | {"loss": i != 2} if m["role"] == "assistant" else m for i, m in enumerate(MESSAGES)]
    light = [m | {"weight": int(i != 2)} if m["role"] == "assistant" else m for i, m in enumerate(MESSAGES)]
    weights = [m | {"weight": (None, None, 0.0, 0, 1.0)[i]} for i, m in enumerate(MESSAGES)]  # as a table has them
    for row in (
        {"messages": quiet},
        {"messages": light},
        {"messages": weights},
        {"prompt": MESSAGES[:4], "completion": MESSAGES[4:]},
    ):
        (sample,) = rendered(chat, row)
        assert learned_text(chat, sample) == f"{A2}<|im_end|>"
        assert sample.ids == chat.conversation(MESSAGES)[0].ids
    last = shapes.convert({"messages": MESSAGES})[0].learning("last")
    assert last.learned == (False, False, False, False, True)
    assert shapes.convert(TOOL_TURNS["ShareGPT"])[0].learning("last").learned == (False, True, False, False, True)
    marked = [m | {"learned": i == 4} for i, m in enumerate(MESSAGES)]
    assert [piece.content for piece in LAYOUTS["glm3"](marked, False) if piece.learned] == ["\n", A2, "</s>"]
    assert [piece.content for piece in LAYOUTS["glm2"](marked, False) if piece.learned] == [A2, "</s>"]


# --- kinds of files


def write(path: Path, rows: list[Row]) -> Path:
    """Rows as a file of the kind that its name says."""
    import datasets

    flat = [{k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in row.items()} for row in rows]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.DictWriter(stream, list(flat[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(flat)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path if not path.suffix else path.with_suffix(""))
        if path.suffix == ".arrow":
            return next(path.with_suffix("").glob("*.arrow"))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "saved"])
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    """The same conversations come out; the third row is broken and named with its place."""
    rows = [TWO_TURNS["Alpaca"], TWO_TURNS["Alpaca"] | {"output": "x\ny"}, TWO_TURNS["Alpaca"] | {"output": " "}]
    path = write(tmp_path / name, rows)
    assert data_files.problems_of(str(path), "the data", "") == []
    found = list(data_files.read_conversations(path))
    assert [read.conversation.messages for read in found[:1]] == [MESSAGES]
    assert found[1].conversation.messages[-1]["content"] == "x\ny"
    begins = path.read_text().splitlines() if name == "a.json" else []
    third = [number for number, line in enumerate(begins, 1) if line == " {"][2:]
    place = {"a.jsonl": ":3", "a.json": f":{(third or [0])[0]}", "a.csv": ":5", "a.tsv": ":5"}
    with pytest.raises(UserError) as caught:
        data_files.validate_files([path])
    assert f"{path}{place.get(name, ', row 3')}: 'output' (assistant) is empty; expected text" in str(caught.value)
    assert data_files.validate_files([path], skip_bad_lines=True).words() == "Alpaca, 2 conversations"


def test_tools_survive_a_table(tmp_path: Path, chat: ChatFormat) -> None:
    """Arrow gives every message all keys and every call all arguments; what is null there was not there."""
    other = {"tools": [WEATHER], "messages": [ASKED, {"role": "assistant", "tool_calls": [
        {"type": "function", "function": {"name": "get_weather", "arguments": {"day": "今天"}}}]}]}  # fmt: skip
    path = write(tmp_path / "a.parquet", [TOOL_TURNS["messages"], other])
    expected = [shapes.convert(row)[0] for row in (TOOL_TURNS["messages"], other)]
    assert [read.conversation for read in data_files.read_conversations(path)] == expected


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_broken_table_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"the (parquet|arrow) file .* cannot be loaded \(.*\); write it again"):
        list(data_files.read_conversations(tmp_path / name))


def test_a_broken_saved_dataset_is_one_sentence(tmp_path: Path) -> None:
    """The package reads its own files trustingly: an AttributeError, or waiting for ever for a pipe."""
    write(tmp_path / "saved", [TOOL_TURNS["messages"]])
    (tmp_path / "saved" / "dataset_info.json").write_text('"text"', encoding="utf-8")
    with pytest.raises(UserError, match=r"the saved dataset .* cannot be loaded \(.*\); write it again"):
        list(data_files.read_conversations(tmp_path / "saved"))
    table = next((tmp_path / "saved").glob("*.arrow"))
    table.unlink()
    os.mkfifo(table)
    with pytest.raises(UserError, match=rf"{table} is a named pipe, expected a file"):
        list(data_files.read_conversations(tmp_path / "saved"))


def test_several_files_and_mixed_shapes(
    tmp_path: Path, chat: ChatFormat, checkpoints: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Commas and globs; each row by its keys, said; a place names the file, too."""
    write(tmp_path / "a.jsonl", [TWO_TURNS["ShareGPT"], TWO_TURNS["Alpaca"]])
    write(tmp_path / "b1.parquet", [TWO_TURNS["query and response"]])
    write(tmp_path / "b2.parquet", [TWO_TURNS["query and response"]])
    paths = data_files.list_files(f"{tmp_path}/a.jsonl, {tmp_path}/b*.parquet")
    assert [path.name for path in paths] == ["a.jsonl", "b1.parquet", "b2.parquet"]
    data_files.check_files(paths, False)
    said = capfd.readouterr().err
    assert "a.jsonl: 2 conversations (ShareGPT 1, Alpaca 1)" in said
    assert "b1.parquet and 1 more: parquet, checked once the packages are there" in said
    data = load_or_encode(Source(tuple(paths), checkpoints["llama"], "auto", 256, False), chat, tmp_path / "cache")
    assert len({data[i]["ids"].tobytes() for i in range(4)}) == 1
    assert [data.place(i) for i in (1, 3)] == [f"{tmp_path}/a.jsonl, line 2", f"{tmp_path}/b2.parquet, row 1"]
    assert "4 conversations (query and response 2, ShareGPT 1, Alpaca 1)" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"no file matches .*/c\*\.csv"):
        data_files.list_files(f"{tmp_path}/c*.csv")
    assert data_files.problems_of(str(tmp_path), "the data", "") == [
        f"the data {tmp_path} is a folder, expected a file, or a folder that datasets.save_to_disk wrote"
    ]


def test_the_check_of_the_command(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """chat_main.sh says the shape, and names the row of an array that cannot be used."""
    model = ("--model_name_or_path", str(checkpoints["llama"]), "--output_path", str(tmp_path / "out"))
    path = write(tmp_path / "train.json", [TWO_TURNS["ShareGPT"]] * 2 + [{"conversations": []}])
    run = chat_main(*model, "--train_file", str(path), timeout=60)
    assert run.returncode == 2
    assert f"1 of 3 lines of {path} cannot be used" in run.stderr
    assert "'conversations' is empty or not a list; expected turns of 'from' and 'value'" in run.stderr
