"""Every command of the guides, as it stands there, in copies of the project with tiny checkpoints of these names."""

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, Messages, copy_project, environment, read_messages, write_jsonl
from embedding_model import SAMPLE, write_embedding_model
from forked_python import forked_python
from guides import FENCE, GUIDES, steps, text_of, twin
from serve_adapter import write_adapter

from llmops.intents.questions import read_faq
from llmops.machine.process_group import free_port
from llmops.models import tiny

# what no test runs, or another one does: how the command begins, and why
ELSEWHERE = {
    r"(MNT=\S+ |LLMOPS_TOKEN=\S+ )?docker ": "an engine for containers, and an image of some GB",
    r"(.*bash chat_main.sh|docker run .*) --demo": "test_demo.py, test_faq.py: the demos, from nothing to a result",
    r"pip download|\.venv/bin/hf|python3 -m venv|~/modelscope": "the network: a package index, a hub of models",
    r"bash bench/": "hours, other projects' packages, a pretrained model; test_bench_gpu.py runs bench/gpu.sh --tiny",
    r"bash tests/run\.sh": "these tests",
    r"bash tests/fuzz\.sh": "an hour; test_fuzz.py runs a part of its cases",
    r"bash tests/job_kills\.sh": "an hour; test_job_kills.py runs a part of it",
    r"bash tests/loads_elsewhere\.sh": "the network: packages of 2024",
    r"bash (chat_main|tests/check_checkpoint)\.sh .*mnt/chatglm3-6b": "vendors' code; tests/legacy has such models, "
    "test_check_checkpoint.py the table",
    r"PROJECT=\S+ .*sbatch": "a Slurm cluster; test_job_docs.py runs the script as Slurm does",
    r"cd /app && exec bash job/run\.sh": "the image's folder; test_job_run.py has the platform's jobs",
    r"bash (faq/predict|eval/\w+)\.sh --hostfile": "three machines; tests/cluster has them",
    r"VARIANTS=3 bash faq/run_all\.sh \.\.\.": "no whole command; the guide has whole ones like it",
}
# trainings and answers are short, by the environment; what would meet an earlier command's result gets its own folder
QUICK = {
    "MAX_STEPS": "2", "TENSORBOARD": "false", "GRADIENT_CHECKPOINTING": "false", "PER_DEVICE_TRAIN_BATCH_SIZE": "4",
    "GRADIENT_ACCUMULATION_STEPS": "1", "MAX_NEW_TOKENS": "8", "CPU_KERNELS": "default",
    "ADDITIONAL_PARAMETERS": '{"limit": 4}',
}  # fmt: skip
MORE: dict[str, dict[str, str]] = {
    r"bash chat_main\.sh": {"MERGE_LORA": "true"},  # for the page about other servers
    r"bash chat_main\.sh --console true": {"OUTPUT_PATH": "mnt/beside/output_path", "CONSOLE_PORT": "FREE"},
    r"bash chat_main\.sh --num_processes 2": {"OUTPUT_PATH": "mnt/two/output_path"},
    r"TRAIN_TYPE=all bash chat_main\.sh|bash chat_main\.sh --train_type all": {"OUTPUT_PATH": "mnt/all/output_path"},
    r"bash job/run\.sh -- --lora_dim 8": {"OUTPUT_DIR": "mnt/small/tuned"},
    r"SCENARIO=faq bash chat_main\.sh --train_file .*": {
        "MODEL_NAME_OR_PATH": "mnt/Qwen1.5-7B-Chat", "OUTPUT_PATH": "mnt/raw/output_path",
    },
}  # fmt: skip
# what the command says. Where that is that the run is finished, settings and data and the hostfile were looked at, and
# no machine and no GPU was asked: tests/cluster does that, and tests/gpu
SENTENCES = {
    r"bash chat_main\.sh --console true": "the console: http://127.0.0.1:",
    r"CUDA_VISIBLE_DEVICES=0,1 bash chat_main\.sh": "this run is finished",
    r"bash chat_main\.sh --(hostfile|train_type) .*": "this run is finished",
}
FAQ = "faq/README.md"  # in a copy of its own, whose mnt/datasets holds what faq/prepare.sh wrote
TOKEN = "token-of-the-tests"
MERGED = "bash serve/serve.sh --model_name_or_path mnt/output_path/merged"


