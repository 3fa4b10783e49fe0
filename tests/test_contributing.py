"""The worked examples of CONTRIBUTING.md: their changes are made and their commands run in a copy of the project."""

import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, copy_project, environment, write_jsonl

from llmops.models import tiny

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TARGET = re.compile(r"Save this as `([^`]+)`:\n\n$")
TEXTS = ["ping pong, hello world", "user model system assistant yes no", "Where is the station? Behind the town hall."]
VOWPAL = "".join(f"{1 / n:.6f} {1 / n:.6f} {n:12} {n}.0  -1.0000  0.0000 51\n" for n in range(1, 30))


def sections() -> dict[str, str]:
    """The page's sections by their headings."""
    parts = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


EXAMPLES = {heading: text for heading, text in sections().items() if "As an example" in text}


def change(folder: Path, text: str) -> str:
    """Make a diff's change; the file's name. What the diff names has to be there, once."""
    head, _, body = text.partition("\n")
    name = head.removeprefix("+++ ")
    lines = body.splitlines(keepends=True)
    before = "".join(line[1:] or "\n" for line in lines if line[0] in " -")
    after = "".join(line[1:] or "\n" for line in lines if line[0] in " +")
    path = folder / name
    found = path.read_text(encoding="utf-8")
    assert found.count(before) == 1, f"{name} has {found.count(before)} times:\n{before}"
    path.write_text(found.replace(before, after), encoding="utf-8")
    return name


def follow(folder: Path, heading: str) -> list[str]:
    """Make all changes of an example and lint what was changed; what its commands print, by command."""
    text, changed, commands = EXAMPLES[heading], set(), []
    for match in BLOCK.finditer(text):
        language, body = match.groups()
        target = TARGET.search(text, 0, match.start())
        if target:
            (folder / target[1]).write_text(body, encoding="utf-8")
            changed.add(target[1])
        elif language == "diff":
            changed.add(change(folder, body))
        elif language == "bash":
            commands += body.splitlines()
    python = sorted(name for name in changed if name.endswith(".py"))
    if python:
        done = subprocess.run(["ruff", "check", "--quiet", *python], cwd=folder, env=environment(), check=False)
        assert done.returncode == 0
    shells = sorted(name for name in changed if name.endswith(".sh"))
    if shells:
        subprocess.run(["shfmt", "-i", "4", "-d", *shells], cwd=folder, env=environment(), check=True)
    said = []
    for command in commands:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment() | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        said.append(done.stdout + done.stderr)
    return said


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project."""
    copy_project(tmp_path)
    (tmp_path / "mnt" / "datasets").mkdir(parents=True)
    return tmp_path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny", TEXTS, vocab_size=400, hidden=32)


def test_every_example_is_followed() -> None:
    followed = {test.__doc__ for name, test in globals().items() if name.startswith("test_adding_")}
    assert followed == set(EXAMPLES)
    assert len(EXAMPLES) == 6


def test_the_page_names_what_is_there() -> None:
    """Paths in backticks and in links exist, but for those that an example makes."""
    made = set(re.findall(r"Save this as `([^`]+)`", PAGE))
    names = set(re.findall(r"`([\w./-]+/[\w./-]*\.\w+)`", PAGE)) | set(re.findall(r"\]\(([^)#]+)", PAGE))
    for name in names - made:
        assert "NAME" in name or name.startswith("mnt/") or (ROOT / name).exists(), name


def adding(heading: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test that follows the example under this heading."""

    def named(test: Callable[..., None]) -> Callable[..., None]:
        test.__doc__ = heading
        return test

    return named


@adding("A model: a chat format and its family")
def test_adding_a_model(project: Path, checkpoint: Path) -> None:
    write_gemma(project / "mnt" / "My-Gemma")
    talk = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong, hello"}]
    for name in ("train.jsonl", "test.jsonl"):
        write_jsonl(project / "mnt" / "datasets" / name, [talk] * 4)
    (said,) = follow(project, "A model: a chat format and its family")
    assert "gemma" in said
    shown = re.sub(r"\x1b\[[0-9;]*m", "", said)
    assert "pong, hello<end_of_turn>" in shown
    learned = ask_in(
        project,
        "from pathlib import Path\n"
        "from llmops.models.chat_model import ChatModel; from llmops.models.checkpoints import Checkpoint\n"
        "chat = ChatModel(Checkpoint(Path('mnt/My-Gemma'), 'gemma')).chat\n"
        f"found = chat.conversation({talk!r})[0]\n"
        "text = chat.tokenizer.decode\n"
        "own = [i for i, flag in zip(found.ids, found.learned) if flag]\n"
        "print(json.dumps([text(found.ids), text(own), text(chat.stop_ids())]))",
    )
    whole = "<bos><start_of_turn>user\nping<end_of_turn>\n<start_of_turn>model\npong, hello<end_of_turn>"
    assert [part.rstrip("\n") for part in learned[:2]] == [whole, "pong, hello<end_of_turn>"]
    assert "<end_of_turn>" in learned[2]


