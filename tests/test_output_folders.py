"""Nobody's work is lost: the base model, files of others in output folders, changed files, the end of a run."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment, train_losses, tree_hash

from faq import prepared
from llmops import files, pictures
from llmops.console import RunStopped, UserError
from train import checkpointing, ownership, states
from train.config import Config
from train.problems import find_problems
from train.run_folder import OutputFolder, data_digest, data_digests, earlier_run, own_names

Run = Callable[..., subprocess.CompletedProcess[str]]
FOREIGN = {
    "log.txt": b"my notes",
    "config.json": b"{}",
    "adapter_model.safetensors": b"weights",
    "checkpoint-1/pytorch_model.bin": b"another program's",
    "merged/model.safetensors": b"merged by hand",
    "tokenizer.json": b"{}",
}


def write_all(folder: Path, content: dict[str, bytes]) -> None:
    """Files by their relative names."""
    for name, raw in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)


@pytest.mark.parametrize("where", ["is", "lies in", "holds", "is by a link", "is by dots"])
@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_the_base_model_is_never_written_over(
    train_run: Run, small_data: Path, checkpoints: dict[str, Path], tmp_path: Path, where: str, overwrite: str
) -> None:
    model = shutil.copytree(checkpoints["llama"], tmp_path / "base" / "model")
    (tmp_path / "link").symlink_to(model)
    output = {
        "is": model, "lies in": model / "out", "holds": model.parent, "is by a link": tmp_path / "link",
        "is by dots": tmp_path / "base" / "x" / ".." / "model",
    }[where]  # fmt: skip
    before = tree_hash(tmp_path / "base")
    done = train_run(
        "--model_name_or_path", str(model), "--output_path", str(output), "--train_type", "all",
        "--overwrite_output_path", overwrite,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{' '.join(where.split()[:1] if 'by' in where else [where])} the model folder" in done.stderr
    assert tree_hash(tmp_path / "base") == before


@pytest.mark.parametrize("overwrite", ["false", "true"])
@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_files_of_others_keep_a_run_out(
    small_data: Path, checkpoints: dict[str, Path], name: str, overwrite: str
) -> None:
    output = small_data / "output_path"
    write_all(output, {name: FOREIGN[name], "notes.md": b"mine"})
    before = tree_hash(output)
    config = Config(
        model_name_or_path=str(checkpoints["llama"]), train_file=str(small_data / "datasets" / "train.jsonl"),
        output_path=str(output), overwrite_output_path=overwrite == "true",
    )  # fmt: skip
    assert find_problems(config) == []
    with pytest.raises(UserError, match=f"holds {Path(name).parts[0]}, which no run of this toolkit wrote"):
        earlier_run(config)
    with pytest.raises(UserError, match="which no run of this toolkit wrote"), OutputFolder(config, 0):
        pass
    assert tree_hash(output) == before


def test_overwriting_deletes_what_the_run_wrote_and_nothing_else(train_run: Run, small_data: Path) -> None:
    output = small_data / "output_path"
    write_all(output, {"notes.md": b"mine", "plots/loss.svg": b"mine"})
    assert train_run("--max_steps", "2").returncode == 0
    first = ownership.read_own(output)
    assert {"log.txt", "checkpoint-2", "adapter_model.safetensors", "tokenizer.json"} <= first
    assert not {"notes.md", "plots"} & first
    write_all(output, {"predictions.jsonl": b"{}\n"})
    done = train_run("--max_steps", "1", "--overwrite_output_path", "true")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (output / "checkpoint-2").exists()
    assert {"notes.md", "plots/loss.svg", "predictions.jsonl"} <= tree_hash(output).keys()
    write_all(output, {"checkpoint-9/model.safetensors": b"of another program"})
    assert "holds checkpoint-9, which no run" in train_run("--max_steps", "1", "--overwrite_output_path", "true").stderr


def test_overwriting_deletes_nothing_that_is_to_be_read(train_run: Run, small_data: Path) -> None:
    """An earlier run's held-out conversations are a test file that suggests itself."""
    output = small_data / "output_path"
    held_out = (small_data / "datasets" / "test.jsonl").read_bytes()
    write_all(output, {"held_out.jsonl": held_out, "other.jsonl": held_out})
    ownership.adopt(output, ["held_out.jsonl", "log.txt"])
    for name, kept in (("held_out.jsonl", True), ("other.jsonl", False)):
        done = train_run("--test_file", str(output / name), "--overwrite_output_path", "true", "--max_steps", "1")
        assert (done.returncode, (output / "held_out.jsonl").exists()) == ((2, True) if kept else (0, False))
        assert ("(--test_file) is a part of the earlier run in" in done.stderr) == kept


