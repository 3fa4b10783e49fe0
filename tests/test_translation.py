"""Sentences in Chinese: the table against the sources, and what commands say by the language of their environment."""

import json
import os
import re
import string
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from conftest import ROOT, environment
from sentences import CODE, PLACE, PROSE, TO_CLIENTS, Said, Sources, all_words, shell_sentences, skeleton

from llmops import translation

# Words of the sources that stay as they are in Chinese: commands to type, and what is no sentence of ours.
UNCHANGED = {
    "pip install \0",
    "bash faq/predict.sh --mount_path \0 --question 怎么申请退款",
    "bash faq/run_all.sh --data_file my_faq.jsonl --model_name_or_path mnt/my-model",
}
KINDS = {"", "text", "series", "list"}


def table() -> dict[str, str]:
    """English templates with the Chinese ones."""
    return json.loads(translation.TABLE.read_text(encoding="utf-8"))


def places(template: str) -> Counter[str]:
    """The names of a template's places."""
    return Counter(name for _, name, _, _ in string.Formatter().parse(template) if name is not None)


def frame(template: str) -> str:
    """A template as `sentences` writes the words of a source."""
    parsed = string.Formatter().parse(template)
    return skeleton("".join(literal + (PLACE if name is not None else "") for literal, name, _, _ in parsed))


def is_prose(said: Said) -> bool:
    """Whether people read these words on stderr."""
    elsewhere = said.where.startswith(TO_CLIENTS) or CODE.search(said.words)
    return not elsewhere and bool(re.search("[A-Za-z]{2}", said.words) and (said.whole or PROSE.search(said.words)))


def test_what_is_said_has_its_chinese() -> None:
    """Every sentence, and every piece that is put into one, has an entry; an exception stands in UNCHANGED."""
    known = {frame(english) for english in table()} | UNCHANGED
    said = list(Sources().sentences()) + [Said(words, where, True) for words, where in shell_sentences()]
    prose = [one for one in said if is_prose(one)]
    assert len(prose) > 700
    assert not sorted({f"{one.where}: {one.words}" for one in prose if one.words not in known})


def test_entries_are_of_sentences_that_there_are() -> None:
    """An entry that no source says any more goes, and so does an exception."""
    words = all_words()
    assert not [english for english in table() if frame(english) not in words]
    assert not UNCHANGED - words


def test_both_have_the_same_places() -> None:
    """What is put into the English sentence is in the Chinese one, too; only plurals have no place there."""
    for english, chinese in table().items():
        assert set(places(chinese)) == {name for name in places(english) if not name.startswith("_")}, english
        assert max(places(english).values(), default=1) == 1, english
        assert {kind or "" for _, name, kind, _ in string.Formatter().parse(chinese) if name} <= KINDS, english


def test_punctuation_is_full_width() -> None:
    """Beside Chinese characters stand Chinese marks."""
    half = re.compile(r"[\u4e00-\u9fff][,;:?!()]|[,;:?!()][\u4e00-\u9fff]")
    assert not [chinese for chinese in table().values() if half.search(chinese)]


@pytest.mark.parametrize(
    ("variables", "chinese"),
    [
        ({}, False),
        ({"LANG": "zh_CN.UTF-8"}, True),
        ({"LANG": "en_US.UTF-8"}, False),
        ({"LANG": "C.UTF-8"}, False),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, False),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_TW"}, True),
        ({"LANG": "en_US.UTF-8", "LANGUAGE": "zh_CN:en"}, True),
        ({"LANG": "C", "LANGUAGE": "zh_CN"}, False),  # as gettext
        ({"LANG": "zh_CN.UTF-8", "LLMOPS_LANG": "en"}, False),
        ({"LANG": "C", "LLMOPS_LANG": "zh"}, True),
    ],
)
def test_the_language_is_the_environments(variables: dict[str, str], chinese: bool) -> None:
    """LLMOPS_LANG wins; without it the variables of gettext in its order."""
    assert translation.speaks_chinese(variables) is chinese


def chinese(text: str) -> str:
    """A line in Chinese."""
    return translation.in_chinese(text)


def test_what_is_put_in_stays() -> None:
    """Paths, values and names go over as they are, also where they look like words of a sentence."""
    path = "/data/is a folder; copy it again/x, expected at most 3.jsonl"
    assert chinese(f"error: the training data {path} does not exist") == f"错误：训练数据 {path} 不存在"
    assert chinese("  0.5 {braces} %s") == "  0.5 {braces} %s"


def test_an_unknown_sentence_stays_english() -> None:
    """Alone, and beside one that is known."""
    assert chinese("the moon is full") == "the moon is full"
    assert chinese("error: the moon is full") == "错误：the moon is full"
    assert chinese("the moon is full; copy it again") == "the moon is full；请重新复制"