def found_by(command: str, table: dict[str, Any]) -> Any:
    """The entry for a whole command; None where there is none."""
    return next((found for pattern, found in table.items() if re.fullmatch(pattern, command)), None)


def elsewhere(command: str) -> str:
    """Why this command is not run here; empty where it is."""
    return next((why for pattern, why in ELSEWHERE.items() if re.match(pattern, command)), "")


class Reader:
    """Somebody who types the commands of the guides into a shell, in a copy of the project."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self.ran: set[str] = set()
        self.given = environment() | QUICK | {"OMP_NUM_THREADS": "1"}
        self.given["PATH"] = f"{programs}:{self.given['PATH']}"

    def start(self, command: str, **variables: str) -> subprocess.Popen[str]:
        """The command at work."""
        wanted = found_by(command, MORE) or {}
        more = {name: value.replace("FREE", str(free_port())) for name, value in wanted.items()}
        return subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", command], cwd=self.folder, env=self.given | more | variables, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, command: str, typed: str = "", **variables: str) -> str:
        """What the command prints; it ends well and says what the page says."""
        process = self.start(command, **variables)
        out, err = process.communicate(typed, timeout=600)
        assert process.returncode == 0, f"{command}\n{out[-2000:]}\n{err[-3000:]}"
        assert "Traceback" not in err
        if re.match(r"bash (faq|eval|job)/|python eval/", command):  # stdout belongs to the JSON
            assert all(json.loads(line) for line in out.splitlines()), command
        assert (found_by(command, SENTENCES) or "") in err, f"{command}\n{err[-3000:]}"
        return out

    @contextmanager
    def serving(self, command: str) -> Iterator[str]:
        """The address of the server that the command starts; it ends well when the block ends."""
        process = self.start(command, SERVE_PORT="0", LLMOPS_TOKEN=TOKEN)
        assert process.stdout
        try:
            line = process.stdout.readline()
            yield json.loads(line)["url"] if line else ""
        finally:
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 0, f"{command}\n{err[-3000:]}"

    def watch(self, command: str) -> None:
        """A command that follows a log: it tells what is there, and ends when it is asked to."""
        process = self.start(command)
        assert process.stdout
        assert json.loads(process.stdout.readline())["code"] == 0
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 143

    def follow(self, page: str) -> None:
        """Type everything that the page has, in its order."""
        with ExitStack() as servers:
            url = ""
            for command, shown in steps(page):
                if command in self.ran or elsewhere(command):
                    continue
                self.ran.add(command)
                if command.startswith("bash serve/serve.sh") and "--help" not in command:
                    url = servers.enter_context(self.serving(command))
                    assert url, command
                elif command.startswith("python ") and "--watch" in command:
                    self.watch(command)
                elif command.startswith("python docs/compare_answers.py"):
                    with self.serving(MERGED) as other:
                        self.run(command.replace("http://127.0.0.1:8000", other), OPENAI_API_KEY=TOKEN)
                else:
                    self.check(self.type(command.replace("http://127.0.0.1:5000", url)), shown, command)

    def type(self, command: str) -> str:
        """What a command, or Python code, prints."""
        if command.startswith(("import ", "from ")):
            (self.folder / "code.py").write_text(re.sub(r'api_key=".*?"', f'api_key="{TOKEN}"', command))
            return self.run("python code.py")
        return self.run(command, typed="ping\n", LLMOPS_TOKEN=TOKEN)

    def check(self, out: str, shown: str, command: str) -> None:
        """Where the page shows JSON below the command, that has the same shape."""
        if shown:
            same_shape(json.loads(shown.replace(", ...]", "]")), json.loads(out), command)


def same_shape(shown: Any, found: Any, where: str) -> None:
    """Two pieces of JSON have the same keys and types, as far as the page shows them and lists have entries."""
    if isinstance(shown, dict):
        assert isinstance(found, dict), where
        assert set(shown) - {"..."} <= set(found), where
        for key in set(shown) - {"..."}:
            same_shape(shown[key], found[key], f"{where}: {key}")
    elif isinstance(shown, list):
        assert isinstance(found, list), where
        if shown and found:
            same_shape(shown[0], found[0], where)
    else:
        numbers = (int, float)
        assert isinstance(found, numbers if isinstance(shown, numbers) else type(shown)), where


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for PATH: a Python that has the libraries."""
    with forked_python(tmp_path_factory.mktemp("python")) as found:
        yield found


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, programs: Path, conversations: list[Messages]) -> Reader:
    """A reader of the general guides, with mnt/ as they describe it, who has trained."""
    folder = tmp_path_factory.mktemp("project")
    copy_project(folder)
    mount, texts = folder / "mnt", [message["content"] for messages in conversations for message in messages]
    base = tiny.write_checkpoint(mount / "Llama-2-13b-chat-hf", texts, vocab_size=900, hidden=32, layers=2, heads=4)
    for name in ("mnt/Qwen1.5-7B-Chat", "mnt/my-model", "path/to/model"):
        shutil.copytree(base, folder / name)
    write_jsonl(mount / "datasets" / "train.jsonl", conversations[:24])
    write_jsonl(mount / "datasets" / "test.jsonl", read_messages(DEMO / "test.jsonl")[:4])
    for name in ("my_faq.jsonl", "faq.json", "combine_data.json"):
        shutil.copy(SAMPLE, mount / "datasets" / name)
    write_embedding_model(mount / "sbert-base-chinese-nli")
    (folder / "mnt_demo").mkdir()
    write_adapter(base, folder / "mnt_demo" / "output_path")
    hosts = next(body for _, language, body in FENCE.findall(text_of("docs/cluster.md")) if not language)
    (folder / "hostfile").write_text(hosts, encoding="utf-8")
    found = Reader(folder, programs)
    found.ran |= {command for command, _ in steps(FAQ)}  # in a copy of their own, below
    for command in ("bash chat_main.sh --dry_run true", "bash chat_main.sh"):
        found.run(command)
        found.ran.add(command)
    return found


