"""docs/architecture.md against the code: names, imports, and the two walks as they are called."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from llmops.models import tiny
from train import ownership, run_folder

PAGES = [ROOT / "docs" / name for name in ("architecture.md", "architecture.zh-CN.md")]
ENGLISH = PAGES[0].read_text(encoding="utf-8")
ROOMS = ("train", "faq", "eval", "serve", "job")
ROW = re.compile(r"^\| `([\w./]+\.py)` \| (`[\w.]+`(?:, `[\w.]+`)*) \|", re.MULTILINE)
INNER = re.compile(r"^\| `llmops/(\w+)` \| .* \| ?(.*) \|$", re.MULTILINE)
HEAVY = ("torch", "transformers", "deepspeed", "peft")
Walk = list[tuple[str, list[str]]]
Calls = list[tuple[str, str]]


def walks(text: str) -> list[Walk]:
    """Both tables of files that are entered, with their functions."""
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    found = [[(path, re.findall(r"`([\w.]+)`", names)) for path, names in ROW.findall(part)] for part in parts]
    return [walk for walk in found if walk]


def defined(path: Path) -> set[str]:
    """Functions, classes, methods and constants of a file."""
    names: set[str] = set()

    def look(node: ast.AST, before: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(before + child.name)
                look(child, f"{before}{child.name}.")
            elif isinstance(child, ast.Assign):
                names.update(target.id for target in child.targets if isinstance(target, ast.Name))

    look(ast.parse(path.read_text(encoding="utf-8")), "")
    return names


def names_imported(path: Path) -> set[str]:
    """What a file imports, at its top or in a function: `a.b` and, of `from a.b import c`, `a.b.c`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    return {name.partition(".")[0] for name in names_imported(path)} & {"llmops", "bench", "tests", *ROOMS}


@pytest.mark.parametrize("page", PAGES, ids=["en", "zh"])
def test_every_file_and_function_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`([\w.-]+/[\w./-]*|[\w-]+\.sh)`", text):
        assert (ROOT / name).exists(), name
    for walk in walks(text):
        for path, names in walk:
            assert not set(names) - defined(ROOT / path), path
    for name, path in re.findall(r"`(\w+)` of `([\w./]+\.py)`", text):
        assert name in defined(ROOT / path), (name, path)
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_both_languages_name_the_same() -> None:
    english, chinese = (page.read_text(encoding="utf-8") for page in PAGES)
    assert walks(english) == walks(chinese)
    assert set(re.findall(r"`([^`]+)`", english)) == set(re.findall(r"`([^`]+)`", chinese))
    assert english.count("\n## ") == chinese.count("\n## ")


def test_rooms_import_as_the_page_says() -> None:
    for path in (ROOT / "llmops").rglob("*.py"):
        assert imported(path) <= {"llmops"}, path
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            assert imported(path) <= {"llmops", room}, path


@pytest.mark.parametrize("page", PAGES, ids=["en", "zh"])
def test_rooms_of_llmops_import_as_the_page_says(page: Path) -> None:
    """Only from the rooms of their row, which stand above it; the ground floor from none, a room's door not at all."""
    rows = INNER.findall(page.read_text(encoding="utf-8"))
    allowed = {name: set(re.findall(r"`llmops/(\w+)`", imports)) for name, imports in rows}
    folders = {path.name for path in (ROOT / "llmops").iterdir() if path.is_dir() and path.name[0] != "_"}
    assert allowed.keys() == folders
    for place, (room, wanted) in enumerate(allowed.items()):
        assert wanted <= set(list(allowed)[:place]), room
        assert names_imported(ROOT / "llmops" / room / "__init__.py") == set()
    for path in (ROOT / "llmops").rglob("*.py"):
        inside = path.relative_to(ROOT / "llmops").parts
        found = {name.split(".")[1] for name in names_imported(path) if name.startswith("llmops.")} & folders
        assert found <= ({inside[0], *allowed[inside[0]]} if len(inside) > 1 else set()), path


def test_what_a_run_writes_is_named() -> None:
    written = {*run_folder.CLAIMED, run_folder.CACHE_NAME, run_folder.STOP_NAME, ownership.OWN_NAME}
    assert not {name for name in written if f"`{name}`" not in ENGLISH}


def test_commands_and_readers_load_no_heavy_library() -> None:
    _, _, sentence = ENGLISH.rpartition("need none of them: importing")
    names = [name.removesuffix(".py").replace("/", ".") for name in re.findall(r"`([\w/]+\.py)`", sentence)]
    assert len(names) >= 10
    code = f"import sys\nimport {', '.join(names)}\nprint(*sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def out_of_order(walk: Walk, calls: Calls) -> list[str]:
    """Rows whose first function, or what is defined in it, is not called after that of the row before.

    Nor may it have been called before that one, since the row before that.
    """
    wrong, since, at = [], 0, 0
    for path, functions in walk:
        places = (i for i in range(since, len(calls)) if calls[i][0] == path)
        found = next((i for i in places if f"{calls[i][1]}.".startswith(f"{functions[0]}.")), -1)
        if found < at:
            wrong.append(f"{path} {functions[0]}")
        else:
            since, at = at + 1, found
    return wrong


@pytest.mark.parametrize(("place", "name"), [(0, "conversation"), (1, "question")])
def test_the_walk_is_what_is_called(tmp_path: Path, place: int, name: str) -> None:
    """Each row's first function is called after that of the row before, its others some time; swapped rows are seen."""
    model = tiny.write_checkpoint(tmp_path / "tiny", ["ping Pong! hello world"] * 3, vocab_size=300, hidden=32)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "walk.py"), name, str(model)],
        env=environment() | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    calls = [(path, name) for path, _, name in (line.partition(" ") for line in done.stdout.splitlines())]
    walk = walks(ENGLISH)[place]
    assert out_of_order(walk, calls) == []
    assert [path for path, functions in walk for name in functions[1:] if (path, name) not in calls] == []
    entered = [path for path, _ in walk]
    assert [path for path in entered if entered.count(path) > 2] == []
    swapped = [[*walk[:i], walk[i + 1], walk[i], *walk[i + 2 :]] for i in range(len(walk) - 1)]
    assert all(out_of_order(wrong, calls) for wrong in swapped)
