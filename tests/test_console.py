"""The console over the files of a mount: what it says of runs, what it refuses, that all of it is in both languages."""

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from starlette.applications import Starlette
from starlette.testclient import TestClient

from serve.console import mount as mount_module
from serve.console import runs
from serve.console.mount import Mounted, NotFound
from serve.console.routes import routes

CONSOLE = ROOT / "serve" / "console"
SETTINGS = {"scenario": "general", "train_type": "lora", "num_train_epochs": 2, "max_steps": -1, "learning_rate": 0.001}
RESULTS = {"steps": 20, "best_step": 10, "eval_loss_before": 4.0, "eval_loss": 1.5, "retention_loss_before": 1.0,
           "retention_loss": 1.1, "train_loss": 1.2}  # fmt: skip


def log_lines(steps: int, first: int = 1) -> str:
    """A log of one epoch per ten steps, evaluated at its beginning and after every epoch."""
    lines: list[dict[str, Any]] = []
    if first == 1:
        lines.append({"step": 0, "epoch": 0.0, "chosen": {"dtype": "float32"}, "elapsed": 0.0, "remaining": None})
        lines.append({"step": 0, "epoch": 0, "eval_loss": 4.0, "retention_loss": 1.0, "elapsed": 0.5})
    for step in range(first, steps + 1):
        told = {"step": step, "epoch": step / 10, "elapsed": float(step), "remaining": 20.0 - step}
        lines.append(told | {"loss": 4 / step, "learning_rate": 0.001, "grad_norm": 1.0, "tokens_per_second": 1000.0})
        if step % 10 == 0:
            lines.append(told | {"eval_loss": 3 / step + 1, "retention_loss": 1 + step / 100})
    return "".join(json.dumps(line) + "\n" for line in lines)


def make_run(
    folder: Path, steps: int, results: bool = False, checkpoints: tuple[int, ...] = (), age: float = 0
) -> Path:
    """A run's folder as training leaves it; `age` is how long ago it was written to."""
    folder.mkdir(parents=True)
    (folder / "finetune_config.json").write_text(json.dumps(SETTINGS))
    (folder / "log.txt").write_text(log_lines(steps))
    (folder / ".lock").touch()
    if results:
        (folder / "train_results.json").write_text(json.dumps(RESULTS))
    for step in checkpoints:
        (folder / f"checkpoint-{step}").mkdir()
    os.utime(folder / "log.txt", (time.time() - age,) * 2)
    return folder


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    """A mount with a run of every state that needs no process."""
    root = tmp_path / "mnt"
    make_run(root / "done" / "output_path", 20, results=True, checkpoints=(10, 20), age=600)
    make_run(root / "killed" / "output_path", 13, checkpoints=(10,), age=600)
    make_run(root / "halted" / "output_path", 13, checkpoints=(10, 13), age=600)
    make_run(root / "fresh" / "output_path", 7)
    cache = root / "done" / "output_path" / "cache" / "train-0d60a9262e0b51e9067c"
    cache.mkdir(parents=True)
    (cache / "meta.json").write_text(json.dumps({"rows": 388, "bad_lines": 2, "samples": 386, "files": ["a.jsonl"]}))
    return root


@pytest.fixture
def client(mount: Path) -> Iterator[TestClient]:
    """A browser without scripts."""
    with TestClient(Starlette(routes=routes(mount))) as opened:
        yield opened


