"""A cluster of three hosts over their own network: how runs over them begin, are asked to end, lose a host, go on."""

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import DEMO, FAST, ROOT, chat_main, read_messages, train_losses, write_jsonl
from hosts import Host, Running, build, wait_until, why_not
from serve_adapter import write_adapter

from llmops.models import tiny
from train import checkpointing

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
SAME = ("--lr_scheduler_type", "constant", "--warmup_ratio", "0")  # a step is the same however many follow
STEPS = ("--num_train_epochs", "10", "--eval_steps", "1", "--save_total_limit", "3")  # 20 slow steps
BOUND = {"rel": 1e-4}


@dataclass
class Cluster:
    """Three hosts with a model and data on the file system that they share."""

    hosts: list[Host]
    folder: Path
    model: Path
    common: list[str]
    started: int = field(default=0)

    def hostfile(self, text: str) -> Path:
        """A hostfile with these lines."""
        path = self.folder / "hostfile"
        path.write_text(text, encoding="utf-8")
        return path

    def run(self, script: str, *arguments: str, host: int = 0) -> Running:
        """Type a command on a host."""
        self.started += 1
        return self.hosts[host].start(self.folder / f"said{self.started}", ["bash", str(ROOT / script), *arguments])

    def train(self, output: str, *more: str, host: int = 0) -> Running:
        """Train on a host."""
        return self.run("chat_main.sh", *self.common, "--output_path", str(self.folder / output), *more, host=host)

    def losses(self, output: str) -> list[float]:
        """The training losses of a run."""
        return list(train_losses(self.folder / output).values())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, conversations: list[list[dict[str, str]]]) -> Iterator[Cluster]:
    """The hosts, gone when the tests are over, however they end."""
    folder = tmp_path_factory.mktemp("cluster")
    write_jsonl(folder / "mnt" / "datasets" / "train.jsonl", conversations[:24])
    write_jsonl(folder / "mnt" / "datasets" / "test.jsonl", read_messages(DEMO / "test.jsonl")[:8])
    (folder / "hosts").mkdir()
    texts = [message["content"] for messages in conversations for message in messages]
    model = tiny.write_checkpoint(folder / "model", texts, "llama", vocab_size=900, hidden=32, layers=2, heads=4)
    common = ["--mount_path", str(folder / "mnt"), "--model_name_or_path", str(model), *FAST, *SAME]
    with ExitStack() as stack:
        yield Cluster(build(folder / "hosts", 3, stack), folder, model, common)


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[float]:
    """The losses of the same training in two processes of one machine that no network touches."""
    sizes = ["--per_device_train_batch_size", "6", "--num_processes", "2", "--num_train_epochs", "10"]
    done = chat_main(*cluster.common, *sizes, "--output_path", str(cluster.folder / "one"))
    assert done.returncode == 0, done.stderr[-3000:]
    return cluster.losses("one")


def steps_done(output: Path) -> int:
    """Training steps in the log."""
    return len(train_losses(output)) if (output / "log.txt").exists() else 0


def is_whole(output: Path) -> bool:
    """Whether there are checkpoints and every one of them is as it was written."""
    found = checkpointing.list_checkpoints(output)
    return bool(found) and all(checkpointing.damage(one) is None for one in found)


TWO = "worker-1 slots=1\nworker-2 slots=1\n"
THREE = TWO + "worker-3 slots=1\n"


def test_over_ssh(cluster: Cluster, expected: list[float]) -> None:
    hostfile = cluster.hostfile(TWO)
    sizes = ["--per_device_train_batch_size", "6", "--max_steps", "6"]
    run = cluster.train("ssh", *sizes, "--hostfile", str(hostfile))
    assert run.wait() == 0, run.stderr[-3000:]
    assert "2 machines are ready: worker-1, worker-2; they meet at 10.77.0.1:29500" in run.stderr
    assert "2 processes" in run.stderr
    assert cluster.losses("ssh") == pytest.approx(expected[:6], **BOUND)


def test_without_ssh_over_bad_links(cluster: Cluster, expected: list[float]) -> None:
    """Three hosts, each started by hand; one is slow, another loses a frame in a hundred."""
    hostfile = cluster.hostfile(THREE)
    links = [cluster.hosts[1].worsen(0.005, 0.0), cluster.hosts[2].worsen(0.0, 0.01)]
    sizes = ["--per_device_train_batch_size", "4", "--max_steps", "2"]
    by_hand = ["--hostfile", str(hostfile), "--no_ssh", "true", "--master_addr", "10.77.0.1"]
    try:
        runs = [cluster.train("bad", *sizes, *by_hand, "--node_rank", str(n), host=n) for n in range(3)]
        codes = [run.wait() for run in runs]
    finally:
        counts = [link.repair() for link in links]
    assert codes == [0, 0, 0], [run.stderr[-2000:] for run in runs]
    assert "machine 2 of 3; they meet at 10.77.0.1:29500, and each waits for the others" in runs[2].stderr
    assert counts[1][1] > 0
    assert cluster.losses("bad") == pytest.approx(expected[:2], **BOUND)