def write_gemma(folder: Path) -> None:
    """A tiny Gemma without a chat template, with the tokens of its turns."""
    from transformers import GemmaConfig, GemmaForCausalLM

    tokenizer = tiny.train_tokenizer(TEXTS, 400)
    tokenizer.add_special_tokens(
        {"bos_token": "<bos>", "eos_token": "<eos>",
         "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}
    )  # fmt: skip
    tokenizer.chat_template = None
    config = GemmaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    GemmaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ask_in(project: Path, code: str) -> Any:
    """What Python code prints in the copy, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", f"import json\n{code}"], cwd=project, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@adding("A dimension of the five-dimension evaluation")
def test_adding_a_dimension(project: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, project / "mnt" / "output_path")
    data = project / "mnt" / "datasets" / "eval" / "boolq" / "dev.jsonl"
    data.parent.mkdir(parents=True)
    rows = [{"question": "is this a station", "passage": TEXTS[2], "answer": i % 3 == 0} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (said,) = follow(project, "A dimension of the five-dimension evaluation")
    found = json.loads(next(line for line in said.splitlines() if line.startswith('{"evaluation_results"')))
    assert 0 <= found["evaluation_results"]["yes_no_reading"] <= 1
    baselines = ask_in(
        project,
        "from pathlib import Path; from eval.dimensions.boolq import DIMENSION as found\n"
        "samples = found.read(found.find(Path('mnt/datasets/eval'))).samples\n"
        "print(json.dumps([found.baselines(samples, 0), samples[0].messages[0]['content']]))",
    )
    assert baselines[0] == {"majority": pytest.approx(2 / 3), "random": 0.5}
    assert baselines[1].endswith(f"Passage: {TEXTS[2]}\nQuestion: is this a station\nAnswer: ")
    data.write_text('{"question": "a", "passage": "b", "answer": "yes"}\n', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "eval/evaluate_model_from_five_dimensions.py", "mnt/output_path", '["yes_no_reading"]'],
        cwd=project, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "dev.jsonl:1: answer is 'yes', expected true or false" in done.stderr


@adding("A log shape of the diagnosis")
def test_adding_a_log_shape(project: Path) -> None:
    log = project / "mnt" / "vowpal.log"
    log.write_text(VOWPAL, encoding="utf-8")
    before = subprocess.run(
        ["bash", "eval/diagnosis_monitoring.sh", str(log)], cwd=project, env=environment(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert before.returncode == 1  # without the row nothing is read
    tested, said = follow(project, "A log shape of the diagnosis")
    assert "2 passed" in tested
    assert '"code": 0' in said
    assert "29" in said


@adding("A metric of model_performance_evaluation")
def test_adding_a_metric(project: Path) -> None:
    rows = [{"answer": "上海图书馆", "gold": "上海图书馆"}, {"answer": "", "gold": "甲"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (project / "mnt" / "predictions.jsonl").write_text(text, encoding="utf-8")
    tested, said = follow(project, "A metric of model_performance_evaluation")
    assert "1 passed" in tested
    found = json.loads(next(line for line in said.splitlines() if line.startswith('{"code"')))
    assert found["data"]["evaluation_results"] == {"Acc": 0.5, "chrF": 0.5}


@adding("A setting of chat_main.sh")
def test_adding_a_setting(project: Path) -> None:
    by_shell, by_python, tested = follow(project, "A setting of chat_main.sh")
    assert "what AdamW adds to the root of the mean squared gradient [1e-8]" in by_shell
    assert "(default: 1e-08)" in " ".join(by_python.split())
    assert "4 passed" in tested
    told = ask_in(
        project,
        "from train.config import Config\n"
        "from train.problems import find_problems\n"
        "good, bad = Config(adam_epsilon=1e-6), Config(adam_epsilon=-1.0)\n"
        "print(json.dumps([good.to_json()['adam_epsilon'], find_problems(bad)]))",
    )
    assert told[0] == 1e-6
    assert "--adam_epsilon is -1.0, expected at least 0" in told[1]
    # one place is left out: the project's own test says which
    script = project / "chat_main.sh"
    kept = [line for line in script.read_text(encoding="utf-8").splitlines(True) if not line.startswith("ADAM_EPSILON")]
    script.write_text("".join(kept), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_config.py", "-k", "same_default"], cwd=project,
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "AssertionError: adam_epsilon" in done.stdout


@adding("An endpoint of the server")
def test_adding_an_endpoint(project: Path, checkpoint: Path) -> None:
    follow(project, "An endpoint of the server")
    mount = project / "mnt"
    process = subprocess.Popen(
        [sys.executable, "serve/serve.py", "--port", "0", "--mount_path", str(mount), "--model_name_or_path",
         str(checkpoint)],
        cwd=project, env=environment() | {"LLMOPS_TOKEN": "token-of-the-test", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout
    try:
        url = json.loads(process.stdout.readline())["url"]
        status, listed = get(url + "/v1/models")
        assert (status, get(f"{url}/v1/models/{listed['data'][0]['id']}")) == (200, (200, listed["data"][0]))
        status, refused = get(url + "/v1/models/other")
        assert (status, refused["error"]["message"]) == (404, "there is no model 'other'")
        assert get(url + "/v1/models/other", token="wrong-token")[0] == 401
        assert "/v1/models/{name}" in get(url + "/openapi.json")[1]["paths"]
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def get(url: str, token: str = "token-of-the-test") -> tuple[int, Any]:
    """Status and JSON of an address."""
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
