"""The guides: every link leads somewhere, both languages are alike, every command is one that the project knows."""

import re
import shlex
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT, environment
from guides import COMMAND, GUIDES, PAGES, SPAN, commands, prose, text_of, twin

HEADING = re.compile(r"^(#+) (.*)$", re.MULTILINE)
IMAGE = "llmops-deepspeed-backend"
# variables that are no setting of the script that they stand before
VARIABLES = {"PIP_NO_INDEX", "PIP_FIND_LINKS", "PROJECT", "MNT", "LLMOPS_TOKEN"}
# what a command starts with its own environment
STARTS = {
    "faq/run_all.sh": ("faq/prepare.sh", "chat_main.sh", "faq/predict.sh", "faq/score.sh"),
    "job/run.sh": ("chat_main.sh",),
    "docs/jobs/slurm.sh": ("job/run.sh",),
}
# flags of other programs that the guides name: Docker, pip, git, vLLM, tensorboard, DeepSpeed, the libraries of peers
ELSEWHERE = {
    "include", "exclude",
    "all", "build-arg", "cap-drop", "chat-template", "continuous-batching", "export", "generation-config", "gpus",
    "lora-modules", "max-lora-rank", "network", "read-only", "secret", "security-opt", "shm-size", "tmpfs",
    "trust-remote-code", "user", "logdir", "local-dir", "local_dir", "install",
}  # fmt: skip


