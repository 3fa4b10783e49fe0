"""Settings mean the same as flag, in the environment and in the .py: true and false, numbers, GPUs; for every shell."""

import argparse
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, chat_main, environment

from llmops.console import to_bool

SHELLS = sorted(path for path in ROOT.glob("*/*.sh") if "# --- settings" in path.read_text(encoding="utf-8"))
SHELLS.append(ROOT / "chat_main.sh")
SOURCE = f'set -euo pipefail; source "{ROOT}/llmops/environment.sh"; '


def shell(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run lines of bash with llmops/environment.sh."""
    return subprocess.run(
        ["bash", "-c", SOURCE + script], env=environment() | variables, capture_output=True, text=True, check=False
    )


def test_every_boolean_of_every_shell_is_known() -> None:
    """A setting whose default is true or false is one that environment.sh normalises, and nothing else is."""
    found = {
        name
        for path in SHELLS
        for name in re.findall(r'^([A-Z_]+)="\$\{\1:-(?:true|false)\}"', path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    listed = shell('printf "%s\\n" "${BOOLEANS[@]}"').stdout.split()
    assert listed == sorted(found)


@pytest.mark.parametrize(
    "text", ["true", "TRUE", "Yes", "1", " true ", "false", "False", "NO", "0", "maybe", "2", "on"]
)
def test_a_boolean_means_in_bash_what_it_means_in_python(text: str) -> None:
    done = shell('DRY_RUN=$VALUE; check_boolean DRY_RUN; printf %s "$DRY_RUN"', VALUE=text)
    try:
        assert done.stdout == str(to_bool(text)).lower()
    except argparse.ArgumentTypeError:
        assert done.returncode == 2
        assert f"--dry_run is '{text}', expected true or false" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["--num_processes", "-5"], "--num_processes is '-5', expected a whole number from 1 to 1024"),
        (["--num_processes", "abc"], "--num_processes is 'abc', expected a whole number"),
        (["--num_processes=0"], "--num_processes is '0', expected a whole number"),
        (["--node_rank", "1.5"], "--node_rank is '1.5', expected a whole number"),
        (["--master_port", "70000"], "--master_port is '70000', expected a whole number from 1 to 65535"),
        (["--no_ssh", "perhaps"], "--no_ssh is 'perhaps', expected true or false"),
        (["--cuda_visible_devices", "0,,1"], "expected GPUs such as 0,1"),
        (["--cuda_visible_devices", "0;touch x"], "expected GPUs such as 0,1"),
        (["--cuda_visible_devices", "1, 1"], "names 1 twice"),
        (["--include_hosts", "worker-1"], "--include_hosts chooses machines of a --hostfile"),
        (["--hostfile", "/no/such"], "the hostfile /no/such does not exist; expected lines like 'worker-1 slots=8'"),
        (["--num processes", "2"], "unknown argument --num processes"),
        (["--num_processes hostfile", "2"], "unknown argument --num_processes hostfile"),
        (["--seed", "-5"], "--seed is -5, expected at least 0"),
        (["--learning_rate", "-1e-4"], "--learning_rate is -0.0001, expected at least 0"),
        (["--tensorboard_port", "70000"], "--tensorboard_port is 70000, expected at most 65535"),
    ],
)
def test_wrong_values_are_refused_before_anything_starts(arguments: list[str], phrase: str) -> None:
    done = chat_main(*arguments)
    assert done.returncode == 2
    assert phrase in done.stderr
    assert "Traceback" not in done.stderr


def test_the_environment_is_judged_like_a_flag() -> None:
    assert "--num_processes is 'two'" in chat_main(NUM_PROCESSES="two").stderr
    assert "--dry_run is 'ja', expected true or false" in chat_main(DRY_RUN="ja").stderr
    script = ROOT / "eval" / "model_performance_evaluation.sh"
    done = subprocess.run(
        ["bash", str(script)], env=environment() | {"NUM_PROCESSES": "-1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--num_processes is '-1'" in done.stderr


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("NUM_PROCESSES", " 08 ", "8"),
        ("NODE_RANK", "0", "0"),
        ("CUDA_VISIBLE_DEVICES", " 0, 3 ", "0,3"),
        ("CUDA_VISIBLE_DEVICES", "-1", "-1"),
        ("CUDA_VISIBLE_DEVICES", "", ""),
        (
            "CUDA_VISIBLE_DEVICES",
            "GPU-8f2c1d9e-1111-2222-3333-444455556666,1",
            "GPU-8f2c1d9e-1111-2222-3333-444455556666,1",
        ),
        ("RESUME", "YES", "true"),
        ("RESUME", "", ""),
    ],
)
def test_good_values_are_written_one_way(name: str, text: str, expected: str) -> None:
    done = shell(f'NAMES=({name}); {name}=$VALUE; check_settings; printf "[%s]" "${name}"', VALUE=text)
    assert done.stdout == f"[{expected}]", done.stderr


def test_values_that_begin_with_a_dash_stay_values(tmp_path: Path) -> None:
    done = shell("NAMES=(QUESTION SEED); QUESTION='--help me'; SEED=-5; setting_flags | tr '\\0' '\\n'")
    assert done.stdout.splitlines() == ["--question=--help me", "--seed=-5"]
