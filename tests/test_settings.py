"""Settings mean the same as flag, in the environment and in the .py: true and false, numbers, GPUs; for every shell."""

import argparse
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT, chat_main, environment
from job_platform import wait_for

from llmops.console import to_bool
from train.config import FAQ_DEFAULTS, PEAK_LEARNING_RATES, Config

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


@pytest.mark.parametrize(("given", "seen"), [("", None), (None, None), (" 0, 3 ", "0,3"), ("-1", "-1")], ids=repr)
def test_every_part_of_a_run_sees_the_same_gpus(tmp_path: Path, given: str | None, seen: str | None) -> None:
    """The check and the dry run here: an empty variable means all GPUs, which to CUDA would be none."""
    shutil.copytree(ROOT / "llmops", tmp_path / "llmops")
    shutil.copy(ROOT / "chat_main.sh", tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "finetune.py").write_text('import os\nprint(os.environ.get("CUDA_VISIBLE_DEVICES"))\n')
    (tmp_path / "requirements.txt").write_text("")
    done = subprocess.run(
        ["bash", str(tmp_path / "chat_main.sh"), "--dry_run", "true"], capture_output=True, text=True, check=False,
        env=environment() | ({} if given is None else {"CUDA_VISIBLE_DEVICES": given}),
    )  # fmt: skip
    assert done.stdout.splitlines() == [str(seen)] * 2, done.stderr


def test_values_that_begin_with_a_dash_stay_values(tmp_path: Path) -> None:
    done = shell("NAMES=(QUESTION SEED); QUESTION='--help me'; SEED=-5; setting_flags | tr '\\0' '\\n'")
    assert done.stdout.splitlines() == ["--question=--help me", "--seed=-5"]


@pytest.fixture
def turkish(tmp_path: Path) -> dict[str, str]:
    """The variables of a Turkish user, whose locale is made here; its capital of i is no I."""
    made = None
    if shutil.which("localedef"):
        command = ["localedef", "-i", "tr_TR", "-f", "UTF-8", str(tmp_path / "tr_TR.UTF-8")]
        made = subprocess.run(command, capture_output=True, check=False)
    if made is None or made.returncode:
        pytest.skip("this machine makes no locales")
    return {"LOCPATH": str(tmp_path), "LC_ALL": "tr_TR.UTF-8"}


def test_letters_are_those_of_english_in_every_locale(turkish: dict[str, str]) -> None:
    """Names of settings, as flags and in the help, booleans, GPUs by UUID; texts keep the user's own letters."""
    assert shell("text=limit; printf %s ${text^^}", **turkish).stdout == "LİMİT"
    script = ROOT / "chat_main.sh"
    lines = f"""set +u; read_settings "{script}" --train_file a.jsonl --dry_run TRUE --cuda_visible_devices GPU-AIZ
        printf '%s ' "$TRAIN_FILE" "$DRY_RUN" ${{#SPOKEN}}; setting_flags | tr '\\0' ' '"""
    done = shell(lines, SPOKEN="ışığın", **turkish)
    flags = "--cuda_visible_devices GPU-AIZ --train_file a.jsonl --dry_run true "
    assert (done.stdout, done.stderr) == (f"a.jsonl true 6 {flags}", "")
    helps = [shell(f'print_usage "{script}"', **variables).stdout for variables in ({}, turkish)]
    assert "--include_hosts " in helps[0]
    assert helps[1] == helps[0]
    done = shell("INCLUDE_HOSTS=a; check_number INCLUDE_HOSTS 1 9", **turkish)
    assert "--include_hosts is 'a'" in done.stderr


def test_no_shell_script_asks_the_locale_for_letters() -> None:
    """`lower` and `upper` are the one place."""
    scripts = (path for folder in (ROOT, *(p for p in ROOT.iterdir() if p.is_dir())) for path in folder.glob("*.sh"))
    texts = [path.read_text(encoding="utf-8") for path in scripts]
    found = [line for text in texts for line in re.findall(r"\$\{[^}]*(?:,,|\^\^)\}", text)]
    assert found == ["${1,,}", "${1^^}"]


@pytest.mark.parametrize(
    ("line", "variables", "flags", "expected"),
    [
        ('SEED="7"', {}, [], "7"),
        ('SEED="7"', {"SEED": "8"}, [], "8"),
        ('SEED="7"', {"SEED": "8"}, ["--seed", "9"], "9"),
        ('SEED="7"', {"SEED": ""}, [], "7"),
        ('SEED="${SEED:-7}"', {"SEED": "8"}, [], "8"),
        ('SEED="a  b:-c"', {}, [], "a  b:-c"),
    ],
)
def test_an_edited_line_does_not_hide_the_environment(
    tmp_path: Path, line: str, variables: dict[str, str], flags: list[str], expected: str
) -> None:
    """What stands after :- is edited, but a line may as well be replaced by NAME="value"."""
    script = tmp_path / "edited.sh"
    script.write_text(
        f"{SOURCE}\n# --- settings\n{line} # a number\n# --- end of settings\n"
        'read_settings "$0" "$@"\nprintf %s "$SEED"\n',
        encoding="utf-8",
    )
    done = subprocess.run(
        ["bash", str(script), *flags], env=environment() | variables, capture_output=True, text=True, check=False
    )
    assert done.stdout == expected, done.stderr


