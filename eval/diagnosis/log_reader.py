"""From the bytes of a training log to loss curves, in bounded memory and in one pass."""

import codecs
import re
from collections.abc import Sequence
from itertools import groupby

from eval.diagnosis.log_lines import LARGEST_PLACE, PLACES, Reading, Shape, parse_line, shape_of
from eval.diagnosis.training_run import TrainingRun

BLOCK = 1 << 20
SPLIT_RECORD = re.compile(rb"\{[ \t]*\n")  # JSON that is written over several lines
RECORD = re.compile(rb"\{[^{}]*\}")
PARTED = re.compile(rb"(?<=\}),\s*(?=\{)|(?<=\[)(?=\{)")  # several records on a line
COLORS = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


class LogReader:
    """Takes the bytes of a log in pieces of any size; `run` is what they tell so far."""

    def __init__(self) -> None:
        self.run = TrainingRun()
        self.lines = 0
        self._rest = b""
        self._decoder: codecs.IncrementalDecoder | None = None
        self._started = False
        self._head = b""
        self._shape: Shape | None = None

    def feed(self, data: bytes) -> None:
        """Take in more bytes; an unfinished line waits for its end."""
        if not self._started:
            data = self._head = self._head + data
            if len(data) < 4:
                return  # too little to see the encoding
            self._started = True
            encoding = wide_encoding(data)
            self._decoder = codecs.getincrementaldecoder(encoding)("replace") if encoding else None
            self._head = b""
        if self._decoder:
            data = self._decoder.decode(data).encode("utf-8", "replace")
        for start in range(0, len(data), BLOCK):
            self._take(self._rest + data[start : start + BLOCK])

    def finish(self) -> None:
        """The log ends here: read its last line, but no value that may have been cut at the very end."""
        rest, self._rest = self._rest, b""
        if rest.strip():
            whole = re.sub(rb"[-+.\w]+$", b"", rest)
            self._read_block(join_records(tidy(whole)))

    def _take(self, data: bytes) -> None:
        data = tidy(data)
        end = data.rfind(b"\n") + 1
        if SPLIT_RECORD.search(data) or end == 0:
            closed = data.rfind(b"}") + 1
            opened = data.rfind(b"{")
            if opened >= closed:  # a record that goes on
                end = min(end, opened) if end else opened
            elif not end:
                end = closed  # one long line of many records
        if len(data) - end > BLOCK:
            end = len(data)  # no log has such lines; what is in it is read as it stands
        self._rest = data[end:]
        if end:
            self._read_block(join_records(data[:end]))

    def _read_block(self, block: bytes) -> None:
        """Read whole lines: most of them by the one expression that fits most, in columns; the others one by one."""
        self.lines += block.count(b"\n")
        if self._shape is None:
            self._shape = learn_shape(block)
        if self._shape is None:
            for line in block.split(b"\n"):
                self._read_line(line)
            return
        roles = self._shape.roles
        rows = [row for row, _ in groupby(self._shape.expression.findall(block))]
        if "rank" in roles:
            rows = self._of_one_rank(rows, roles.index("rank"))
        others = [i for i, row in enumerate(rows) if row[-1]]
        start = 0
        for i in [*others, len(rows)]:
            if start < i and not self.run.add_columns(roles, rows[start:i]):
                for row in rows[start:i]:
                    self.run.add(reading_of(roles, row))
            if i < len(rows):
                self._read_line(rows[i][-1])
            start = i + 1
        if len(others) > len(rows) // 2:
            self._shape = None  # learn another one with the next block

    def _of_one_rank(self, rows: list[tuple[bytes, ...]], column: int) -> list[tuple[bytes, ...]]:
        """The rows of the process that spoke first, and those of other shapes."""
        first = next((int(row[column]) for row in rows if row[column].isdigit()), None)
        own = b"%d" % (self.run.choose_rank(first) or 0)
        kept = [row for row in rows if row[-1] or row[column] == own]
        self.run.repeated += len(rows) - len(kept)
        return kept

    def _read_line(self, line: bytes) -> None:
        for part in PARTED.split(line) if b"}," in line else (line,):
            reading = parse_line(part)
            if reading:
                self.run.add(reading)


def reading_of(roles: Sequence[str], row: Sequence[bytes]) -> Reading:
    """The reading of a row of a shape's groups; what is no number (null, None) is not told."""
    told = {}
    for role, text in zip(roles, row, strict=False):
        try:
            value = float(text)
        except ValueError:
            continue
        if role not in PLACES or abs(value) < LARGEST_PLACE:
            told[role] = value
    return Reading(**told)


def learn_shape(block: bytes) -> Shape | None:
    """The shape of some line in the first part of a block that at least half of that part's lines have."""
    part = block[: 1 << 14]
    lines = [line for line in part.split(b"\n")[:-1] if line.strip()]
    for line in lines[1:12]:
        shape = shape_of(line)
        if shape and 2 * sum(1 for row in shape.expression.findall(part) if not row[-1]) > len(lines):
            return shape
    return None


def tidy(data: bytes) -> bytes:
    """Line ends as newlines, no colours of a terminal, no zeros (the hole in a log that was emptied while open)."""
    if b"\x00" in data:
        data = data.replace(b"\x00", b"")
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return COLORS.sub(b"", data) if b"\x1b" in data else data


def join_records(block: bytes) -> bytes:
    """Records that are written over several lines on one line each."""
    return RECORD.sub(lambda match: match[0].replace(b"\n", b" "), block) if SPLIT_RECORD.search(block) else block


def wide_encoding(data: bytes) -> str | None:
    """The encoding of a log whose characters take two or four bytes; None for UTF-8, GBK and the like."""
    marks = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
             (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
    for mark, name in marks:
        if data.startswith(mark):
            return name
    head = data[:2000]
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) < max(1, len(head) // 4) or min(even, odd) > len(head) // 20:  # all zero: a hole in the file
        return None
    return "utf-16-le" if odd > even else "utf-16-be"
