"""Questions with 2,000 intents, written by this project: 50 things, each with 40 matters that people ask about.

python bench/many_intents.py FOLDER        writes train.csv and test.csv, with the columns text and category

A test question has a wording that no training question has, and half of them call the thing by its other name.
"""

import argparse
import csv
import itertools
import random
import re
import sys
from pathlib import Path

TEXTS = Path(__file__).with_suffix(".txt")


def rows(text: str) -> list[list[str]]:
    """The parts of each line."""
    return [line.split("|") for line in text.splitlines()]


def questions(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, test) rows of (question, intent): 8,000 and 4,000."""
    _, things, matters = re.split(r"^#.*\n", TEXTS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    draw = random.Random(seed)
    train, test = [], []
    for (name, other), (matter, learned, held) in itertools.product(rows(things), rows(matters)):
        intent = f"{name}: {matter}"
        train += [(wording.format(name), intent) for wording in learned.split(";")]
        test += [(wording.format(draw.choice((name, other))), intent) for wording in held.split(";")]
    return train, test


def main() -> int:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in zip(("train.csv", "test.csv"), questions(0), strict=True):
        with open(folder / name, "w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([("text", "category"), *found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
