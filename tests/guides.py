"""The pages that users read: which they are, their code blocks, and the commands in them."""

import re
import subprocess
from functools import cache

from conftest import ROOT

PAGES = sorted(
    subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True,
        text=True, check=True,
    ).stdout.split()
)  # fmt: skip
# for those who change the code, and about data; the others are guides and have a Chinese twin
ENGLISH_ONLY = {
    "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "bench/diagnosis_results.md", "tests/logs/README.md",
    "train/demo_data/README.md",
}  # fmt: skip
GUIDES = [name for name in PAGES if not name.endswith(".zh-CN.md") and name not in ENGLISH_ONLY and name[0] != "."]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
# a command of the project's between words
COMMAND = re.compile(r"(?:[A-Z_]+=\S* )*(?:bash|python) [\w./]+\.(?:sh|py)\b")


def text_of(name: str) -> str:
    """A page."""
    return (ROOT / name).read_text(encoding="utf-8")


def twin(name: str) -> str:
    """The Chinese page of an English one."""
    return name.removesuffix(".md") + ".zh-CN.md"


def prose(name: str) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", text_of(name))


def without_comments(block: str) -> str:
    """A block of bash without comments, which are in the page's language."""
    return re.sub(r"(^|\s+)# .*$", "", block, flags=re.MULTILINE).strip()


def commands(name: str) -> list[str]:
    """The bash blocks of a page without comments."""
    return [without_comments(body) for _, language, body in FENCE.findall(text_of(name)) if language == "bash"]


@cache
def steps(name: str) -> list[tuple[str, str]]:
    """What a reader of the page is told to run: (command or Python code, the JSON that the page shows below it).

    First the blocks of code, in order; of bash a command is a line. Then what stands between words as a command of the
    project's. Words for a folder are the same in both languages here.
    """
    text = text_of(name).replace("目录`", "FOLDER`")
    blocks, found = list(FENCE.finditer(text)), []
    for i, block in enumerate(blocks):
        after = blocks[i + 1] if i + 1 < len(blocks) else None
        shown = after[3] if after and after[2] == "json" and not text[block.end() : after.start()].strip() else ""
        if block[2] == "bash":
            lines = without_comments(block[3]).replace("\\\n", " ").splitlines()
            found += [(" ".join(line.split()), shown) for line in lines if line]
        elif block[2] == "python":
            found.append((block[3], ""))
    spans = [span.replace("\\|", "|") for span in SPAN.findall(FENCE.sub("", text))]
    return found + [(span, "") for span in spans if COMMAND.match(span)]