def test_asked_to_end_and_a_host_dies(cluster: Cluster, expected: list[float]) -> None:
    """One run that is ended in every way, and goes on each time with another choice of hosts, at last to its end."""
    output = cluster.folder / "chain"
    hostfile = str(cluster.hostfile(THREE))

    def begin(size: int, *choice: str) -> Running:
        before = steps_done(output)
        sizes = ["--per_device_train_batch_size", str(size), *STEPS]
        run = cluster.train("chain", *sizes, "--hostfile", hostfile, *choice)
        wait_until(lambda: steps_done(output) >= before + 2 or run.process.poll() is not None, "the second step", 100)
        assert run.process.poll() is None, run.stderr[-3000:]
        return run

    run = begin(6, "--include_hosts", "worker-1@worker-2")
    run.signal(signal.SIGTERM)
    assert run.wait(60) == 143, run.stderr[-3000:]
    assert is_whole(output)

    run = begin(6, "--exclude_hosts", "worker-2")
    assert "continuing from" in run.stderr
    (output / "STOP").touch()
    assert run.wait(60) == 143, run.stderr[-3000:]
    assert is_whole(output)

    run = begin(6, "--exclude_hosts", "worker-3:0")
    cluster.hosts[0].running("launch.py")[0].kill()
    run.wait(60)
    for host in cluster.hosts[:2]:
        wait_until(lambda: not host.running("finetune.py"), f"the end of the run on {host.name}")  # noqa: B023
    assert is_whole(output)

    run = begin(6, "--include_hosts", "worker-1@worker-2")
    cluster.hosts[1].running("finetune.py")[0].kill()
    assert run.wait(60) == 1, run.stderr[-3000:]
    assert "worker-2: stopped: process 0 of worker-2 was ended by SIGKILL" in run.stderr, run.stderr[-3000:]
    assert "Traceback" not in run.stderr
    assert is_whole(output)

    run = begin(6, "--include_hosts", "worker-1@worker-3")
    cluster.hosts[2].die()
    try:
        assert run.wait(120) == 1, run.stderr[-3000:]
        assert "stopped: worker-3 does not answer any more" in run.stderr, run.stderr[-3000:]
        assert "--exclude_hosts worker-3" in run.stderr
        assert "Traceback" not in run.stderr
        assert is_whole(output)
        sizes = ["--per_device_train_batch_size", "12", *STEPS]
        run = cluster.train("chain", *sizes, "--hostfile", hostfile, "--include_hosts", "worker-2")
        assert run.wait(90) == 0, run.stderr[-3000:]
    finally:
        cluster.hosts[2].begin()
    assert cluster.losses("chain") == pytest.approx(expected, **BOUND)


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("worker-1 slots=1\nworker-9 slots=1\n", "worker-9 cannot be reached over ssh (ssh: Could not resolve host"),
        ("worker-1 slots=1\nworker-2 slot=1\n", "hostfile, line 2: found 'worker-2 slot=1'; expected lines like"),
        ("worker-1 slots=0\n", "hostfile, line 1: worker-1 has slots=0, expected 1 to 1024"),
    ],
)
def test_a_wrong_hostfile(cluster: Cluster, text: str, phrase: str) -> None:
    run = cluster.train("wrong", "--hostfile", str(cluster.hostfile(text)))
    assert run.wait(30) == 2, run.stderr
    assert phrase in run.stderr
    assert not (cluster.folder / "wrong").exists()


@pytest.mark.parametrize(
    ("hidden", "phrase"),
    [("project", "worker-2 has no {root}; the project must be under the same path"), ("python", "worker-2 has no ")],
)
def test_a_host_without(cluster: Cluster, hidden: str, phrase: str) -> None:
    place = ROOT if hidden == "project" else Path(__import__("sys").prefix).resolve()
    host = cluster.hosts[1]
    host.inside("mount", "-t", "tmpfs", "none", str(place))
    try:
        run = cluster.train("without", "--hostfile", str(cluster.hostfile(TWO)))
        assert run.wait(30) == 2, run.stderr
    finally:
        host.inside("umount", str(place))
    assert phrase.format(root=ROOT) in run.stderr
    assert not (cluster.folder / "without").exists()


