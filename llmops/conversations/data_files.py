"""Files of conversations: which there are, their rows with their places, what each holds, all problems at once.

One file, several (commas between them), a glob, or a folder that `datasets.save_to_disk` wrote. JSON lines, JSON
arrays, csv and tsv are read by the standard library, so they can be checked before any package is installed; arrow
files and saved datasets by the `datasets` package, parquet by the pyarrow that it brings.
"""

import csv
import glob
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from llmops import files, json_text
from llmops.console import UserError, log, progress
from llmops.conversations import shapes
from llmops.conversations.records import BadRow, Conversation, Problem, problems_error
from llmops.keyboard import instead
from llmops.loading import loading

CURE = "put it there or name another file"
TABLE_CURE = "write it again, or export JSON lines"
DATASET_MARK = "dataset_info.json"  # in a folder of datasets.save_to_disk
TABLES = {".parquet": "parquet", ".arrow": "arrow"}
SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
CHUNK = 500  # rows that are read, and handed to another process, at once


class Chunk(NamedTuple):
    """Some rows of a file as they were read: raw lines with their numbers, (number, value, problem), or a table.

    A table is the bytes of an Arrow stream: pickled for another process, a slice would bring the whole it is of.
    """

    path: Path
    kind: str
    rows: Any
    first: int = 0  # the number of a table's first row


class Read(NamedTuple):
    """A row as a conversation of a shape."""

    path: Path
    number: int
    conversation: Conversation
    shape: str


@dataclass(frozen=True)
class Found:
    """What a check of files found: usable conversations by shape, how many rows were bad."""

    shapes: Counter[str]
    bad: int

    @property
    def good(self) -> int:
        """Usable conversations."""
        return self.shapes.total()

    def words(self) -> str:
        """For people, such as `ShareGPT, 12,400 conversations`."""
        if len(self.shapes) == 1:
            return f"{next(iter(self.shapes))}, {self.good:,} conversations"
        each = ", ".join(f"{name} {count:,}" for name, count in self.shapes.most_common())
        return f"{self.good:,} conversations ({each})"


def list_files(text: str) -> list[Path]:
    """The files that a setting names: one path, several with commas between them, globs; in order, each once.

    Raises UserError for a pattern that nothing matches. Whether the files are there is not looked at.
    """
    if os.path.lexists(text) or not any(mark in text for mark in ",*?["):
        return [Path(text)]
    paths: list[Path] = []
    for part in (part.strip() for part in text.split(",")):
        if not part:
            continue
        if os.path.lexists(part) or not glob.has_magic(part):
            paths.append(Path(part))
            continue
        matches = sorted(glob.glob(part, recursive=True))
        if not matches:
            raise UserError(f"no file matches {part}; {CURE}")
        paths += map(Path, matches)
    if not paths:
        raise UserError(f"{text!r} names no file; {CURE}")
    return list(dict.fromkeys(paths))


def tests_beside(paths: Sequence[Path]) -> list[Path]:
    """test.jsonl beside the first training file, where it is there and no training file itself."""
    beside = paths[0].with_name("test.jsonl")
    return [beside] if files.is_file(beside) and beside not in paths else []


def name_of(paths: Sequence[Path]) -> str:
    """What messages call these files."""
    return paths[0].name + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def path_of(paths: Sequence[Path]) -> str:
    """What errors call these files: a single one by its whole path."""
    return str(paths[0]) if len(paths) == 1 else name_of(paths)


def kind_of(path: Path) -> str:
    """`lines`, `array`, `csv`, `parquet`, `arrow` or `folder`, by the name; a JSON file's by how it begins.

    Raises UserError for a file that begins as no text does.
    """
    if files.is_folder(path):
        return "folder"
    suffix = path.suffix.lower()
    if suffix in TABLES:
        return TABLES[suffix]
    if suffix in SEPARATORS:
        return "csv"
    with files.open_regular(path, "the data", CURE) as stream:
        start = stream.read(4096)
    if files.is_no_text(start):
        raise UserError(f"{path}: {files.not_utf8(start)}")
    return "array" if start.removeprefix(files.BOM).lstrip().startswith(b"[") else "lines"


def unit_of(path: Path) -> str:
    """What places in a file are called."""
    return "row" if path.suffix.lower() in TABLES or files.is_folder(path) else "line"