@pytest.mark.parametrize("name", GUIDES)
def test_both_languages_have_the_same_commands(name: str) -> None:
    first, second = ([code for code, _ in steps(page) if "\n" not in code] for page in (name, twin(name)))
    assert first == second


def test_every_reason_is_for_a_command() -> None:
    found = {command for page in GUIDES for command, _ in steps(page)}
    languages = {language for page in GUIDES for _, language, _ in FENCE.findall(text_of(page))}
    assert languages <= {"", "bash", "python", "json"}  # whatever is to be typed is one of these
    assert [pattern for pattern in ELSEWHERE if not any(re.match(pattern, command) for command in found)] == []
    told = (*MORE, *SENTENCES)
    assert [pattern for pattern in told if not any(re.fullmatch(pattern, command) for command in found)] == []


@pytest.mark.parametrize("page", [page for page in GUIDES if page != FAQ])
def test_every_command_of(page: str, reader: Reader) -> None:
    reader.follow(page)


@pytest.fixture(scope="module")
def faq_reader(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Reader:
    """A reader of the guide of the FAQ scenario, with mnt/ as it describes it."""
    folder = tmp_path_factory.mktemp("faq_project")
    copy_project(folder)
    data = read_faq(folder / "faq" / "demo_data" / "faq.jsonl")
    texts = [text for record in data.records for text in (*record.questions, record.intent)]
    checkpoint = tiny.write_checkpoint(
        folder / "mnt" / "Qwen1.5-7B-Chat", texts, "qwen2", vocab_size=1500, hidden=32, layers=2, heads=2
    )
    write_embedding_model(folder / "mnt" / "all-MiniLM-L6-v2", "mean")
    # the guide's example of a model without a chat template, of a family that has no file
    other = folder / "mnt" / "My-Mistral-Chat"
    shutil.copytree(checkpoint, other)
    (other / "chat_template.jinja").unlink()
    config = json.loads((other / "config.json").read_text())
    for key in ("layer_types", "use_sliding_window", "max_window_layers"):
        config.pop(key, None)
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    (other / "config.json").write_text(json.dumps(config))
    template = re.search(
        r"Save this as `(llmops/formats/templates/mistral\.json)`:\n\n```json\n(.*?)^```", text_of(FAQ),
        re.MULTILINE | re.DOTALL,
    )  # fmt: skip
    assert template
    (folder / template[1]).write_text(template[2], encoding="utf-8")
    return Reader(folder, programs)


def test_every_command_of_the_faq_guide(faq_reader: Reader) -> None:
    faq_reader.follow(FAQ)
    output = faq_reader.folder / "mnt" / "output_path"
    for name in ("predictions.jsonl", "predictions_unconstrained.jsonl", "predictions.png", "merged/config.json"):
        assert (output / name).is_file(), name
    assert (faq_reader.folder / "mnt" / "mistral" / "output_path" / "intents.json").is_file()
