"""The bytes of a log, wherever they come from: a file, a compressed file, a pipe. Every reading comes to an end.

A file is read as far as it goes when it is opened, however fast it grows. A named pipe must have a writer within
FIFO_WAIT seconds and speak within FIFO_SILENCE; devices are refused. stdin (-) is read as long as its writer likes.
"""

import bz2
import lzma
import os
import select
import stat
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmops import files
from llmops.console import UserError

PIECE = 1 << 20
FIFO_WAIT = 2.0
FIFO_SILENCE = 60.0
CURE = "pass the log.txt of a training, or the folder that holds it"
REFUSED = {
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it (zstd -d)",
    b"PK\x03\x04": "a zip archive or a checkpoint's weights; pass the text log that the training wrote",
}
HEAD = 6  # bytes that tell how a log is packed


class Gzip:
    """zlib's decompressor of gzip data with the interface of bz2's and lzma's."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        """Whether a member is over."""
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        """What follows the member."""
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Up to `max_length` bytes of what was packed."""
        out = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.needs_input = not self._inner.unconsumed_tail
        return out


PACKED: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": Gzip,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": lzma.LZMADecompressor,
}


def read_log(path: str) -> Iterator[bytes]:
    """The bytes of a log in pieces, unpacked. Raises UserError for what cannot be read, or never ends."""
    yield from unpacked(stdin_pieces() if path == "-" else file_pieces(Path(path)), path)


def stdin_pieces() -> Iterator[bytes]:
    """What stdin holds."""
    try:
        while piece := os.read(sys.stdin.fileno(), PIECE):
            yield piece
    except OSError as error:
        raise UserError(f"stdin cannot be read ({error.strerror}); pass the log's path") from error


def file_pieces(path: Path) -> Iterator[bytes]:
    """What a file holds when it is opened, or what comes through a pipe until its writer closes it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UserError(files.unreadable(path, "the log", CURE, error)) from error
    try:
        status = os.fstat(descriptor)
        if stat.S_ISFIFO(status.st_mode):
            yield from pipe_pieces(descriptor, path)
        elif stat.S_ISREG(status.st_mode):
            left = status.st_size or sys.maxsize  # files of /proc have no size
            while left > 0 and (piece := os.read(descriptor, min(PIECE, left))):
                left -= len(piece)
                yield piece
        else:
            kind = next((words for test, words in files.SPECIAL_KINDS if test(status.st_mode)), "no regular file")
            raise UserError(f"the log {path} is {kind}, expected a file, a folder, a pipe or - for stdin")
    except OSError as error:
        raise UserError(f"the log {path} cannot be read ({error.strerror}); check the disk") from error
    finally:
        os.close(descriptor)


def pipe_pieces(descriptor: int, path: Path) -> Iterator[bytes]:
    """What comes through a pipe, which was opened without waiting for its writer."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    opened, some = time.monotonic(), False
    while True:
        try:
            piece = os.read(descriptor, PIECE)
        except BlockingIOError:  # there is a writer
            if not poll.poll(1000 * FIFO_SILENCE):
                raise UserError(
                    f"the log {path} is a pipe whose writer said nothing for {FIFO_SILENCE:g} seconds; pass a file"
                ) from None
            continue
        if piece:
            some = True
            yield piece
        elif some:
            return
        elif time.monotonic() - opened > FIFO_WAIT:
            raise UserError(f"the log {path} is a named pipe that nobody writes to; start its writer, or pass a file")
        else:
            time.sleep(0.02)


def unpacked(pieces: Iterator[bytes], path: str) -> Iterator[bytes]:
    """The pieces of a log; of a log that is packed with gzip, bzip2 or xz what it holds, as far as it goes."""
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= HEAD:
            break
    for beginning, what in REFUSED.items():
        if head.startswith(beginning):
            raise UserError(f"the log {path} is {what}")
    magic = next((magic for magic in PACKED if head.startswith(magic)), None)
    if magic is None:
        yield from (part for part in (head,) if part)
        yield from pieces
        return
    try:
        yield from unpack(magic, head, pieces)
    except (zlib.error, lzma.LZMAError, EOFError, OSError, ValueError) as error:
        raise UserError(f"the log {path} is packed, and damaged ({error}); unpack what can be saved of it") from error


def unpack(magic: bytes, head: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """What packed pieces hold, in pieces of bounded size; several packed streams may follow each other."""
    decompressor = PACKED[magic]()
    data = head
    while True:
        if decompressor.eof:
            data = decompressor.unused_data + data
            if not data.startswith(magic):
                return  # the end, or padding
            decompressor = PACKED[magic]()
        out = decompressor.decompress(data, PIECE)
        data = b""
        if out:
            yield out
        if decompressor.needs_input and not decompressor.eof:
            data = next(pieces, b"")
            if not data:
                return
