"""From the bytes of a training log to loss curves, in bounded memory and in one pass."""

import codecs
import re
from itertools import groupby

from eval.diagnosis.log_lines import Shape, parse_line, reading_of, shape_of
from eval.diagnosis.shapes import shaped
from eval.diagnosis.tables import Table, is_frame, table_of
from eval.diagnosis.training_run import TrainingRun

BLOCK = 1 << 20
LONG = 1 << 16  # a line that is not over after so many bytes may be one of many records
SPLIT_RECORD = re.compile(rb"\{[ \t]*\n")  # JSON that is written over several lines
RECORD = re.compile(rb"\{[^{}]*\}")
COLORS = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
BAR = b"%|"
LOSS_WORDS = (b"oss", b"OSS", "损失".encode(), "损失".encode("gbk"))
HEAD = 4096
# what is said of a log without a loss: marks in its first bytes or in any line, and what it is then
SIGNS = {
    b"log_history": "trainer_state", b"skipped=": "deepspeed", b"RunningAvgSamplesPerSec": "deepspeed",
}  # fmt: skip


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
        self._table: Table | None = None
        self.tables = 0
        self.signs: set[str] = set()  # what kinds of lines were seen, and how the log begins: for the sentence of
        self.head = b""  # a log without a loss

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
        if len(self.head) < HEAD:
            self.head += tidy(data[:HEAD])

    def finish(self) -> None:
        """The log ends here: read its last line, but no value that may have been cut at the very end."""
        rest, self._rest = self._rest, b""
        if rest.strip():
            whole = re.sub(rb"[-+.\w]+$", b"", rest) if not self._table else rest
            self._read_block(join_records(tidy(whole)))
        self.run = self.run.settled()

    def _take(self, data: bytes) -> None:
        data = tidy(data)
        end = data.rfind(b"\n") + 1
        if SPLIT_RECORD.search(data) or (end == 0 and len(data) > LONG):
            closed = data.rfind(b"}") + 1
            opened = data.rfind(b"{")
            if opened >= closed:  # a record that goes on
                end = min(end, opened) if end else opened
            elif opened < end < closed or not end:
                end = closed  # a record whose line is not over, or one long line of many records
        if len(data) - end > BLOCK:
            end = len(data)  # no log has such lines; what is in it is read as it stands
        self._rest = data[end:]
        if end:
            self._read_block(join_records(data[:end]))

    def _read_block(self, block: bytes) -> None:
        """Read whole lines: most of them by the one expression that fits most, in columns; the others one by one."""
        count = block.count(b"\n")
        self.lines += count
        if not self.run.readings:
            self.signs.update(kind for sign, kind in SIGNS.items() if sign in block)
        if block.count(b"{") > 2 * count:
            block = parted(block)
        if BAR in block:  # progress bars without a loss say nothing
            block = without_bars(block)
        if self._table:
            block = self._read_table(self._table, block)
        if self._shape is None:
            self._shape = learn_shape(block)
        if self._shape is None:
            for line in block.split(b"\n"):
                self._read_line(line)
            return
        self._read_shape(self._shape, block)

    def _read_shape(self, shape: Shape, block: bytes) -> None:
        """Read lines of which most have one shape."""
        rows = shape.expression.findall(block)
        if "rank" in shape.roles:
            rows = self._of_one_rank(rows, shape.roles.index("rank"))
        others = [i for i, other in enumerate([row[-1] for row in rows]) if other]
        start = 0
        for i in [*others, len(rows)]:
            if start < i:
                self._add_rows(shape, rows[start:i])
            if i < len(rows):
                self._read_line(rows[i][-1])
            start = i + 1
        if len(others) > len(rows) // 2:
            self._shape = None  # learn another one with the next block

    def _add_rows(self, shape: Shape, rows: list[tuple[bytes, ...]]) -> None:
        """Take in rows of a shape: in columns where they are in order, else those that repeat the one before once."""
        if self.run.add_columns(shape.roles, list(zip(*rows, strict=True)), shape.data):
            return
        once = [row for row, _ in groupby(rows)]
        if len(once) < len(rows) and self.run.add_columns(shape.roles, list(zip(*once, strict=True)), shape.data):
            self.run.repeated += len(rows) - len(once)
            return
        for row in rows:
            self.run.add(reading_of(dict(zip(shape.roles, row, strict=False)), data=shape.data))

    def _of_one_rank(self, rows: list[tuple[bytes, ...]], column: int) -> list[tuple[bytes, ...]]:
        """The rows of the process that spoke first, and those of other shapes."""
        first = next((int(row[column]) for row in rows if row[column].isdigit() and len(row[column]) < 10), None)
        own = b"%d" % (self.run.choose_rank(first) or 0)
        kept = [row for row in rows if row[-1] or row[column] == own]
        self.run.repeated += len(rows) - len(kept)
        return kept

    def _read_table(self, table: Table, block: bytes) -> bytes:
        """Read the rows of a table in columns, as long as they have all its cells; what is left of the block."""
        if not table.delimiter or b'"' in block:
            return block
        lines = [line for line in block.split(b"\n") if line]
        rows = [line.strip(b"|").split(table.delimiter) for line in lines]
        whole = len(rows)
        if set(map(len, rows)) != {table.width}:
            whole = next(i for i, row in enumerate(rows) if len(row) != table.width) if rows else 0
        roles = [role for role, places in table.columns.items() if len(places) == 1]
        if len(roles) < len(table.columns) or not whole:
            return block
        cells = list(zip(*rows[:whole], strict=True))
        columns = [cells[table.columns[role][0]] for role in roles]
        start = 0
        for filled, group in groupby(zip(*(map(bool, column) for column in columns), strict=True)):
            stop = start + sum(1 for _ in group)
            own = [(role, column) for role, column, there in zip(roles, columns, filled, strict=True) if there]
            told = [role for role, _ in own if role.endswith("loss")]
            texts = [column[start:stop] for _, column in own]
            data = table.data if "eval_loss" in told else ""
            if not told or not self.run.add_columns([role for role, _ in own], texts, data):
                for line in lines[start:stop]:
                    self._read_line(line)
            start = stop
        return b"\n".join(lines[whole:])

    def _read_line(self, line: bytes) -> None:
        """Read one line by itself: a row of a table, a line of a known shape, or names and values."""
        if b"}, {" in line or b"},{" in line:
            for part in parted(line).split(b"\n"):
                self._read_line(part)
            return
        if self._table:
            if is_frame(self._table, line):
                return
            try:
                reading = self._table.reading(line)
            except ValueError:
                self._table = None
            else:
                if reading:
                    self.run.add(reading)
                return
        known, reading = shaped(line)
        if not known:
            reading = parse_line(line)
            if (reading is None or reading.section) and (table := table_of(line)):
                self._table, self.tables, reading = table, self.tables + 1, None
        if reading:
            self.run.add(reading)


