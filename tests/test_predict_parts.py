"""faq/predict in parts: the answers of all at once, kept part by part; lengths are checked before the first one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_baselines import WORDS, questions, write, write_catalog
from test_orders import louder

from faq import predict
from llmops.generation.generator import Generator
from llmops.models.chat_model import ChatModel

PART = 5


@pytest.fixture
def common(tmp_path: Path, checkpoints: dict[str, Path]) -> list[str]:
    """The flags of a model that learned nothing and 23 questions, every third with two candidates of its own."""
    names, rows = list(WORDS), list[dict[str, Any]]()
    for k, (question, intent) in enumerate(questions()[:23]):
        other = names[(names.index(intent) + 1) % 3]
        listed = f"问题: {question}\n候选类别: {other}\n{intent}"
        rows.append({"input": listed, "output": intent} if k % 3 == 0 else {"question": question, "intent": intent})
    write_catalog(tmp_path / "intents.json")
    loud = louder(checkpoints["llama"], tmp_path / "loud")
    return [
        "--model_name_or_path", str(loud), "--intents_file", str(tmp_path / "intents.json"),
        "--input_file", write(tmp_path / "asked.jsonl", rows),
    ]  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of predictions."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("constrain", ["true", "false"])
def test_parts_say_what_all_at_once_says(
    tmp_path: Path, common: list[str], monkeypatch: pytest.MonkeyPatch, constrain: str
) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    flags = [*common, "--constrain", constrain, "--max_new_tokens", "6"]
    assert predict.main([*flags, "--output_file", str(whole)]) == 0
    asked = list[int]()

    def counted(self: Generator, prompts: list[list[int]], *more: Any) -> Iterator[Any]:
        asked.append(len(prompts))
        return before(self, prompts, *more)

    name = "choose" if constrain == "true" else "generate"
    before = getattr(Generator, name)
    monkeypatch.setattr(Generator, name, counted)
    monkeypatch.setattr(predict, "QUERIES_AT_ONCE", PART)
    assert predict.main([*flags, "--output_file", str(parts)]) == 0
    assert asked == [5, 5, 5, 5, 3]
    one, other = read(whole), read(parts)
    assert [row["question"] for row in other] == [question for question, _ in questions()[:23]]
    assert len({(row["intent"], row["probability"]) for row in one}) > 15  # no answer stands for another
    for row, same in zip(one, other, strict=True):
        assert same["probability"] == pytest.approx(row["probability"], abs=1e-5)
        free = ("probability", "runner_up")
        assert {k: v for k, v in same.items() if k not in free} == {k: v for k, v in row.items() if k not in free}


def test_finished_parts_are_not_asked_again(
    tmp_path: Path, common: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert predict.main([*common, "--output_file", str(whole)]) == 0
    before, begun = Generator.choose, list[int]()

    def ends_early(self: Generator, prompts: list[list[int]], *more: Any) -> Iterator[Any]:
        begun.append(len(prompts))
        if len(begun) == 3:
            raise KeyboardInterrupt
        return before(self, prompts, *more)

    with monkeypatch.context() as patched:
        patched.setattr(Generator, "choose", ends_early)
        patched.setattr(predict, "QUERIES_AT_ONCE", PART)
        assert predict.main([*common, "--output_file", str(parts)]) == 130
    assert not parts.exists()
    capsys.readouterr()
    assert predict.main([*common, "--output_file", str(parts)]) == 0
    assert "10 of 23 predictions are beside" in capsys.readouterr().err
    for row, same in zip(read(whole), read(parts), strict=True):
        assert (same["question"], same["intent"]) == (row["question"], row["intent"])
        assert same["probability"] == pytest.approx(row["probability"], abs=1e-5)


def test_a_question_of_the_last_part_that_is_too_long_is_told_at_once(
    tmp_path: Path, common: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    checkpoints: dict[str, Path],
) -> None:  # fmt: skip
    """Also where its prompt fits and only its longest answer does not; a list without that answer is no problem."""
    chat = ChatModel(predict.Checkpoint(checkpoints["llama"])).chat
    asked = write(tmp_path / "one.jsonl", [{"question": "退" * 50}])
    config = predict.Config(**vars(predict.build_parser().parse_args([*common, "--input_file", asked])))
    catalog = predict.load_catalog(tmp_path / "intents.json")
    (query,) = predict.read_queries(config, catalog)
    prompt = len(chat.prompt(query.prompt))
    (answer,) = predict.longest_answers(config, catalog, [query], chat)
    assert answer > 1

    def of_length(length: int) -> int:
        monkeypatch.setattr(predict.Checkpoint, "length", length)
        rows = [{"question": "退款"}] * 12 + [{"question": "退" * 50}]
        arguments = [*common, "--input_file", write(tmp_path / "asked.jsonl", rows)]
        return predict.main([*arguments, "--output_file", str(tmp_path / "parts.jsonl")])

    monkeypatch.setattr(predict, "QUERIES_AT_ONCE", PART)
    assert of_length(prompt + answer) == 0
    (tmp_path / "parts.jsonl").unlink()
    assert of_length(prompt + answer - 1) == 2
    assert f"makes {prompt} prompt tokens and up to {answer} of answer, more than" in capsys.readouterr().err
    assert not [path for path in tmp_path.glob(".parts*") if path.stat().st_size]  # nothing was asked
    short, long = (predict.replace(query, question=name) for name in ("short", "long"))
    predict.check_length([90, 50], [5, 45], [short, long], 95)  # the longest prompt has no long answer
    with pytest.raises(predict.UserError, match="the question 'long' makes 50 prompt tokens and up to 46 of answer"):
        predict.check_length([90, 50], [5, 46], [short, long], 95)