def needs_packages(path: Path) -> bool:
    """Whether a file is read by packages that may not be installed yet."""
    return kind_of(path) in ("parquet", "arrow", "folder")


def problems_of(text: str, what: str, cure: str) -> list[str]:
    """Why the files that a setting names cannot be read, one sentence each."""
    try:
        paths = list_files(text)
    except UserError as error:
        return [str(error)]
    problems = []
    for path in paths:
        try:
            if files.is_folder(path):
                check_folder(path, what)
            else:
                files.open_regular(path, what, cure + instead(str(path))).close()
        except UserError as error:
            problems.append(str(error))
    return problems


def check_folder(path: Path, what: str) -> None:
    """Raise UserError for a folder that `datasets.save_to_disk` did not write."""
    if files.is_file(path / DATASET_MARK):
        return
    if files.is_file(path / "dataset_dict.json"):
        raise UserError(f"{what} {path} is a folder with several splits; name one of them, such as {path / 'train'}")
    raise UserError(f"{what} {path} is a folder, expected a file, or a folder that datasets.save_to_disk wrote")


# --- rows


def read_chunks(paths: Sequence[Path], size: int = CHUNK) -> Iterator[Chunk]:
    """Every file in order, `size` rows at a time, which `rows_of` makes values of, here or in another process."""
    for path in paths:
        kind = kind_of(path)
        if kind in ("parquet", "arrow", "folder"):
            yield from table_chunks(path, kind, size)
            continue
        rows: Iterator[Any]
        if kind == "lines":
            rows = files.raw_lines(path, "the data", CURE)
        elif kind == "array":
            rows = array_elements(path, files.read_text(path, "the data", CURE, files.DATA_LIMIT))
        else:
            rows = csv_rows(path)
        while found := list(islice(rows, size)):
            yield Chunk(path, kind, found)


def rows_of(chunk: Chunk) -> Iterator[tuple[int, Any, str | None]]:
    """(number, value, what is wrong with it) of every row of a chunk; blank lines are passed over."""
    if chunk.kind == "lines":
        return ((number, *files.parse_line(raw)) for number, raw in chunk.rows if raw.strip())
    if isinstance(chunk.rows, list):
        return iter(chunk.rows)
    import pyarrow

    with loading(described(chunk.path, chunk.kind), TABLE_CURE), pyarrow.ipc.open_stream(chunk.rows) as stream:
        values = stream.read_all().to_pylist()
    return ((number, without_nulls(value), None) for number, value in enumerate(values, chunk.first))


def array_elements(path: Path, text: str) -> Iterator[tuple[int, Any, str | None]]:
    """Elements of one JSON array; an element's line is where it begins."""
    try:
        for line, value in json_text.json_elements(text):
            yield line, value, None
    except json_text.BadJson as error:
        raise UserError(f"{path}:{error.line}: {error.problem}") from error