@cache
def anchors(name: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for _, title in HEADING.findall(prose(name)):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = next(n for n in range(100) if (f"{slug}-{n}" if n else slug) not in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def links(name: str) -> list[str]:
    """The relative links and pictures of a page."""
    found = re.findall(r"\]\(([^)\s]+)\)", SPAN.sub("", prose(name)))
    return [target for target in found if not re.match(r"https?:|mailto:", target)]


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    for target in links(name):
        path, _, anchor = target.partition("#")
        found = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(str(found.relative_to(ROOT))), target


def test_every_guide_has_its_twin_and_stands_in_the_index() -> None:
    listed = {str(((ROOT / "docs") / target.partition("#")[0]).resolve()) for target in links("docs/README.md")}
    for name in GUIDES:
        assert twin(name) in PAGES, name
        assert name == "docs/README.md" or str(ROOT / name) in listed, f"{name} is not in docs/README.md"


def tables(name: str) -> list[list[int]]:
    """The number of cells of every row, table by table."""
    found: list[list[int]] = [[]]
    for line in prose(name).splitlines():
        if line.startswith("|"):
            found[-1].append(len(re.findall(r"(?<!\\)\|", line)))
        elif found[-1]:
            found.append([])
    return [rows for rows in found if rows]


@pytest.mark.parametrize("name", GUIDES)
def test_both_languages_are_alike(name: str) -> None:
    other = twin(name)
    levels = [[len(marks) for marks, _ in HEADING.findall(prose(page))] for page in (name, other)]
    assert levels[0] == levels[1], "headings"
    assert commands(name) == commands(other)
    assert tables(name) == tables(other)
    targets = []  # the same pages, and a heading in both or in neither
    for page in (name, other):
        parts = [link.replace(".zh-CN.md", ".md").partition("#") for link in links(page)]
        targets.append(sorted((path, bool(heading)) for path, _, heading in parts))
    assert targets[0] == targets[1]


def test_the_version_is_the_same_everywhere() -> None:
    places = {
        "pyproject.toml": r'^version = "(.+)"', "CITATION.cff": r"^version: (.+)",
        "Dockerfile": r'image\.version="(.+)"', "serve/openapi.py": r'^VERSION = "(.+)"',
        "CHANGELOG.md": r"^## \[(\d.+)\]",
    }  # fmt: skip
    found = {}
    for name, pattern in places.items():
        match = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert match, name
        found[name] = match[1]
    assert len(set(found.values())) == 1, found


def test_the_first_page_is_short() -> None:
    for name in ("README.md", "README.zh-CN.md"):
        assert len(text_of(name).splitlines()) <= 150, name


def simple_commands(text: str) -> list[list[str]]:
    """The words of every simple command in lines of bash, without redirections."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        skip = False
        for word in [*lexer, ";"]:
            if skip:
                skip = False
            elif re.fullmatch(r"[;&|]+", word):
                found.append(words)
                words = []
            elif re.fullmatch(r"[<>]+", word):
                skip = True
            elif word not in ("...", "(", ")"):
                words.append(word)
    return [words for words in found if words]


@cache
def known(script: str) -> frozenset[str]:
    """The flags of one of the project's commands, without dashes: those of its --help."""
    path = ROOT / script
    runner = ["bash"] if path.suffix == ".sh" else [sys.executable]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".sh" and "# --- settings" not in text:
        flags = set(re.findall(r"--([a-z][\w-]*)", text))
        handed = re.search(r'HERE/([\w/]+\.py)".*"\$@"', text)
        return frozenset(flags | (set(known(handed[1])) if handed else set()))
    done = subprocess.run(
        [*runner, script, "--help"], cwd=ROOT, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{script} --help\n{done.stderr[-2000:]}"
    return frozenset(re.findall(r"(?<![\w-])--([a-z][\w-]*)", done.stdout)) | {"help", "demo"}


def check_command(words: list[str]) -> bool:
    """Whether the words are a command of the project's; its script, its flags and its variables have to be there."""
    variables = []
    while words and re.match(r"[A-Z_]+=", words[0]):
        variables.append(words[0].partition("=")[0])
        words = words[1:]
    if words[:2] == ["docker", "run"]:
        return IMAGE in words and check_command(words[words.index(IMAGE) + 1 :])
    words = words[1:] if words and words[0] == "exec" else words
    if len(words) < 2 or words[0] not in ("bash", "python", ".venv/bin/python", "sbatch") or words[1] == "-m":
        return False
    script, *arguments = words[1:]
    assert (ROOT / script).is_file(), script
    flags = known(script)
    started = STARTS.get(script, ())  # the environment reaches these, too
    settings = flags.union(*(known(other) for other in started))
    for variable in set(variables) - VARIABLES:
        assert variable.lower() in settings, f"{variable} before {script}"
    for position, word in enumerate(arguments):
        if word == "--":
            return check_command(["bash", "chat_main.sh", *arguments[position + 1 :]])
        assert not word.startswith("/mnt"), f"{word} is a path from the root"
        if word.startswith("--"):
            assert word[2:].partition("=")[0] in flags, f"{word} of {script}"
    return True


@pytest.mark.parametrize("name", [page for guide in GUIDES for page in (guide, twin(guide))])
def test_every_command_is_known(name: str) -> None:
    """Every command in a block or between words: its script, its flags, its variables."""
    for block in commands(name):
        for words in simple_commands(block):
            check_command(words)
    for span in SPAN.findall(prose(name)):
        if COMMAND.match(span):
            for words in simple_commands(span.replace("\\|", "|")):
                assert check_command(words), span


@pytest.mark.parametrize("name", [page for guide in GUIDES for page in (guide, twin(guide))])
def test_every_flag_is_known(name: str) -> None:
    """A flag that a sentence or a table names is one of some command's."""
    listed = subprocess.run(["git", "ls-files", "*.sh"], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {"help", "demo"}
    for script in listed.stdout.split():
        if re.match(r"(chat_main|eval/\w+|faq/\w+|serve/\w+|job/run|tests/\w+|bench/\w+)\.sh$", script):
            ours |= known(script)
    for script in ("eval/diagnosis_monitoring.py", "eval/evaluate_model_from_five_dimensions.py",
                   "eval/model_performance_evaluation.py", "eval/analyze_similar_questions_and_intents.py",
                   "docs/compare_answers.py", "train/finetune.py"):  # fmt: skip
        ours |= known(script)
    for span in SPAN.findall(prose(name)):
        for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", span):
            assert flag in ours | ELSEWHERE, f"--{flag}"


def test_paths_are_as_in_the_tree() -> None:
    """Files of the project that a guide names between marks are there."""
    made = {"llmops/formats/templates/mistral.json"}  # by the reader, as faq/README.md says
    path = re.compile(r"(?:train|faq|eval|serve|job|llmops|tests|bench|docs)/[\w./-]*\.(?:py|sh|json|jsonl|md|yaml)")
    for guide in GUIDES:
        for page in (guide, twin(guide)):
            for span in SPAN.findall(prose(page)):
                assert not path.fullmatch(span) or span in made or (ROOT / span).exists(), f"{page}: {span}"
