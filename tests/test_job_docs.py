"""docs/jobs: the Slurm script is run, the Kubernetes Job and the compose file are held to what their readers take."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import ROOT, environment
from job_platform import platform_server, wait_for

from job.settings import FLAGS, JOB_IDS, SECRET_NAMES, read_settings

JOBS = ROOT / "docs" / "jobs"
TEXT = {"type": "string"}
NUMBER = {"type": "integer", "minimum": 0}
QUANTITY = {"anyOf": [NUMBER, {"type": "string", "pattern": r"^\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"}]}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}


def shape(required: list[str], **keys: Any) -> dict[str, Any]:
    """The schema of an object with these keys and no others."""
    return {"type": "object", "required": required, "properties": keys, "additionalProperties": False}


def rows(item: dict[str, Any]) -> dict[str, Any]:
    """The schema of a list that is not empty."""
    return {"type": "array", "items": item, "minItems": 1}


def free(value: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object with any keys."""
    return {"type": "object", "additionalProperties": value}


# the parts of batch/v1 Job that the file uses, by the Kubernetes API reference
ENV = shape(["name"], name=TEXT, value=TEXT,
            valueFrom=shape(["secretKeyRef"], secretKeyRef=shape(["name", "key"], name=NAME, key=TEXT,
                                                                 optional={"type": "boolean"})))  # fmt: skip
CONTAINER = shape(
    ["name", "image"], name=NAME, image=TEXT, command=rows(TEXT), env=rows(ENV),
    resources=shape([], limits=free(QUANTITY), requests=free(QUANTITY)),
    securityContext=shape([], allowPrivilegeEscalation={"const": False}, capabilities=shape(["drop"], drop=rows(TEXT))),
    volumeMounts=rows(shape(["name", "mountPath"], name=NAME, mountPath={"type": "string", "pattern": "^/"})),
)  # fmt: skip
POD = shape(
    ["containers", "restartPolicy"], restartPolicy={"enum": ["Never", "OnFailure"]},
    terminationGracePeriodSeconds=NUMBER, containers=rows(CONTAINER),
    securityContext=shape([], runAsNonRoot={"const": True}, runAsUser=NUMBER, runAsGroup=NUMBER, fsGroup=NUMBER,
                          fsGroupChangePolicy={"enum": ["OnRootMismatch", "Always"]}),
    volumes=rows(shape(["name"], name=NAME, persistentVolumeClaim=shape(["claimName"], claimName=NAME),
                       emptyDir=shape([], medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY))),
)  # fmt: skip
RULE = shape(
    ["action"], action={"enum": ["FailJob", "Ignore", "Count", "FailIndex"]},
    onPodConditions=rows(shape(["type", "status"], type=TEXT, status={"enum": ["True", "False", "Unknown"]})),
    onExitCodes=shape(["operator", "values"], containerName=NAME, operator={"enum": ["In", "NotIn"]},
                      values=rows({"type": "integer", "minimum": 1})),
)  # fmt: skip
KUBERNETES = shape(
    ["apiVersion", "kind", "metadata", "spec"], apiVersion={"const": "batch/v1"}, kind={"const": "Job"},
    metadata=shape(["name"], name=NAME),
    spec=shape(["template"], backoffLimit=NUMBER, podFailurePolicy=shape(["rules"], rules=rows(RULE)),
               template=shape(["spec"], spec=POD)),
)  # fmt: skip
# and of the compose specification
DEVICE = shape(["capabilities"], driver=TEXT, count={"anyOf": [{"const": "all"}, NUMBER]}, capabilities=rows(TEXT))
SERVICE = shape(
    ["image", "command"], image=TEXT, command=rows(TEXT), shm_size=TEXT, environment=free(TEXT), volumes=rows(TEXT),
    stop_grace_period={"type": "string", "pattern": r"^\d+[smh]$"},
    restart={"type": "string", "pattern": r"^(no|always|unless-stopped|on-failure(:\d+)?)$"},
    deploy=shape([], resources=shape([], reservations=shape([], devices=rows(DEVICE)))),
    depends_on=free(shape(["condition"], condition={"enum": ["service_started", "service_healthy",
                                                             "service_completed_successfully"]})),
)  # fmt: skip
COMPOSE = {"type": "object", "required": ["services"], "additionalProperties": False,
           "properties": {"services": free(SERVICE)}, "patternProperties": {"^x-": {}}}  # fmt: skip