def test_states(mount: Path) -> None:
    of = runs.Runs(Mounted(mount))
    states = {name.split("/")[0]: of.one(name).state for name in of.newest()}
    assert states == {"done": "finished", "killed": "interrupted", "halted": "stopped", "fresh": "running"}
    assert of.newest()[0] == "fresh/output_path"  # written to last
    lock = mount / "killed" / "output_path" / ".lock"
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert of.one("killed/output_path").state == "running"  # a process holds it, however old the log is
        (lock.parent / "STOP").touch()
        assert of.one("killed/output_path").state == "stopping"
    assert of.one("killed/output_path").state == "stopped"  # it was asked to, and is gone
    with open(lock, "a") as free:  # looking took no lock that would keep a training out
        fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_on_another_device_is_none_of_the_run_s(
    mount: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, of = mount / "killed" / "output_path" / ".lock", runs.Runs(Mounted(mount))
    monkeypatch.setattr(runs, "LOCKS", tmp_path / "locks")
    major, minor = runs.mounted_device(lock) or (0, 0)
    for device, state in ((f"{major:02x}:{minor:02x}", "running"), ("ff:fe", "interrupted")):
        runs.LOCKS.write_text(f"1: FLOCK  ADVISORY  WRITE 5297 {device}:{lock.stat().st_ino} 0 EOF\n")
        assert of.one("killed/output_path").state == state, device
    assert runs.mounted_device(lock.parent / "nothing") is None


def test_what_a_run_says(mount: Path) -> None:
    of = runs.Runs(Mounted(mount))
    done, fresh = of.one("done/output_path"), of.one("fresh/output_path")
    assert (done.step, done.steps, done.share, done.remaining) == (20, 20, 1.0, None)
    assert done.losses == {"loss": 0.2, "eval_loss": 1.5, "retention_loss": 1.1}  # of the weights that were kept
    assert done.before == {"eval_loss": 4.0, "retention_loss": 1.0}
    assert (fresh.step, fresh.steps, fresh.share) == (7, 20, 0.35)  # 2 epochs of 10 steps, from the log itself
    assert fresh.remaining == pytest.approx(13, abs=2)
    assert fresh.losses == {"loss": 4 / 7, "eval_loss": 4.0, "retention_loss": 1.0}
    about = of.about("done/output_path")
    assert about["reports"]["train"]["rows"] == 388
    assert [(c["step"], c["best"]) for c in of.checkpoints("done/output_path")] == [(10, True), (20, False)]
    assert about["chosen"] == {"dtype": "float32"}


def test_a_log_is_read_from_where_it_was_known(mount: Path, client: TestClient) -> None:
    log = mount / "fresh" / "output_path" / "log.txt"

    def ask(offset: int, identity: str) -> dict[str, Any]:
        query = f"run=fresh/output_path&offset={offset}&identity={identity}"
        return client.get(f"/console/api/log?{query}").json()

    first = ask(0, "")
    assert first["columns"]["step"] == [0, *range(1, 8)]
    assert first["columns"]["eval_loss"] == [4.0] + [None] * 7
    assert first["offset"] == log.stat().st_size
    with log.open("a") as stream:  # a whole line, and half of one
        stream.write(log_lines(9, first=8) + '{"step": 10, "epoch"')
    second = ask(first["offset"], first["identity"])
    assert (second["columns"]["step"], second["restart"]) == ([8, 9], False)
    with log.open("a") as stream:
        stream.write(': 1.0, "loss": NaN, "not_finite": {"loss": "nan"}}\n{"step": 11, "loss": null}\n')
    third = ask(second["offset"], second["identity"])
    assert (third["columns"]["step"][-1], third["columns"]["loss"][-1]) == (11, None)
    other = log.with_name("new")  # a resume writes the log anew under its name
    other.write_text(log_lines(5))
    other.replace(log)
    again = ask(third["offset"], third["identity"])
    assert (again["restart"], again["columns"]["step"]) == (True, [0, 1, 2, 3, 4, 5])


def test_long_logs_come_in_pieces(mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PIECE", 1000)
    of, offset, identity, steps = runs.Runs(Mounted(mount)), 0, "", []
    for _ in range(100):
        found = of.log("done/output_path", offset, identity)
        steps += found["columns"]["step"]
        offset, identity = found["offset"], found["identity"]
        if not found["more"]:
            break
    assert steps == [0, *(step for n in range(1, 21) for step in [n] * (2 if n % 10 == 0 else 1))]


@pytest.mark.parametrize("name", [
    "..", "../secret", "done/../../secret", "/etc/passwd", "leads-out", "leads-out/secret", "done/output_path/gone", "",
    "a\0b", "done/output_path/log.txt/x", "%2e%2e/secret", "loop", ".",
])  # fmt: skip
def test_nothing_outside_the_mount(mount: Path, client: TestClient, name: str) -> None:
    outside = make_run(mount.parent / "secret", 5, results=True)
    (mount / "leads-out").symlink_to(outside.parent)
    (mount / "loop").symlink_to(mount / "loop")
    with pytest.raises(NotFound):
        Mounted(mount).inside(name)
    for address in ("/console/api/log", "/console/api/run", "/console/api/diagnosis"):
        answer = client.get(address, params={"run": name})
        assert (answer.status_code, list(answer.json())) == (404, ["error"])
    assert client.post("/console/api/stop", json={"run": name}).status_code == 404
    assert Mounted(mount).look().runs == [f"{n}/output_path" for n in ("done", "fresh", "halted", "killed")]
    assert not (outside / "STOP").exists()


def test_folders_that_are_named_as_a_run_s_own(mount: Path) -> None:
    names = [f"{name}/output_path" for name in ("cache", "merged", "samples", "tensorboard")]
    for name in names:
        make_run(mount / name, 3)
    inside = ("cache/train-0d60a9262e0b51e9067c/log.txt", "merged/log.txt", "tensorboard/events/log.txt")
    for name in inside:
        path = mount / "done" / "output_path" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    evaluation = mount / "evaluation"
    (evaluation / "samples").mkdir(parents=True)
    (evaluation / "eval_results.json").write_text("{}")
    (evaluation / "samples" / "a.jsonl").touch()
    (mount / "going" / "samples").mkdir(parents=True)  # an evaluation that has no results yet
    (mount / "going" / ".evaluation.lock").touch()
    (mount / "going" / "samples" / "a.jsonl").touch()
    found = Mounted(mount).look()
    assert "going/samples/a.jsonl" not in found.data
    assert set(names) <= set(found.runs)
    assert [name for name in found.runs if name.startswith("done/")] == ["done/output_path"]
    assert "evaluation/samples/a.jsonl" not in found.data


def test_what_a_curator_is_offered_is_data(tmp_path: Path) -> None:
    for name in ("faq.json", "faq.csv", "my_config.json", "more/faq.jsonl"):  # data
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("question,intent\n")
    for name in ("faq.json.changes.json", "faq.json.cleaned.jsonl", "faq.json.decisions.jsonl", "config.json",
                 "generation_config.json", "tokenizer.json", "model.safetensors.index.json", "intents.json",
                 "finetune_config.json", "train_results.json", "run_manifest.json", "adapter_config.json"):  # fmt: skip
        (tmp_path / "more" / name).write_text("{}")
    found = Mounted(tmp_path).look()
    assert found.data == ["faq.csv", "faq.json", "more/faq.jsonl", "my_config.json"]
    assert found.pairs == []


def test_little_of_large_files_is_kept(tmp_path: Path) -> None:
    sizes = {"a": 40, "b": 30, "c": 30, "d": 200, "e": 1}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    made: list[str] = []

    def make(path: Path) -> str:
        made.append(path.name)
        return path.name

    cached = mount_module.Cached(make, 100)
    for asked, new in (
        ("abc", "abc"), ("aabb", ""), ("e", "e"), ("ab", ""), ("c", "c"), ("d", "d"), ("dd", ""), ("e", "e"),
    ):  # fmt: skip
        made.clear()
        assert [cached(tmp_path / name) for name in asked] == list(asked)
        assert "".join(made) == new, asked
        kept = sum(sizes[path.name] for path in cached.kept)
        assert kept <= 100 or len(cached.kept) == 1


def test_what_comes_while_the_console_runs(mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount_module, "STALE", 0.0)
    monkeypatch.setattr(mount_module, "REST", 0)
    of = Mounted(mount)
    report = mount / "done" / "similar.json"
    report.touch()  # made by a shell before the command has printed anything
    assert of.look().pairs == []
    report.write_text('{"code": 0, "msg": "Success", "data": {"mismatched_intents": []}}')
    make_run(mount / "new" / "output_path", 3)

    def seen() -> bool:
        found = of.look()
        return found.pairs == ["done/similar.json"] and "new/output_path" in found.runs

    end = time.monotonic() + 5
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_links_in_a_run_are_not_followed_out(mount: Path, client: TestClient) -> None:
    secret = mount.parent / "secret.txt"
    secret.write_text(log_lines(5))
    log = mount / "fresh" / "output_path" / "log.txt"
    log.unlink()
    log.symlink_to(secret)
    settings = log.with_name("finetune_config.json")
    outside = mount.parent / "settings.json"
    outside.write_text('{"scenario": "secret"}')
    settings.unlink()
    settings.symlink_to(outside)
    assert client.get("/console/api/log?run=fresh/output_path").json()["columns"]["step"] == []
    assert client.get("/console/api/run?run=fresh/output_path").json()["cells"]["step"] == "0"
    assert "secret" not in client.get("/runs/fresh/output_path").text
    assert "no log.txt" in client.get("/console/api/diagnosis?run=fresh/output_path").json()["problem"]


def test_stop(mount: Path, client: TestClient) -> None:
    answer = client.post("/console/api/stop", json={"run": "fresh/output_path"})
    assert answer.json() == {"run": "fresh/output_path", "state": "stopping"}
    assert (mount / "fresh" / "output_path" / "STOP").read_bytes() == b""
    refused = client.post("/console/api/stop", json={"run": "done/output_path"})
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        422, "done/output_path is not running (finished), so there is nothing to stop",
    )  # fmt: skip
    assert not (mount / "done" / "output_path" / "STOP").exists()
    form = client.post("/console/api/stop", data={"run": "fresh/output_path"})  # what another site's page could send
    assert form.status_code == 415
    headers = {"content-type": "application/json"}
    assert client.post("/console/api/stop", content=b"[1]", headers=headers).status_code == 400
    assert client.post("/console/api/stop", json={}).status_code == 422


@pytest.mark.parametrize("value", ["NaN", "1e999", "1" + "0" * 400, "null", "[[]]", '{"a": 1}', '"x"', "true", "-5"])
def test_values_of_any_kind(mount: Path, client: TestClient, value: str) -> None:
    """Whatever stands in a run's files, its pages are there, and what a script fetches is JSON."""
    run = mount / "done" / "output_path"
    with (run / "log.txt").open("a") as log:
        log.write(f'{{"step": 21, "epoch": {value}, "loss": {value}, "elapsed": {value}, "remaining": {value}}}\n')
        log.write(f'{{"step": {value}, "loss": 1.0}}\n{value}\n')
    for name, keys in (("train_results.json", RESULTS), ("finetune_config.json", SETTINGS)):
        (run / name).write_text("{" + ", ".join(f'"{key}": {value}' for key in keys) + "}")
    (run / "cache" / "train-0d60a9262e0b51e9067c" / "meta.json").write_text(f'{{"rows": {value}, "files": {value}}}')
    name = "done/output_path"
    for path in ("/", f"/runs/{name}", f"/compare?run={name}&run=fresh/output_path"):
        assert client.get(path).status_code == 200
    for part in ("run", "log"):
        assert client.get(f"/console/api/{part}?run={name}").status_code == 200


def test_pages(mount: Path, client: TestClient) -> None:
    listed = client.get("/?q=&state=finished").text
    assert 'href="/runs/done/output_path"' in listed
    assert 'href="/runs/fresh/output_path"' not in listed
    page = client.get("/runs/done/output_path").text
    assert "checkpoint-10" in page
    assert "388" in page
    compared = client.get("/compare?run=done/output_path&run=fresh/output_path").text
    assert "Where they differ" in compared
    assert client.get("/runs/nowhere").status_code == 404
    assert client.get("/?page=x").status_code == 422
    assert client.get("/?page=9").status_code == 200


def test_names_of_folders_are_no_markup(mount: Path) -> None:
    make_run(mount / "<img src=x onerror=alert(1)>\"'&", 3)
    with TestClient(Starlette(routes=routes(mount))) as client:
        page = client.get("/").text
        assert "<img" not in page
        assert "&lt;img src=x" in page
        link = re.search(r'href="(/runs/%3Cimg[^"]*)"', page)
        assert link is not None
        assert "<img" not in client.get(link[1]).text


def test_language(client: TestClient) -> None:
    assert "训练" in client.get("/", headers={"accept-language": "zh-CN,zh;q=0.9,en;q=0.8"}).text
    assert 'lang="en"' in client.get("/", headers={"accept-language": "fr-FR, en;q=0.5, zh;q=0.1"}).text
    answer = client.get("/console/language/zh-CN?next=/%3Fq%3Ddone", follow_redirects=False)
    assert answer.headers["location"] == "/?q=done"
    answer = client.get("/console/language/zh-CN?next=/runs/a%20b//c", follow_redirects=False)
    assert answer.headers["location"] == "/runs/a%20b//c"
    assert 'lang="zh-CN"' in client.get("/").text  # by the cookie
    for foreign in (
        "https://other.example/", "//other.example", "/\\other.example", "javascript:alert(1)", "//////other.example",
        "///other.example", "/\t/other.example", "\t//other.example", "/a\r\nx: y", "", "other.example",
        "/\\/other.example", "/a\\..\\\\other.example",
    ):  # fmt: skip
        place = client.get("/console/language/en", params={"next": foreign}, follow_redirects=False).headers["location"]
        assert place == "/"


def test_every_text_is_there_in_chinese() -> None:
    chinese = json.loads((CONSOLE / "static" / "zh-CN.json").read_text(encoding="utf-8"))
    sources = [*CONSOLE.glob("templates/*.html"), *CONSOLE.glob("static/*.js"), *CONSOLE.glob("*.py")]
    asked: dict[str, str] = {}
    for path in sources:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"""\bt\(\s*(?:"([^"]+)"|'([^']+)')""", text):
            asked[match[1] or match[2]] = path.name
    assert {text: where for text, where in asked.items() if text not in chinese} == {}
    for text, translated in chinese.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", translated)), text


def test_templates_have_no_inline_script_or_style_and_no_foreign_address() -> None:
    inline = r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=\"|javascript:|innerHTML|insertAdjacentHTML|eval\("
    for path in (*CONSOLE.glob("templates/*.html"), *CONSOLE.glob("static/*.js"), *CONSOLE.glob("static/*.css")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(inline, text), path
        assert re.findall(r"https?://(?!www\.w3\.org/)[^\s\"')]+", text) == [], path


def test_without_torch() -> None:
    code = "import sys; from serve.console.routes import routes; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]
