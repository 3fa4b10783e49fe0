"""Tables in a log: a line of column names, then a line of values per reading (csv, tsv, columns between blanks).

Lightning's metrics.csv, Keras' CSVLogger, Ultralytics' results.csv, timm's summary.csv, flair's loss.tsv, spaCy's and
fastai's console. Columns are found by their names. Where a tool tells only the parts of a loss that it adds up itself
(Ultralytics' train/box_loss and so on, spaCy's LOSS TOK2VEC), the parts are added, else the plainest loss is taken.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.diagnosis.log_lines import LARGEST_PLACE, Reading
from eval.diagnosis.names import Name, name_of

DELIMITERS = (b"\t", b",", b";", b"|")
RULER = re.compile(rb"^[\s|+:=-]*-{2}[\s|+:=-]*$")
BLANKS = re.compile(rb"\s{2,}")
VALUE = re.compile(rb"^\s*[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|nan|inf(?:inity)?)\s*$", re.IGNORECASE)
SUMMED = re.compile(r"^(train/|val/|LOSS )[\w.]+(?<!/loss)$")
SIDES = {"train/": "loss", "LOSS ": "loss", "val/": "eval_loss"}
SENTENCE = re.compile(r"[=:!?]|(?:^|\s)[-+]?\d")
ROLES = ("loss", "eval_loss", "retention_loss", "step", "epoch", "lr")
MOST = 1000  # columns


@dataclass(frozen=True)
class Table:
    """The columns of a table that are about something: by role one column, or several that are added."""

    delimiter: bytes
    header: bytes
    width: int
    columns: dict[str, tuple[int, ...]]
    data: str
    summed_up_to_now: bool  # the first row is of a part of the interval that all others have

    def cells(self, line: bytes) -> list[bytes]:
        """The cells of a line."""
        return split_cells(line, self.delimiter)

    def reading(self, line: bytes) -> Reading | None:
        """What a row says, None for a row without anything of ours. Raises ValueError for what is no row."""
        cells = self.cells(line)
        if len(cells) != self.width:
            raise ValueError(f"{len(cells)} cells")
        told: dict[str, Any] = {}
        for role, places in self.columns.items():
            texts = [cells[place].strip() for place in places]
            if all(VALUE.match(text) for text in texts):
                value = sum(map(float, texts))
                if role not in ("step", "epoch") or abs(value) < LARGEST_PLACE:
                    told[role] = value
        if not told:
            raise ValueError("no number in any column of ours")
        if self.summed_up_to_now and not told.get("step"):
            return None
        return Reading(data=self.data if "eval_loss" in told else "", **told)


def split_cells(line: bytes, delimiter: bytes) -> list[bytes]:
    """The cells of a line between delimiters; quoted ones of csv, and runs of blanks where there is no delimiter."""
    if not delimiter:
        return BLANKS.split(line.strip())
    if delimiter == b"|":
        line = line.strip().strip(b"|")
    elif b'"' in line:
        text = line.decode("utf-8", "surrogateescape")
        return [
            cell.encode("utf-8", "surrogateescape")
            for cell in next(csv.reader([text], delimiter=delimiter.decode()), [])
        ]
    return line.split(delimiter)


def table_of(line: bytes) -> Table | None:
    """The table that a line of column names begins, None for any other line."""
    if b"loss" not in line.lower() or len(line) > 1 << 16 or b"{" in line:
        return None
    for delimiter in (*DELIMITERS, b""):
        if delimiter and delimiter not in line:
            continue
        cells = split_cells(line, delimiter)
        if 1 < len(cells) <= MOST and not any(VALUE.match(cell) for cell in cells):
            names = [cell.strip().strip(b"\xef\xbb\xbf\"'").decode("utf-8", "replace") for cell in cells]
            table = columns_of(names, delimiter, line)
            if table:
                return table
    return None


def columns_of(names: Sequence[str], delimiter: bytes, header: bytes) -> Table | None:
    """The table of these column names, None where they are a sentence rather than names, or tell no loss."""
    spacy = names[:2] == ["E", "#"]
    abouts = [(name_of(name.rsplit(" - ", 1)[-1]) if len(name) <= 100 else None) or Name("") for name in names]
    if spacy:
        abouts[:2] = [Name("epoch"), Name("step")]
    if any(len(name.split()) > 4 or SENTENCE.search(name) for name in names):
        return None
    columns: dict[str, tuple[int, ...]] = {}
    for role in ROLES:
        own = [i for i, about in enumerate(abouts) if about.role == role and not names[i].endswith(("__MIN", "__MAX"))]
        whole = [i for i in own if abouts[i].data in ("", "valid", "test")]
        parts = [i for i, name in enumerate(names) if (m := SUMMED.match(name)) and role == SIDES[m[1]]]
        if parts and not whole:
            columns[role] = tuple(parts)
        elif own:
            columns[role] = (min(own, key=lambda i: (abouts[i].order, "test" in abouts[i].data, i)),)
    losses = columns.keys() & {"loss", "eval_loss", "retention_loss"}
    if not losses or not (delimiter or columns.keys() & {"step", "epoch"}):
        return None
    data = abouts[columns["eval_loss"][0]].data if "eval_loss" in columns else ""
    return Table(delimiter, header.strip(), len(names), columns, data.split(" ")[0], spacy)


def is_frame(table: Table, line: bytes) -> bool:
    """Whether a line belongs to a table without being a row: a blank one, a ruler, the header again."""
    stripped = line.strip()
    return not stripped or bool(RULER.match(stripped)) or stripped == table.header