def without_bars(block: bytes) -> bytes:
    """The lines of a block without blank ones and progress bars in which no word for a loss stands."""
    words = [word for word in LOSS_WORDS if word in block]  # one, as a rule: looked for in millions of lines
    first, *more = words or [b"\n"]
    lines = [
        x
        for x in block.split(b"\n")
        if x and (BAR not in x or first in x or (more and any(word in x for word in more))) and not x.isspace()
    ]
    return b"\n".join([*lines, b""])


def parted(text: bytes) -> bytes:
    """Records that stand on one line on a line each."""
    return text.replace(b"}, {", b"},\n{").replace(b"},{", b"},\n{").replace(b"[{", b"[\n{")


def learn_shape(block: bytes) -> Shape | None:
    """The shape of some line in the first part of a block that at least half of that part's lines have."""
    part = block[: 1 << 14]
    lines = [line for line in part.split(b"\n")[:-1] if line.strip()]
    for line in lines[1:12]:
        shape = None if shaped(line)[0] else shape_of(line)
        if shape and 2 * sum(1 for row in shape.expression.findall(part) if not row[-1]) > len(lines):
            return shape
    return None


def tidy(data: bytes) -> bytes:
    """Line ends as newlines, no colours of a terminal, no zeros (the hole in a log that was emptied while open)."""
    if b"\x00" in data:
        data = data.replace(b"\x00", b"")
    if b"\r" in data:
        data = data.replace(b"\r", b"\n")  # blank lines between lines that end with both say nothing
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
