"""A seeded mutator: one way of harming a file each, by name, so that what was accepted can be counted by kind.

Random bytes, broken JSON and values of the wrong type, hostile texts, forged binary headers, and what is no file.
"""

import io
import json
import os
import pickle
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

MARK = "RAN_FROM_A_PICKLE"  # a file of this name means that code in a data file was run
Bytes = Callable[[bytes, Random], bytes]
Place = Callable[[Path, Random], None]


class Mutation(NamedTuple):
    """What was done to a file, in words that name the kind and the details."""

    kind: str
    details: str


# --- bytes of any file


def flip_bits(raw: bytes, rng: Random) -> bytes:
    """One to eight bits."""
    data = bytearray(raw or b"\0")
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut_end(raw: bytes, rng: Random) -> bytes:
    """The first part."""
    return raw[: rng.randrange(max(1, len(raw)))]


def cut_middle(raw: bytes, rng: Random) -> bytes:
    """Without a span."""
    start = rng.randrange(max(1, len(raw)))
    return raw[:start] + raw[start + rng.randint(1, max(1, len(raw) // 4)) :]


def repeat_part(raw: bytes, rng: Random) -> bytes:
    """A span twice."""
    start = rng.randrange(max(1, len(raw)))
    span = raw[start : start + rng.randint(1, max(1, len(raw) // 2))]
    return raw[: start + len(span)] + span + raw[start + len(span) :]


def inserted(*pieces: bytes) -> Bytes:
    """One of the pieces at a random place."""

    def mutate(raw: bytes, rng: Random) -> bytes:
        place = rng.randrange(len(raw) + 1)
        return raw[:place] + rng.choice(pieces) + raw[place:]

    return mutate


def in_text(*pieces: str) -> Bytes:
    """One of the pieces inside a string of JSON, or anywhere in what has none."""

    def mutate(raw: bytes, rng: Random) -> bytes:
        places = [i + 1 for i, byte in enumerate(raw[:100_000]) if byte == 0x22] or [rng.randrange(len(raw) + 1)]
        place = rng.choice(places)
        return raw[:place] + rng.choice(pieces).encode("utf-8", "surrogatepass") + raw[place:]

    return mutate


def recoded(encoding: str) -> Bytes:
    """The text in another encoding."""
    return lambda raw, rng: raw.decode("utf-8", "replace").encode(encoding, "replace")


BYTES: dict[str, Bytes] = {
    "bit flips": flip_bits,
    "cut end": cut_end,
    "cut middle": cut_middle,
    "repeated part": repeat_part,
    "empty": lambda raw, rng: b"",
    "blank": lambda raw, rng: b" \n\t\n",
    "random bytes": lambda raw, rng: rng.randbytes(rng.choice((1, 40, 5000))),
    "NUL bytes": inserted(b"\0", b"\0" * 600),
    "invalid UTF-8": inserted(b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xb8"),
}
TEXTS: dict[str, Bytes] = {
    "UTF-16": recoded("utf-16"),
    "GBK": recoded("gb18030"),
    "byte order mark": lambda raw, rng: b"\xef\xbb\xbf" * rng.choice((1, 2)) + raw,
    "CRLF": lambda raw, rng: raw.replace(b"\n", rng.choice((b"\r\n", b"\r"))),
    "odd line breaks": in_text("\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\u2028x"),
    "control characters": in_text("\x00", "\x1b[31m", "\x7f", "\u202e", "\u200b"),
    "very long text": in_text("长" * 400_000, "a" * 2_000_000),
    "half a pair": in_text("\\ud800", "\\udc00x", "\\ud83d\\u0041"),
    "raw half a pair": in_text("\ud800"),
    "markup": in_text("<script>alert(1)</script>", "$(touch x)", "../../x", "{0.__class__}", "{{ 7 * 7 }}", "%s%n"),
}

# --- JSON values

HUGE = "9" * 5000
RAW_VALUES = {
    "huge integer": HUGE, "1e999": "1e999", "NaN": "NaN", "infinity": "-Infinity",
    "deep lists": "[" * 200 + "]" * 200, "very deep lists": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 200 + "1" + "}" * 200, "half a pair": '"\\ud800"', "NUL text": '"a\\u0000b"',
    "a text of 2 MB": json.dumps("x" * 2_000_000), "2**63": str(2**63), "10**20": str(10**20), "tiny": "1e-320",
}  # fmt: skip
VALUES: dict[str, Any] = {
    "null": None, "[]": [], "{}": {}, "0": 0, "-1": -1, "1.5": 1.5, "7": 7, "true": True, "false": False,
    "''": "", "a text": "text", "a number as text": "12", "[null]": [None], "a list of texts": ["a", "b"],
    "an object": {"a": 1}, "-10**9": -(10**9), "10**9": 10**9, "a blank": " ", "a path": "../../../etc/passwd",
}  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a JSON value, itself first; of long lists the first few."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def choose_place(value: Any, rng: Random) -> tuple[Any, ...]:
    """A random path, the shallow ones more often: a file's own keys matter most."""
    found = list(places(value))
    depth = rng.choice(sorted({len(path) for path in found})[:5])
    return rng.choice([path for path in found if len(path) == depth])


def replace_at(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The value with another one at a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replace_at(copy[path[0]], path[1:], new)
    return copy


def mutate_json(text: str, rng: Random) -> tuple[str, Mutation]:
    """A JSON text with one value, key or number that should not be there. Raises ValueError for no JSON."""
    value = json.loads(text)
    path = choose_place(value, rng)
    where = "/".join(map(str, path))[:60] or "the whole"
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    way = rng.choice(("value", "value", "value", "raw", "key", "unknown key", "twice", "same key"))
    if way == "key" and path:
        copy = dict(parent) if isinstance(parent, dict) else list(parent)
        del copy[path[-1]]
        return json.dumps(replace_at(value, path[:-1], copy)), Mutation("missing key", where)
    if way == "unknown key" and isinstance(parent, dict):
        new = parent | {rng.choice(("surprise", "", "__class__", "\x00", "a" * 5000)): rng.choice([*VALUES.values()])}
        return json.dumps(replace_at(value, path[:-1], new)), Mutation("unknown key", where)
    if way == "twice" and isinstance(parent, list) and path:
        return json.dumps(replace_at(value, path[:-1], [*parent, parent[path[-1]]])), Mutation("value twice", where)
    if way == "raw":
        name = rng.choice(list(RAW_VALUES))
        mark = "f9c1e0-place-of-the-raw-value"
        shown = json.dumps(replace_at(value, path, mark))
        return shown.replace(json.dumps(mark), RAW_VALUES[name]), Mutation(f"value: {name}", where)
    if way == "same key" and isinstance(parent, dict) and path:
        shown = json.dumps({"f9c1e0": None} | parent).replace('"f9c1e0": null', f"{json.dumps(path[-1])}: [1]")
        mark = "f9c1e0-place"
        whole = json.dumps(replace_at(value, path[:-1], mark)).replace(json.dumps(mark), shown)
        return whole, Mutation("key twice", where)
    name = rng.choice(list(VALUES))
    return json.dumps(replace_at(value, path, VALUES[name])), Mutation(f"value: {name}", where)


def mutate_json_line(text: str, rng: Random) -> tuple[str, Mutation]:
    """`mutate_json` for one line of JSON lines."""
    lines = text.split("\n")
    full = [i for i, line in enumerate(lines) if line.strip()]
    number = rng.choice(full)
    lines[number], mutation = mutate_json(lines[number], rng)
    return "\n".join(lines), Mutation(mutation.kind, f"line {number + 1}: {mutation.details}")


def mutate_words(text: str, rng: Random) -> tuple[str, Mutation]:
    """A word of a text or csv replaced."""
    words = text.split(" ")
    number = rng.randrange(len(words))
    name = rng.choice(list(RAW_VALUES) + list(VALUES))
    words[number] = RAW_VALUES[name] if name in RAW_VALUES else str(VALUES[name])
    return " ".join(words), Mutation(f"word: {name}", f"word {number}")


# --- binary formats


class Touch:
    """Unpickled, it makes a file: a stand-in for any command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)


def mutate_safetensors(raw: bytes, rng: Random) -> tuple[bytes, Mutation]:
    """The header's length, its JSON, or the numbers."""
    size = struct.unpack("<Q", raw[:8])[0]
    header, body = raw[8 : 8 + size], raw[8 + size :]
    way = rng.choice(("header", "header", "length", "body", "offsets", "shape", "dtype", "NaN"))
    if way == "length":
        length = rng.choice((0, 1, size - 1, size + 1, 2**40, 2**63))
        return struct.pack("<Q", length) + header + body, Mutation("header's length", str(length))
    if way == "body":
        return raw[:8] + header + cut_end(body, rng), Mutation("numbers cut", "")
    if way == "NaN":
        return raw[:8] + header + b"\xff" * len(body), Mutation("all NaN", "")
    if way == "header":
        text, mutation = mutate_json(header.decode(), rng)
        new = text.encode()
        return struct.pack("<Q", len(new)) + new + body, Mutation(f"header {mutation.kind}", mutation.details)
    table = json.loads(header)
    name = rng.choice([key for key in table if key != "__metadata__"])
    if way == "offsets":
        table[name]["data_offsets"] = rng.choice(([0, 0], [0, 10**12], [8, 4], [-4, 0]))
    elif way == "shape":
        table[name]["shape"] = rng.choice(([], [0], [1], [10**9, 10**9], table[name]["shape"][::-1]))
    else:
        table[name]["dtype"] = rng.choice(("F64", "I8", "BOOL", "F16", "F128"))
    new = json.dumps(table).encode()
    return struct.pack("<Q", len(new)) + new + body, Mutation(f"tensor's {way}", name)


def mutate_npy(raw: bytes, rng: Random) -> tuple[bytes, Mutation]:
    """An array of other numbers, shape or type, or one of pickled objects."""
    array = np.load(io.BytesIO(raw))
    floating = array if array.dtype.kind == "f" else array.astype(np.float32)
    columns = array if array.ndim > 1 else array.reshape(-1, 1)
    forged = {
        "NaN": np.full_like(floating, np.nan), "one NaN": np.where(np.arange(floating.size).reshape(floating.shape)
        == rng.randrange(floating.size), np.nan, floating), "infinity": np.full_like(floating, np.inf),
        "zeros": np.zeros_like(array), "zero width": columns[:, :0], "no rows": array[:0],
        "fewer columns": columns[:, :1], "one dimension": array.reshape(-1), "three dimensions": array[None],
        "texts": np.full(array.shape, "x"), "complex": floating.astype(np.complex64), "half": floating.astype("f2"),
        "times": np.zeros(array.shape, "M8[s]"), "scaled": floating * 1e30, "other order": np.asfortranarray(columns),
        "negative": -array.astype(np.int64), "a number": np.array(3), "rows swapped": array[::-1],
    }  # fmt: skip
    name = rng.choice([*forged, "pickled", "lying shape"])
    stream = io.BytesIO()
    if name == "pickled":
        np.save(stream, np.array([Touch()], dtype=object), allow_pickle=True)
    elif name == "lying shape":
        np.save(stream, array)
        shown = str(array.shape[0]).encode()
        return stream.getvalue().replace(b"(" + shown, b"(9" + shown, 1), Mutation("array: lying shape", "")
    else:
        np.save(stream, forged[name])
    return stream.getvalue(), Mutation(f"array: {name}", "")


def mutate_pickle(raw: bytes, rng: Random) -> tuple[bytes, Mutation]:
    """A pickle that runs a command, in the old and the zipped form, or one of something else."""
    way = rng.choice(("runs a command", "runs a command, zipped", "a list", "wrong tensors", "no tensors"))
    if way == "runs a command":
        return pickle.dumps({"a": Touch()}, protocol=2), Mutation(f"pickle: {way}", "")
    if way == "a list":
        return pickle.dumps([1, 2], protocol=2), Mutation(f"pickle: {way}", "")
    import torch

    stream = io.BytesIO()
    things = {
        "runs a command, zipped": {"a": Touch()}, "no tensors": {"model.embed_tokens.weight": 3},
        "wrong tensors": {"model.embed_tokens.weight": torch.zeros(2, 2)},
    }  # fmt: skip
    torch.save(things[way], stream)
    return stream.getvalue(), Mutation(f"pickle: {way}", "")


# --- what is no file


def clear(path: Path) -> None:
    """Nothing is there any more."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_link(target: str) -> Place:
    """A link to a target, which may be the link itself."""
    return lambda path, rng: path.symlink_to(path.name if target == "itself" else target)


def make_socket(path: Path, rng: Random) -> None:
    """A socket that nobody listens on."""
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{here}/{path.name}")  # the path itself may be too long for a socket
    os.close(here)


def make_sparse(path: Path, rng: Random) -> None:
    """300 MiB of zeros that take no space."""
    with open(path, "wb") as stream:
        stream.truncate(300 << 20)


def make_folder(path: Path, rng: Random) -> None:
    """A folder, sometimes with something in it."""
    path.mkdir()
    if rng.random() < 0.5:
        (path / "inside").write_text("x")


PLACES: dict[str, Place] = {
    "missing": lambda path, rng: None,
    "a folder": make_folder,
    "a pipe": lambda path, rng: os.mkfifo(path),
    "a loop of links": make_link("itself"),
    "a dangling link": make_link("nowhere"),
    "a socket": make_socket,
    "a link to /dev/zero": make_link("/dev/zero"),
    "a link to /dev/null": make_link("/dev/null"),
    "300 MiB of zeros": make_sparse,
}
if os.getuid() != 0:  # root reads everything
    PLACES["no permission"] = lambda path, rng: (path.write_text("{}"), path.chmod(0))[1]

# --- one mutation of one file

FORMS: dict[str, Callable[[Any, Random], tuple[Any, Mutation]]] = {
    "json": mutate_json, "jsonl": mutate_json_line, "text": mutate_words,
    "safetensors": mutate_safetensors, "npy": mutate_npy, "pickle": mutate_pickle,
}  # fmt: skip
TEXTUAL = ("json", "jsonl", "text")


def mutate_file(path: Path, form: str, rng: Random) -> Mutation:
    """Harm a file; half of the time by what its format means, so that the harm gets past the first check."""
    way = rng.choices(("form", "bytes", "texts", "place"), (55, 20, 15 if form in TEXTUAL else 0, 10))[0]
    raw = path.read_bytes()
    if way == "place":
        kind = rng.choice(list(PLACES))
        clear(path)
        PLACES[kind](path, rng)
        return Mutation(kind, "")
    if way == "form" and form in FORMS:
        if form in TEXTUAL:
            text, mutation = FORMS[form](raw.decode("utf-8"), rng)
            new = text.encode("utf-8", "surrogatepass")
        else:
            new, mutation = FORMS[form](raw, rng)
    else:
        kinds = TEXTS if way == "texts" else BYTES
        kind = rng.choice(list(kinds))
        new, mutation = kinds[kind](raw, rng), Mutation(kind, "")
    path.unlink()  # never through a second name into the original
    path.write_bytes(new)
    return mutation


# --- settings

HOSTILE = (
    "", " ", "nan", "inf", "-inf", "1e999", "-1", "-5", "0", "9" * 5000, "1.5", "0x10", "1_000", "١٢", "true", "TRUE",
    "maybe", "null", "[]", "{}", "a\nb", "a" * 300, "a" * 5000, "$(touch x)", "`touch x`", "; touch x", "../..",
    "nowhere/x", "/dev/full", "/dev/zero", "\udcff\udcfe", "中文", "*", "%s%n", "{}", "-", "--", "--x", "1e-320",
    "2147483648", "18446744073709551616", "100000000000", '"', "'",
)  # fmt: skip


def mutate_flags(argv: list[str], flags: list[str], rng: Random) -> tuple[list[str], Mutation]:
    """Another value for one of the flags, or a flag that is unknown, bare, twice or abbreviated."""
    flag, value = rng.choice(flags), rng.choice(HOSTILE)
    way = rng.choices(("value", "equals", "bare", "unknown", "extra"), (60, 20, 6, 7, 7))[0]
    others = [a for i, a in enumerate(argv) if a != flag and (i == 0 or argv[i - 1] != flag)]
    if way == "value":
        return [*others, flag, value], Mutation("flag's value", f"{flag} {value[:40]!r}")
    if way == "equals":
        return [*others, f"{flag}={value}"], Mutation("flag's value", f"{flag}={value[:40]!r}")
    if way == "bare":
        return [*others, flag], Mutation("flag without a value", flag)
    if way == "unknown":
        name = rng.choice((f"{flag}x", "--no such", "-z", flag[:-1], flag.upper()))
        return [*argv, name, value], Mutation("unknown flag", repr(name))
    return [*argv, value], Mutation("extra argument", repr(value[:40]))