def test_the_parts_of_an_estimate_stay_apart() -> None:
    said = "  made up of weights 0.50 GiB, optimizer states 2.00 GiB, gathered weights 0.20 GiB, framework 0.44 GiB"
    assert chinese(said) == "  其中权重 0.50 GiB，优化器状态 2.00 GiB，汇集的权重 0.20 GiB，框架 0.44 GiB"


def test_several_problems_are_several_sentences() -> None:
    """Problems that were joined are told apart, also where one has a joint of its own."""
    said = "--learning_rate is 3, expected at most 1; there is no test file and --eval_ratio is 0; give one of the two"
    assert chinese(said) == ("--learning_rate 为 3，应不大于 1；没有测试文件，而 --eval_ratio 为 0；两者请给出一个")


def test_blanks_and_line_ends_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message of several lines is read line by line."""
    monkeypatch.setenv("LLMOPS_LANG", "zh")
    assert translation.spoken("\n  copy it again\r\nx\n") == "\n  请重新复制\r\nx\n"
    assert translation.spoken("copy it again", "ascii") == "copy it again"
    assert translation.spoken("copy it again", "gbk") == "请重新复制"


def test_an_odd_text_takes_no_time() -> None:
    """A text that could be read in thousands of ways is given up; one of many problems is not."""
    words = ("the", "of", "a file", "is", "model", "with", "and", "in", "expected:", "(x)", ",", "the data", "/a/b")
    odd = " ".join(Random(0).choice(words) for _ in range(1000))
    started = time.monotonic()
    chinese(odd)
    assert time.monotonic() - started < 10  # seconds; without bounds sixty words took twenty
    many = "; ".join(f"--x{number} is {number}, expected at least 3" for number in range(40))
    assert chinese(many) == "；".join(f"--x{number} 为 {number}，应不小于 3" for number in range(40))


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command of the project where nothing but `variables` says a language."""
    plain = {name: value for name, value in environment().items() if name not in ("LANG", "LLMOPS_LANG")}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=plain | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
    )


def lines(done: subprocess.CompletedProcess[bytes]) -> list[str]:
    """What it said on stderr."""
    return done.stderr.decode().splitlines()


PYTHON = sys.executable
COMMANDS = [
    (
        ["bash", "chat_main.sh", "--learning_rat", "1"],
        "error: unknown argument --learning_rat; bash chat_main.sh --help lists every setting",
        "错误：未知的参数 --learning_rat；bash chat_main.sh --help 列出全部设置",
    ),
    (
        ["bash", "chat_main.sh", "--num_processes", "zero"],
        "error: --num_processes is 'zero', expected a whole number from 1 to 1024",
        "错误：--num_processes 为 'zero'，应为 1 到 1024 的整数",
    ),
    (
        [PYTHON, "train/finetune.py", "--train_type", "half"],
        None,  # argparse's own words differ between versions of Python
        "错误：参数 --train_type：取值 'half' 无效（可选：'lora', 'all'）；--help 列出全部设置",
    ),
    (
        [PYTHON, "llmops/launcher/launch.py", "--include_hosts", "a", "--check"],
        "error: --include_hosts chooses machines of a --hostfile; on one, CUDA_VISIBLE_DEVICES chooses GPUs",
        "错误：--include_hosts 从 --hostfile 的机器中选择；只有一台机器时，用 CUDA_VISIBLE_DEVICES 选择 GPU",
    ),
    (
        ["bash", "faq/prepare.sh"],
        "error: --data_file is missing; pass the file with your questions and intents",
        "错误：缺少 --data_file；请指定写有问题和意图的文件",
    ),
    (
        [PYTHON, "faq/score.py", "/nowhere.jsonl", "--precision", "2"],
        "error: --precision is 2.0, expected a share above 0 and up to 1, such as 0.95",
        "错误：--precision 为 2.0，应为大于 0、不超过 1 的比例，例如 0.95",
    ),
    (
        [PYTHON, "eval/diagnosis_monitoring.py", "/nowhere.txt"],
        "error: the log /nowhere.txt does not exist; pass the log.txt of a training, or the folder that holds it",
        "错误：日志 /nowhere.txt 不存在；请给出训练的 log.txt，或者它所在的目录",
    ),
    (
        [PYTHON, "serve/serve.py", "--host", "nowhere at all"],
        "error: --host is 'nowhere at all', expected an address such as 127.0.0.1 or 0.0.0.0",
        "错误：--host 为 'nowhere at all'，应为地址，例如 127.0.0.1 或 0.0.0.0",
    ),
    (
        [
            PYTHON,
            "eval/analyze_similar_questions_and_intents.py",
            "--dataset",
            "/nowhere.json",
            "--model_path",
            "builtin:ngram",
            "--max_pairs",
            "0",
        ],
        "error: --max_pairs is 0, expected 1 or more",
        "错误：--max_pairs 为 0，应不小于 1",
    ),
]


