"""Beginnings of prompts whose keys and values are known: found by their tokens, the longest unused dropped first."""

from collections.abc import Iterator, Sequence

from llmops.generation.shared_prefix import MIN_SHARED, NOTHING, Prefix

BLOCK = MIN_SHARED  # beginnings are looked up, and cut, in steps of so many tokens
LEAST = 2 * BLOCK  # a shorter one is computed as fast as it is put in place
LOOKED_AT = 8  # of those that share the same blocks, the ones used last


class Room:
    """Memory for the beginnings of all models together; who is over it loses the longest unused one of all."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self.used: dict[tuple[Prefixes, int], None] = {}  # (whose, by what number), the longest unused first

    def free(self, size: int) -> None:
        """Drop beginnings until so many bytes more have room."""
        while self.used and self.bytes + size > self.most_bytes:
            prefixes, number = next(iter(self.used))
            prefixes.drop(number)

    def clear(self) -> None:
        """Drop all of them."""
        self.free(self.most_bytes + 1)


class Prefixes:
    """One model's beginnings within the room of all. A longer one that begins with a shorter one takes its place."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.bytes = 0
        self._kept: dict[int, Prefix] = {}  # by a number of its own, the longest unused first
        self._blocks: dict[int, dict[int, None]] = {}  # numbers of those that begin with some blocks, by their hash
        self._cuts: dict[int, dict[int, Prefix]] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, ids: Sequence[int]) -> Prefix:
        """The longest known beginning of a prompt, in whole blocks, without its last token, which has to be computed.

        Prompts that begin alike get the same object, so that they share one segment of attention.
        """
        number, length = self._find(ids)
        length = min(length, len(ids) - 1) // BLOCK * BLOCK
        if number is None or length < LEAST:
            return NOTHING
        found = self._kept[number]
        self._use(number)
        cuts = self._cuts.setdefault(number, {})
        if length not in cuts:
            cuts[length] = found.cut(length)
        return cuts[length]

    def keep(self, prefix: Prefix) -> None:
        """Keep a beginning, unless it is too short or known already."""
        size = bytes_of(prefix)
        if prefix.length < LEAST or size > self.room.most_bytes:
            return
        number, length = self._find(prefix.ids)
        if number is not None and length == prefix.length:
            self._use(number)
            return
        if number is not None and length == self._kept[number].length:
            self.drop(number)
        self.room.free(size)
        self._kept[self._next] = prefix
        self.room.used[self, self._next] = None
        for key in chain(prefix.ids):
            self._blocks.setdefault(key, {})[self._next] = None
        self.bytes += size
        self.room.bytes += size
        self._next += 1

    def _use(self, number: int) -> None:
        """It is the last one that was used now, of this model's and of all."""
        self._kept[number] = self._kept.pop(number)
        self.room.used[self, number] = self.room.used.pop((self, number))

    def _find(self, ids: Sequence[int]) -> tuple[int | None, int]:
        """(number of the one that shares the longest beginning, how long that is)."""
        candidates: dict[int, None] = {}
        for key in chain(ids):
            if key not in self._blocks:
                break
            candidates = self._blocks[key]
        best, most = None, 0
        for number in list(candidates)[-LOOKED_AT:]:
            same = common(self._kept[number].ids, ids)
            if same > most:
                best, most = number, same
        return best, most

    def drop(self, number: int) -> None:
        """Give up one of them."""
        prefix = self._kept.pop(number)
        del self.room.used[self, number]
        self._cuts.pop(number, None)
        self.bytes -= bytes_of(prefix)
        self.room.bytes -= bytes_of(prefix)
        for key in chain(prefix.ids):
            del self._blocks[key][number]
            if not self._blocks[key]:
                del self._blocks[key]


def chain(ids: Sequence[int]) -> Iterator[int]:
    """A hash of the first block, of the first two, and so on; what is found by it is compared."""
    key = 0
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        key = hash((key, *ids[end - BLOCK : end]))
        yield key


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def bytes_of(prefix: Prefix) -> int:
    """Memory of its keys and values."""
    return sum(key.nbytes + value.nbytes for key, value in prefix.layers)