def read(name: str) -> Any:
    """The one document of a YAML file, every key once."""

    class Strict(yaml.SafeLoader):
        """A loader that refuses a key that comes twice."""

    def mapping(loader: Strict, node: yaml.MappingNode) -> dict[str, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        assert len(keys) == len(set(keys)), f"{name}: a key comes twice among {keys}"
        loader.flatten_mapping(node)
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    (document,) = yaml.load_all((JOBS / name).read_text(encoding="utf-8"), Strict)
    return document


def check_variables(given: dict[str, str], task: str) -> None:
    """Every variable is one that a job reads, and together they make the task that is meant."""
    assert set(given) <= {name.upper() for name in FLAGS} | set(SECRET_NAMES)
    plain = {name: "" if value.startswith("${") else value for name, value in given.items()}
    assert read_settings([], plain).task == task


def test_the_kubernetes_job() -> None:
    job = read("kubernetes.yaml")
    jsonschema.validate(job, KUBERNETES)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    check_variables({row["name"]: row.get("value", "") for row in container["env"]}, "train")
    assert (ROOT / container["command"][1]).is_file()
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (rule,) = (rule for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule)
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy asks for it


def test_the_compose_file() -> None:
    found = read("compose.yaml")
    jsonschema.validate(found, COMPOSE)
    services = found["services"]
    for name, task in (("train", "train"), ("evaluate", "evaluate")):
        check_variables(services[name]["environment"], task)
        assert (ROOT / services[name]["command"][1]).is_file()
    assert set(services["evaluate"]["depends_on"]) <= set(services)
    assert services["evaluate"]["environment"]["MODEL_PATH"] == services["train"]["environment"]["OUTPUT_DIR"]


def test_a_wrong_key_is_seen() -> None:
    job = read("kubernetes.yaml")
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 600
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, KUBERNETES)


SBATCH = re.compile(
    r"#SBATCH --(job-name|nodes|ntasks|gpus-per-node|cpus-per-task|mem|time|open-mode|output|signal)=\S+"
)


def test_the_slurm_script_is_one() -> None:
    """bash reads it; sbatch's options stand before the first command; shellcheck is lint.sh's."""
    script = JOBS / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    lines = script.read_text(encoding="utf-8").splitlines()
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert all(SBATCH.fullmatch(line) or line == "#SBATCH --requeue" for line in options)
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]


class Batch:
    """The script as Slurm starts it, from the spool; scontrol writes down what it was asked."""

    def __init__(self, folder: Path, **variables: str) -> None:
        (folder / "bin").mkdir(exist_ok=True)
        self.asked = folder / "scontrol.txt"
        (folder / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{self.asked}\n')
        (folder / "bin" / "scontrol").chmod(0o755)
        script = folder / "slurm_script"
        script.write_bytes((JOBS / "slurm.sh").read_bytes())
        given = environment()
        given |= {"SLURM_JOB_ID": "4711", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_GPUS_ON_NODE": "1", **variables}
        given["PATH"] = f"{folder / 'bin'}:{given['PATH']}"
        given["MOUNT_PATH"] = str(folder)
        self.process = subprocess.Popen(
            ["bash", str(script)], env=given, cwd=os.sep, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )


def test_the_slurm_script_ends_as_its_job_does(tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"answer": "a", "gold": "a"}\n')
    given = {"MODEL_PATH": str(tmp_path), "EVALUATION_METRICS": "Acc"}
    batch = Batch(tmp_path, DATASET_PATH=str(data), **given)
    out, err = batch.process.communicate(timeout=60)
    assert batch.process.returncode == 0, err
    told = json.loads(out)
    assert (told["job"], told["state"], told["data"]) == ("4711", "succeeded", {"Acc": 1.0})
    failed = Batch(tmp_path, DATASET_PATH=str(tmp_path / "gone"), **given)
    failed.process.communicate(timeout=60)
    assert failed.process.returncode == 2
    assert not batch.asked.exists()


@pytest.mark.parametrize(("number", "asked"), [(signal.SIGUSR1, "requeue 4711\n"), (signal.SIGTERM, "")])
def test_out_of_time_it_is_queued_again(tmp_path: Path, number: int, asked: str) -> None:
    """The job is at work (its data does not come yet); a cancelled one is not queued again."""
    with platform_server() as server:
        server.faults = [503] * 999
        given = {"MODEL_PATH": str(tmp_path), "EVALUATION_METRICS": "Acc"}
        batch = Batch(tmp_path, DATASET_PATH=f"{server.url}/a.jsonl", **given)
        wait_for(lambda: server.calls)
        batch.process.send_signal(number)
        out, err = batch.process.communicate(timeout=60)
    assert batch.process.returncode == 143, err
    assert json.loads(out)["state"] == "stopped"
    assert (batch.asked.read_text() if batch.asked.exists() else "") == asked


def test_both_languages_say_the_same_commands() -> None:
    """The code of the page is the same in both; every variable of the tables is in both."""
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("jobs.md", "jobs.zh-CN.md")]
    blocks = [re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL) for page in pages]
    assert blocks[0] == blocks[1]
    names = [set(re.findall(r"`([A-Z][A-Z_]{3,})`", page)) for page in pages]
    assert names[0] == names[1]
    known = {name.upper() for name in FLAGS} | set(SECRET_NAMES) | set(JOB_IDS)
    same = {"NUM_TRAIN_EPOCHS", "PER_DEVICE_TRAIN_BATCH_SIZE", "PER_DEVICE_EVAL_BATCH_SIZE", "LEARNING_RATE",
            "GRADIENT_ACCUMULATION_STEPS", "MASTER_PORT", "HF_HOME", "HF_TOKEN", "OUTPUT_PATH",
            "POST"}  # fmt: skip
    assert names[0] - known <= same
