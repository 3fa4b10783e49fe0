"""What the console says of a run's log is what the command says; who waits for it keeps nobody else waiting."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from starlette.testclient import TestClient
from test_console import client, mount

from serve.console import diagnosis
from serve.console.mount import Mounted

__all__ = ["client", "mount"]  # fixtures


def test_the_diagnosis_is_the_command_s(mount: Path, client: TestClient) -> None:
    log = mount / "done" / "output_path" / "log.txt"
    details = mount.parent / "details.json"
    command = [sys.executable, ROOT / "eval" / "diagnosis_monitoring.py", log, "--details", details]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    found = client.get("/console/api/diagnosis?run=done/output_path").json()
    assert found == json.loads(details.read_text()) | {"recommendations": answer["data"]["recommendations"]}
    assert {risk: finding["level"] for risk, finding in found["findings"].items()} == answer["data"]["current_risks"]
    chinese = client.get("/console/api/diagnosis?run=done/output_path", headers={"accept-language": "zh-CN"}).json()
    for risk, finding in chinese["findings"].items():
        assert re.search("[\u4e00-\u9fff]", finding["missing"] or finding["reason"]), risk
        assert finding["numbers"] == found["findings"][risk]["numbers"]
    (mount / "fresh" / "output_path" / "log.txt").write_text("")
    assert "no readable loss" in client.get("/console/api/diagnosis?run=fresh/output_path").json()["problem"]


def test_who_waits_for_a_diagnosis_keeps_nobody_from_the_pages(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(log: Path) -> dict[str, Any]:
        begun.set()
        go_on.wait(30)
        return {"problem": "slow"}

    def judge(name: str) -> str:
        return client.get(f"/console/api/diagnosis?run={name}/output_path").json().get("problem", "")

    assert judge("done") == ""
    monkeypatch.setattr(diagnosis, "ask", slow)
    with ThreadPoolExecutor(46) as pool:
        waiting = [pool.submit(judge, "killed") for _ in range(45)]  # as many as there are threads for all pages, and 5
        try:
            assert begun.wait(10)
            time.sleep(0.3)
            assert pool.submit(client.get, "/").result(10).status_code == 200
        finally:
            go_on.set()
        assert {one.result(10) for one in waiting} == {"slow"}


def test_a_diagnosis_that_is_known_is_told_while_another_one_is_made(
    mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = diagnosis.Diagnoses(Mounted(mount))
    monkeypatch.setattr(diagnosis, "PAUSE", 0)
    monkeypatch.setattr(diagnosis, "ask", lambda log: {"problem": "first"})
    assert known.of("done/output_path", "en") == {"problem": "first"}
    os.utime(mount / "done" / "output_path" / "log.txt")  # it would be judged again
    with ThreadPoolExecutor(1) as pool, known.lock:
        assert pool.submit(known.of, "done/output_path", "en").result(10) == {"problem": "first"}