def test_a_host_without_the_data(cluster: Cluster) -> None:
    """Its process says so, and the others do not wait for it."""
    host, place = cluster.hosts[1], str(cluster.folder / "mnt" / "datasets")
    host.inside("mount", "-t", "tmpfs", "none", place)
    try:
        run = cluster.train("blind", "--hostfile", str(cluster.hostfile(TWO)))
        assert run.wait(60) == 2, run.stderr[-3000:]
    finally:
        host.inside("umount", place)
    assert f"worker-2: error: the training data {place}/train.jsonl does not exist" in run.stderr, run.stderr[-3000:]
    wait_until(lambda: not cluster.hosts[0].running("finetune.py"), "the end of the other process")


def kept_keys(output: Path) -> list[str]:
    """The keys of the predictions that processes have kept beside an output file."""
    lines = [
        line for part in output.parent.glob(f".{output.name}.process*.jsonl") for line in part.read_text().splitlines()
    ]
    return [json.loads(line)["key"] for line in lines if line.endswith("}")]


def assert_same_predictions(found: str, expected: str) -> None:
    """The same answers in the same order; a probability's last digit depends on what was answered together."""
    rows, others = ([json.loads(line) for line in text.splitlines()] for text in (found, expected))
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        pairs = [(row, other)] + ([(row["runner_up"], other["runner_up"])] if row["runner_up"] else [])
        for one, two in pairs:
            assert one.pop("probability") == pytest.approx(two.pop("probability"), abs=2e-6)
        assert row == other


def test_predictions_over_hosts(cluster: Cluster) -> None:
    """One of three hosts loses its process; the others go on, and no question is asked twice."""
    tuned = write_adapter(cluster.model, cluster.folder / "adapter")
    questions, output, count = cluster.folder / "questions.csv", cluster.folder / "predictions.jsonl", 900
    rows = [f"第{number}个订单的物流到哪了。" * 24 for number in range(count)]  # long, so that there is time for a kill
    questions.write_text("\n".join(["question", *rows, ""]), encoding="utf-8")
    common = ["--model_name_or_path", str(tuned), "--input_file", str(questions), "--batch_size", "1"]
    common += ["--reuse_prefix", "false"]
    over = ["--output_file", str(output), "--hostfile", str(cluster.hostfile(THREE))]
    alone = cluster.run("faq/predict.sh", *common)
    assert alone.wait() == 0, alone.stderr[-3000:]

    run = cluster.run("faq/predict.sh", *common, *over)
    wait_until(lambda: len(kept_keys(output)) > 30 or run.process.poll() is not None, "some predictions")
    assert run.process.poll() is None, run.stderr[-3000:]
    cluster.hosts[1].running("predict.py")[0].kill()
    assert run.wait(60) == 1, run.stderr[-3000:]
    assert "worker-2: stopped: process 0 of worker-2 was ended by SIGKILL" in run.stderr
    assert "the run on worker-2 has ended; the answers until then are kept" in run.stderr, run.stderr[-3000:]
    assert "Traceback" not in run.stderr
    kept = kept_keys(output)
    assert not output.exists()
    assert 30 < len(kept) == len(set(kept)) < count

    run = cluster.run("faq/predict.sh", *common, *over, "--exclude_hosts", "worker-2")
    assert run.wait() == 0, run.stderr[-3000:]
    assert f"{len(kept)} of {count} predictions are beside {output} already" in run.stderr
    assert f"\n{count - len(kept)} questions in" in run.stderr
    assert_same_predictions(output.read_text(encoding="utf-8"), alone.stdout)
    assert kept_keys(output) == []


def test_evaluations_over_hosts(cluster: Cluster) -> None:
    hostfile = ["--hostfile", str(cluster.hostfile(TWO))]
    data = str(cluster.folder / "mnt" / "datasets" / "test.jsonl")
    for script, arguments in (
        ("eval/model_performance_evaluation.sh", ["--dataset_path", data, "--max_new_tokens", "4"]),
        ("eval/evaluate_model_from_five_dimensions.sh", ["--additional_parameters", '{"limit": 6}']),
    ):
        asked = ["--model_name_or_path", str(cluster.model), *arguments, "--output_path"]
        name = Path(script).stem
        runs = [cluster.run(script, *asked, str(cluster.folder / f"{name}.{n}"), *hostfile[: 2 * n]) for n in (0, 1)]
        assert [run.wait() for run in runs] == [0, 0], [run.stderr[-2000:] for run in runs]
        assert json.loads(runs[0].stdout) == json.loads(runs[1].stdout)
        report = json.loads((cluster.folder / f"{name}.1" / "eval_results.json").read_text(encoding="utf-8"))
        assert report["processes"] == 2