def csv_rows(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """Rows of a csv or tsv with a header, as dicts; a row's line is its first one. Read as it is asked for."""
    separator = SEPARATORS.get(path.suffix.lower(), ",")
    csv.field_size_limit(files.LINE_LIMIT)
    reader = csv.DictReader(text_lines(path), delimiter=separator, strict=True)
    try:
        for row in reader:
            values = [value for value in row.values() if isinstance(value, str)]
            problem = None
            if None in row or None in row.values():
                found = "more" if None in row else "fewer"
                problem = f"found {found} columns than the header's {len(row) - (None in row)}"
            yield reader.line_num - sum(value.count("\n") for value in values), row, problem
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not csv ({error}); check the quotes of this row") from error


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends. Raises UserError for another encoding or a huge line."""
    for number, raw in files.raw_lines(path, "the data", CURE):
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: {files.not_utf8(raw)}") from error


def table_chunks(path: Path, kind: str, size: int) -> Iterator[Chunk]:
    """A parquet or arrow file or a saved dataset, some rows at a time; nothing is copied to a cache."""
    number = 1
    with (
        loading(described(path, kind), TABLE_CURE),
        closing(parquet_tables(path, size) if kind == "parquet" else dataset_tables(path, kind, size)) as tables,
    ):
        for table in tables:
            yield Chunk(path, kind, stream_of(table), number)
            number += len(table)


def described(path: Path, kind: str) -> str:
    """What messages call a file that is a table."""
    return f"the saved dataset {path}" if kind == "folder" else f"the {kind} file {path}"


def parquet_tables(path: Path, size: int) -> Generator[Any, None, None]:
    """A parquet file by pyarrow in this thread: the threads of the `datasets` package's scanner may never end when a
    file is not read to its end."""
    import pyarrow
    from pyarrow import parquet

    with files.open_regular(path, "the data", CURE) as stream:
        for batch in parquet.ParquetFile(stream).iter_batches(size, use_threads=False):
            yield pyarrow.Table.from_batches([batch])


def dataset_tables(path: Path, kind: str, size: int) -> Generator[Any, None, None]:
    """An arrow file or a saved dataset by the `datasets` package."""
    import datasets

    # the package makes its cache folder even where it puts nothing there, and HF_HOME may not be writable
    with tempfile.TemporaryDirectory(prefix="llmops-datasets.") as scratch:
        found: Any
        if kind == "folder":
            for one in sorted([*path.glob("*.arrow"), *path.glob("*.json")]):
                files.open_regular(one, "the data", CURE).close()  # a pipe would never end
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(
                kind, data_files=glob.escape(str(path)), split="train", streaming=True, cache_dir=scratch
            )
        yield from found.with_format("arrow").iter(batch_size=size)


def stream_of(table: Any) -> bytes:
    """A table's rows as an Arrow stream."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def without_nulls(value: Any) -> Any:
    """A value of a table without the nulls that stand for keys that a row does not have."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def digest(paths: Sequence[Path]) -> str:
    """A hash of the content of these files and folders; of a single file the SHA-256 that other tools tell."""
    digests = [file_digest(path) for path in paths for path in content_of(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def content_of(path: Path) -> list[Path]:
    """A file, or the files of a saved dataset."""
    return sorted(one for one in path.iterdir() if files.is_file(one)) if files.is_folder(path) else [path]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with files.open_regular(path, "the data", CURE) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- conversations


def read_conversations(paths: Path | Sequence[Path]) -> Iterator[Read | Problem]:
    """Every row of these files as a conversation or a problem."""
    for chunk in read_chunks([paths] if isinstance(paths, Path) else paths):
        yield from conversations_of(chunk)


def conversations_of(chunk: Chunk) -> Iterator[Read | Problem]:
    """Every row of a chunk as a conversation, or what is wrong with it."""
    unit = unit_of(chunk.path)
    for number, value, problem in rows_of(chunk):
        text = problem
        if text is None:
            try:
                conversation, shape = shapes.convert(value)
            except BadRow as error:
                text = str(error)
            else:
                yield Read(chunk.path, number, conversation, shape)
                continue
        yield Problem(chunk.path, number, text, unit)


def validate_files(paths: Sequence[Path], skip_bad_lines: bool = False) -> Found:
    """Check every row and count the shapes.

    Raises UserError that names all bad rows (unless they are to be skipped) or files without a usable one.
    """
    counts: Counter[str] = Counter()
    problems: list[Problem] = []
    for read in progress(read_conversations(paths), f"checking {name_of(paths)}"):
        if isinstance(read, Problem):
            problems.append(read)
        else:
            counts[read.shape] += 1
    return judge(paths, Found(counts, len(problems)), problems, skip_bad_lines)


def judge(paths: Sequence[Path], found: Found, problems: Sequence[Problem], skip_bad_lines: bool) -> Found:
    """What was found, or the UserError for it."""
    where = path_of(paths)
    if problems and not skip_bad_lines:
        raise problems_error(where, problems, found.good + found.bad)
    if not found.good:
        raise UserError(
            f"{where} has no usable line; expected one JSON object with 'messages' per line, or another shape of "
            f"conversations ({found.bad} lines were bad)"
        )
    return found


def check_files(paths: Sequence[Path], skip_bad_lines: bool) -> None:
    """Check what can be read without packages and say what was found; say what is checked later."""
    later = [path for path in paths if needs_packages(path)]
    now = [path for path in paths if path not in later]
    if now:
        log(f"{name_of(now)}: {validate_files(now, skip_bad_lines).words()}")
    for kind, found in groupby(later, key=lambda path: TABLES.get(path.suffix.lower(), "a saved dataset")):
        log(f"{name_of(list(found))}: {kind}, checked once the packages are there, before the model is loaded")