@pytest.mark.parametrize(("command", "english", "expected"), COMMANDS)
def test_commands_speak_the_language_of_their_environment(
    command: list[str], english: str | None, expected: str
) -> None:
    """Chinese where it is Chinese, English in the C locale and in every other one; the exit code is the same."""
    done = run(command, LANG="zh_CN.UTF-8")
    assert (lines(done), done.returncode) == ([expected], 2)
    assert done.stdout.isascii()  # a command's JSON is English
    for other in ({"LANG": "C"}, {}, {"LANG": "zh_CN.UTF-8", "LLMOPS_LANG": "en"}, {"LANG": "de_DE.UTF-8"}):
        done = run(command, **other)
        assert done.returncode == 2
        assert english is None or lines(done) == [english]


@pytest.mark.parametrize(
    "variables",
    [{"LANG": "zh_CN.GBK"}, {"LANG": "C", "LLMOPS_LANG": "zh"}, {"LANG": "zh_CN.UTF-8", "PYTHONIOENCODING": "ascii"}],
)
@pytest.mark.parametrize("command", [COMMANDS[0][0], [PYTHON, "train/finetune.py", "--train_file", "/无/x.jsonl"]])
def test_a_locale_that_is_not_utf8_is_no_fault(variables: dict[str, str], command: list[str]) -> None:
    """Chinese in its encoding where that has it, else English; never a traceback."""
    done = run(command, **variables)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert done.stderr.startswith((b"error: ", "错误：".encode(), "错误：".encode("gbk")))


def test_bad_lines_are_told_in_chinese(tmp_path: Path) -> None:
    """The list of bad lines of a data file, each with its place."""
    data = tmp_path / "train.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    data.write_text(f'{good}\n{{"messages": []}}\n{{"a"：1}}\n', encoding="utf-8")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    done = run(
        [PYTHON, "train/finetune.py", "--check", "--train_file", str(data), "--model_name_or_path", str(model),
         "--mode", "llama2", "--output_path", str(tmp_path / "out")],
        LANG="zh_CN.UTF-8",
    )  # fmt: skip
    assert lines(done) == [
        f"错误：{data} 的 3 行中有 2 行无法使用；请改正，或者用 --skip_bad_lines true 丢掉并计数：",
        f"  {data}:2：'messages' 为空或不是列表；应为 至少一条 user 消息和一条 assistant 消息",
        f"  {data}:3：JSON 有误：应为 ':'（第 5 列）；请写 :，不要写全角的 ：",
    ]


def test_help_has_a_chinese_frame() -> None:
    """--help's own words; those of the settings are English, and in Chinese in docs/settings.zh-CN.md."""
    shown = run([PYTHON, "train/finetune.py", "--help"], LANG="zh_CN.UTF-8").stdout.decode()
    assert shown.startswith("用法：")
    assert "选项：" in shown
    assert "显示这段帮助并退出" in shown
    shown = run(["bash", "chat_main.sh", "--help"], LANG="zh_CN.UTF-8").stdout.decode()
    assert "设置（参数、说明、默认值）：" in shown
    assert "--train_type" in shown


def test_the_table_costs_nothing_in_english() -> None:
    """It is not read, and its module imports little."""
    code = (
        "import sys, llmops.console as c; c.log('x'); "
        "import llmops.translation as t; assert not t.entries.cache_info().misses; assert 'torch' not in sys.modules"
    )
    subprocess.run([PYTHON, "-c", code], cwd=ROOT, env=os.environ, check=True)


def test_long_and_strange_messages_are_read_in_time() -> None:
    """A process of its own that is given 20 seconds, far more than it takes; some of these once took minutes."""
    code = (
        "from llmops.translation import in_chinese\n"
        "many = '; '.join(f'train.jsonl:{i}: found 3, expected an object' for i in range(50))\n"
        "assert in_chinese(many).count('应为对象') == 50\n"
        "words = '/some/path with words, that says nothing (and has brackets): or colons, ' * 4\n"
        "assert in_chinese('error: ' + words.strip()) == '错误：' + words.strip()\n"
        "for text in ('x ' * 2000 + '; ' + 'y; ' * 300, 'a: b: c: ' * 500, '; ' * 500, 'a (b); ' * 200):\n"
        "    in_chinese(text)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=20, check=True)