def test_a_run_of_version_0_1_is_recognised(tmp_path: Path) -> None:
    staged = tmp_path / ".saving" / "checkpoint-3"
    write_all(staged, {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    checkpointing.publish(staged, tmp_path / "checkpoint-3", 1)
    settings = {"train_sha256": "", "output_path": "", "train_type": "lora"}
    write_all(tmp_path, {"finetune_config.json": json.dumps(settings).encode(), "vocab.json": b"somebody's"})
    own = own_names(tmp_path)
    assert {"checkpoint-3", "adapter_config.json", "log.txt"} <= own
    assert "vocab.json" not in own


def test_a_run_does_not_go_on_with_other_test_data(
    small_data: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """A test.jsonl that appears would have what was held out learned; an earlier version's run knows no hash of it."""
    train, retention = small_data / "datasets" / "train.jsonl", tmp_path / "retention.jsonl"
    test = train.with_name("test.jsonl")
    tested = test.read_bytes()
    write_all(tmp_path, {"retention.jsonl": tested})
    config = Config(
        model_name_or_path=str(checkpoints["llama"]), train_file=str(train), retention_file=str(retention),
        output_path=str(tmp_path / "out"),
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    ownership.claim(tmp_path / "out", ["finetune_config.json"])

    def begin(digests: dict[str, str | None]) -> None:
        files.write_json(tmp_path / "out" / "finetune_config.json", config.to_json() | digests)

    test.unlink()
    begin(data_digests(config))
    assert earlier_run(config) is None
    test.write_bytes(tested)
    with pytest.raises(UserError, match="test_sha256 was null, is"):
        earlier_run(config)
    begin(data_digests(config))
    assert earlier_run(config) is None
    test.write_bytes(tested + tested)
    with pytest.raises(UserError, match="test_sha256 was '"):
        earlier_run(config)
    test.write_bytes(tested)
    retention.write_bytes(tested + tested)
    with pytest.raises(UserError, match="retention_sha256 was '"):
        earlier_run(config)
    results = {"eval_loss_before": 2.0, "eval_loss": 1.0, "best_step": 1, "steps": 2}
    ownership.claim(tmp_path / "out", ["train_results.json"])
    files.write_json(tmp_path / "out" / "train_results.json", results)
    assert earlier_run(config) == results  # a run that is finished is not measured again
    (tmp_path / "out" / "train_results.json").unlink()
    begin({"train_sha256": data_digest(config)})
    assert earlier_run(config) is None
    assert data_digests(replace(config, retention_file=""))["retention_sha256"] is None  # ours may change


@pytest.mark.parametrize("text", ['{"names": ["../model"]}', '{"names": ["a/b"]}', "[]", "null", '{"names": 3}', "{"])
def test_a_manifest_is_judged_and_not_trusted(tmp_path: Path, text: str) -> None:
    (tmp_path / ownership.OWN_NAME).write_text(text)
    with pytest.raises(UserError, match=r"manifest.*choose another --output_path"):
        ownership.read_own(tmp_path)


def test_a_name_that_appears_on_the_way_stops_the_run(tmp_path: Path) -> None:
    ownership.claim(tmp_path, ["log.txt"])
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(RunStopped, match="checkpoint-5 appeared while the run was on its way"):
        ownership.claim(tmp_path, ["checkpoint-5"])


def test_a_kill_before_the_results_costs_no_step_more(train_run: Run, small_data: Path) -> None:
    """What is left when the process dies between its last checkpoint and its results; steps that end in mid-epoch."""
    output = small_data / "output_path"
    common = ["--max_steps", "4", "--per_device_train_batch_size", "2"]
    assert train_run(*common).returncode == 0
    results = json.loads((output / "train_results.json").read_text())
    losses = train_losses(output)
    for name in ("train_results.json", "adapter_model.safetensors", "training_loss.png"):
        (output / name).unlink()
    again = train_run(*common)
    assert again.returncode == 0, again.stderr[-2000:]
    found = json.loads((output / "train_results.json").read_text())
    assert train_losses(output) == losses
    assert {**found, "seconds": 0} == {**results, "seconds": 0}
    assert (output / "adapter_model.safetensors").is_file()


def test_an_early_stop_stays_stopped(train_run: Run, small_data: Path) -> None:
    output = small_data / "output_path"
    common = [
        "--num_train_epochs", "9", "--early_stopping_patience", "1", "--learning_rate", "0.3",
        "--per_device_train_batch_size", "24",
    ]  # fmt: skip
    assert train_run(*common).returncode == 0
    results = json.loads((output / "train_results.json").read_text())
    assert results["steps"] < 9
    (output / "train_results.json").unlink()
    assert train_run(*common).returncode == 0
    assert json.loads((output / "train_results.json").read_text())["steps"] == results["steps"]


@pytest.mark.parametrize("harm", ["changed", "refused"])
def test_rotation_counts_checkpoints_to_go_on_from(tmp_path: Path, harm: str) -> None:
    """What a start refuses keeps no place: the one just saved, before it, stays."""
    for step in (2, 3, 9):
        staged = tmp_path / ".saving" / f"checkpoint-{step}"
        staged.mkdir(parents=True)
        torch.save({"step": step}, staged / "optimizer.pt")
        if (step, harm) == (9, "refused"):
            write_all(staged, {"optimizer.pt": b"no state"})
        checkpointing.publish(staged, tmp_path / f"checkpoint-{step}", 1)
    if harm == "changed":
        (tmp_path / "checkpoint-9" / "optimizer.pt").write_bytes(b"harmed")
    checkpointing.rotate(tmp_path, keep=1, best_step=None, judge=states.problem)
    assert checkpointing.newest_whole(tmp_path, judge=states.problem) == tmp_path / "checkpoint-3"
    assert not (tmp_path / "checkpoint-2").exists()


@pytest.mark.parametrize(
    "text",
    ["null", "[]", "{}", '{"world_size": 1}', '{"world_size": "1", "files": {"a": [1, 2]}}',
     '{"world_size": 1, "files": {"../../etc/passwd": [1, 2]}}', '{"world_size": 1, "files": {"state.pt": "x"}}',
     '{"world_size": true, "files": {"state.pt": [1, 2]}}', "[" * 90, '{"world_size": ' + "9" * 5000 + "}"],
)  # fmt: skip
def test_any_manifest_of_a_checkpoint_is_judged(tmp_path: Path, text: str) -> None:
    write_all(tmp_path / "checkpoint-1", {"state.pt": b"x", checkpointing.MANIFEST: text.encode()})
    assert checkpointing.newest_whole(tmp_path) is None


# --- faq/prepare


def prepare(data: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """faq/prepare.sh as a user runs it."""
    command = ["bash", str(ROOT / "faq" / "prepare.sh"), "--data_file", str(data), "--output_dir", str(output), *flags]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """FAQ data of three intents."""
    intents = ("退款", "物流", "发票")
    rows = [{"question": f"{intent}的问题{i}", "intent": intent} for intent in intents for i in range(4)]
    path = tmp_path / "faq.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_prepare_killed_between_its_files_is_completed(questions: Path, tmp_path: Path, renamed: int) -> None:
    """The state that a kill leaves after so many of the four renames, made by hand; then any next start."""
    whole, output = tmp_path / "whole", tmp_path / "out"
    assert prepare(questions, output, "--seed", "7").returncode == 0
    assert prepare(questions, whole, "--validation_ratio", "0.3").returncode == 0
    listed = {name: prepared.digest(whole / name) for name in prepared.OUTPUTS}
    prepared.write_state(output, "writing", listed)
    for i, name in enumerate(prepared.OUTPUTS):
        shutil.copy(whole / name, output / name if i < renamed else prepared.staged(output, name))
    if renamed:  # meanwhile nobody learns from halves
        train = subprocess.run(
            ["bash", str(ROOT / "chat_main.sh"), "--scenario", "faq", "--train_file", str(output / "train.jsonl"),
             "--model_name_or_path", str(tmp_path)],
            env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert train.returncode == 2
    prepared.complete(output)
    assert {name: prepared.digest(output / name) for name in prepared.OUTPUTS} == listed
    assert not list(output.glob(".*.new"))
    assert prepare(questions, output).returncode == 0


def test_prepare_does_not_replace_what_was_changed_by_hand(questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert prepare(questions, output).returncode == 0
    assert prepare(questions, output, "--seed", "3").returncode == 0  # its own files it may replace
    with open(output / "train.jsonl", "a", encoding="utf-8") as stream:
        stream.write("\n")
    before = tree_hash(output)
    done = prepare(questions, output)
    assert done.returncode == 2
    assert "train.jsonl that was changed since this command wrote it" in done.stderr
    assert tree_hash(output) == before
    assert prepare(questions, output, "--overwrite", "true").returncode == 0


def test_two_at_once_do_not_mix(questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with prepared.locked(output):
        done = prepare(questions, output)
    assert done.returncode == 2
    assert "another faq/prepare is writing to" in done.stderr


def test_a_picture_replaces_pictures_only(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_bytes(b"years of work")
    with pytest.raises(UserError, match="is there and is no PNG"):
        pictures.refuse_other(tmp_path / "thesis.doc")
    (tmp_path / "old.png").write_bytes(pictures.PNG + b"...")
    pictures.refuse_other(tmp_path / "old.png")
    pictures.refuse_other(tmp_path / "new.png")