def test_blanks_around_the_equals_sign_are_named(tmp_path: Path) -> None:
    script = tmp_path / "edited.sh"
    script.write_text(f'{SOURCE}\n# --- settings\nSEED = "7"\n# --- end of settings\necho on\n', encoding="utf-8")
    done = subprocess.run(["bash", str(script)], env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "edited.sh has 'SEED = ...': a setting is written without blanks around =" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_command_of_a_command(tmp_path: Path, number: signal.Signals) -> None:
    """faq/run_all.sh waits for its training, which saves a checkpoint; also when a terminal closes."""
    inner = "trap 'sleep 0.3; touch saved; exit 143' TERM; touch begun; while :; do sleep 0.05; done"
    command = ["bash", "-c", f'{SOURCE}forward bash -c "$1" || exit $?', "bash", inner]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment())
    wait_for((tmp_path / "begun").exists)
    process.send_signal(number)
    assert process.wait(30) == 143
    assert (tmp_path / "saved").exists()


def test_two_first_starts_install_once(tmp_path: Path) -> None:
    """The second waits for the first; the virtual environment's Python is played by a script."""
    (tmp_path / "requirements.txt").write_text("no-such-package==1.0\n")
    played = tmp_path / ".venv" / "bin" / "python"
    played.parent.mkdir(parents=True)
    played.write_text(
        f"#!/bin/bash\ncd {tmp_path}\n"
        'case "$1 $2" in "-m pip") echo once >>pip; sleep 1; touch done ;;\n'
        f'"- "*) [ -e done ] ;; *) exec {sys.executable} "$@" ;; esac\n'
    )
    played.chmod(0o755)
    line = f"{SOURCE}ensure_python {tmp_path} {tmp_path}/requirements.txt"
    starts = [
        subprocess.Popen(
            ["bash", "-c", line], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [start.communicate(timeout=60) for start in starts]
    assert [out for out, _ in said] == [f"{played}\n"] * 2
    assert (tmp_path / "pip").read_text() == "once\n"
    waited = f"another start installs packages into {tmp_path}/.venv; waiting for it\n"
    installs = f"installing the packages of requirements.txt into {tmp_path}/.venv (once; a few minutes)\n"
    assert sorted(err for _, err in said) == [waited, installs]


def test_a_first_start_that_was_killed_is_completed(tmp_path: Path) -> None:
    """It had made the environment's Python, and no pip yet."""
    (tmp_path / "requirements.txt").write_text("no-such-package==1.0\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / ".venv")], check=True)
    done = shell(f"ensure_python {tmp_path} {tmp_path}/requirements.txt", PIP_NO_INDEX="1")
    assert done.returncode == 2
    assert "No module named pip" not in done.stderr
    assert "No matching distribution found for no-such-package==1.0" in done.stderr


def test_a_folder_is_found_whatever_cdpath_says(tmp_path: Path) -> None:
    """Where it is exported, cd prints where it went; and there may be such a folder elsewhere."""
    (tmp_path / "job").mkdir()
    for places in (".", f"{tmp_path}:."):
        done = subprocess.run(
            ["bash", "job/run.sh", "--task", "x"], cwd=ROOT, env=environment() | {"CDPATH": places},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.startswith("error: TASK is 'x', expected")


@pytest.mark.parametrize("path", SHELLS, ids=lambda path: path.name)
def test_windows_line_endings_are_named(tmp_path: Path, path: Path) -> None:
    """As an editor on Windows saves a script, or a wrongly set git all of them."""
    library = ROOT / "llmops" / "environment.sh"
    copies = [tmp_path / one.relative_to(ROOT) for one in (path, library)]
    for original, copy in zip((path, library), copies, strict=True):
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(original.read_bytes())
    for changed in (copies[:1], copies):
        for copy in changed:
            copy.write_bytes(copy.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
        done = subprocess.run(
            ["bash", str(copies[0].name), "--help"], cwd=copies[0].parent, env=environment(), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: Windows line endings; mend them: sed -i 's/\\r$//' ")
        assert done.stderr.count("\n") == 1
        mend = done.stderr.partition("mend them: ")[2]
        assert subprocess.run(["bash", "-c", mend], cwd=copies[0].parent, check=False).returncode == 0
        assert [copy.read_bytes().count(b"\r\n") for copy in copies] == [0, 0]


# --- the same words in every place: help (train/config.py), chat_main.sh, the tables of docs/settings -------------
MAIN = (ROOT / "chat_main.sh").read_text(encoding="utf-8")
OWN = "mount_path"  # to Config the folder that the console shows, to chat_main.sh where everything lies


def script_settings() -> dict[str, tuple[str, str]]:
    """(default, comment) of every setting of chat_main.sh, by flag, in its order."""
    found = re.findall(r'^([A-Z_]+)="\$\{\1:-(.*)\}" +# (.*)$', MAIN, re.MULTILINE)
    return {name.lower(): (default, comment) for name, default, comment in found}


def table(page: str) -> dict[str, tuple[str, str]]:
    """(default, meaning) of every row of a page's table of settings, by flag, without marks and links."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    rows = re.findall(r"^\| `--(\w+)` \| (.*?) \| (.*) \|$", plain, re.MULTILINE)
    return {name: (default, meaning.replace("`", "")) for name, default, meaning in rows}


def expected_comment(name: str, words: str, default: object) -> str:
    """The comment of a setting in chat_main.sh: its help, and what an empty one is or which modes there are."""
    if name in FAQ_DEFAULTS:
        return f"{words}; empty: {default:g}, faq {FAQ_DEFAULTS[name]:g}"
    derived = re.search(rf'"\$\{{{name.upper()}:=([^}}]+)\}}"', MAIN)
    if derived:
        return f"{words}; empty: {derived[1].replace('$', '')}"
    if name == "mode":
        return words + "; or glm glm2 glm3 baichuan2_13b qwen1.5 llama2"
    return words


def test_the_shell_says_the_same_words_as_the_help() -> None:
    settings = script_settings()
    names = [item.name for item in fields(Config) if item.name != OWN]
    for item in fields(Config):
        if item.name != OWN:
            words = expected_comment(item.name, item.metadata["help"], item.default)
            assert settings[item.name][1] == words, item.name
    assert [name for name in settings if name in names] == names


def test_the_tables_say_the_same_words() -> None:
    settings = script_settings()
    english, chinese = table("settings.md"), table("settings.zh-CN.md")
    assert list(english) == list(chinese) == list(settings)
    for name, (default, words) in settings.items():
        shown = f"`{default}`" if default else "empty"
        if name == OWN:
            shown = "`mnt` beside the script"
        assert english[name][0] == shown, name
        if name != OWN:
            assert chinese[name][0] == shown.replace("empty", "空"), name
        meaning = english[name][1]
        assert meaning.startswith(words), f"{name}: docs/settings.md has to begin with {words!r}"
        assert meaning == words or meaning[len(words)] in ".,:;", f"{name}: docs/settings.md goes on without a stop"
        numbers = re.findall(r"(?<![\w.-])-?\d[\d.e-]*\b", words)
        translated = chinese[name][1].replace("2,048", "2048")
        assert not [number for number in numbers if number not in translated], f"{name}: docs/settings.zh-CN.md"


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_faq_guide_has_the_scenarios_defaults(page: str) -> None:
    text = (ROOT / "faq" / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--(\w+)`(?:(?:, |，)`(\w+)`)? \| ([\d.e-]+) \| ([\d.e-]+) \|$", text, re.MULTILINE)
    found = {(name, kind): (float(general), float(faq)) for name, kind, general, faq in rows}
    defaults = {item.name: item.default for item in fields(Config)}
    expected = {(name, ""): (defaults[name], value) for name, value in FAQ_DEFAULTS.items()}
    expected |= {
        ("learning_rate", kind): (rate, PEAK_LEARNING_RATES["faq"][kind])
        for kind, rate in PEAK_LEARNING_RATES["general"].items()
    }
    assert found == expected


def test_every_mode_is_named_where_modes_are_listed() -> None:
    names = {path.stem for path in (ROOT / "llmops" / "formats" / "templates").glob("*.json")}
    for script in (ROOT / "chat_main.sh", ROOT / "faq" / "run_all.sh"):
        line = re.search(r"^MODE=.*# (.*)$", script.read_text(encoding="utf-8"), re.MULTILINE)
        assert line
        assert names <= set(re.findall(r"[\w.]+", line[1])), script.name


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("model_performance_evaluation.py", ["--model_name_or_path", "MODEL", "--dataset_path", "DATA"]),
        ("evaluate_model_from_five_dimensions.py", ["MODEL", '["inference_ability"]']),
        ("analyze_similar_questions_and_intents.py", ["--model_path", "builtin:ngram", "--data_file_path", "FAQ"]),
    ],
)
def test_a_python_without_the_packages_is_told_of_the_script_that_finds_one(
    tmp_path: Path, checkpoints: dict[str, Path], script: str, arguments: list[str]
) -> None:
    demo = ROOT / "train" / "demo_data" / "test.jsonl"
    faq = ROOT / "eval" / "eval_datasets" / "faq_similar" / "combine_data.json"
    paths = {"MODEL": str(checkpoints["llama"]), "DATA": str(demo), "FAQ": str(faq)}
    command = [sys.executable, "-S", "-I", str(ROOT / "eval" / script), *(paths.get(word, word) for word in arguments)]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "run the .sh beside this command, which finds the Python that has it" in done.stderr
    assert "Traceback" not in done.stderr
