"""Candidate lists by the million: each as the numbers of its names, 4 bytes a candidate, and found again by them."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload


class CandidateLists(Sequence[list[str]]):
    """Lists of names in the order in which they were added. `names`: those that have the first numbers, from 0."""

    def __init__(self, lists: Iterable[Sequence[str]] = (), names: Iterable[str] = ()) -> None:
        self.names = list(names)
        self._place = {name: number for number, name in enumerate(self.names)}
        self._flat, self._ends = array("i"), array("q", [0])
        self._known: dict[bytes, int] = {}  # where each is, of the first `_looked`
        self._looked = 0
        for listed in lists:
            self.append(listed)

    def append(self, listed: Sequence[str]) -> None:
        """Add a list of names."""
        self.append_numbers([self._number(name) for name in listed])

    def append_numbers(self, numbers: Sequence[int]) -> None:
        """Add a list by the numbers of its names. Raises IndexError for a number that is no name's."""
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(self.names):
            raise IndexError(f"{numbers}: expected numbers from 0 to {len(self.names) - 1}")
        self._flat.extend(numbers)
        self._ends.append(len(self._flat))

    def place_of(self, listed: Sequence[str]) -> int:
        """Which list this is, from 0; a new one is added."""
        return self.place_of_numbers([self._number(name) for name in listed])

    def place_of_numbers(self, numbers: Sequence[int]) -> int:
        """`place_of` a list of names that have these numbers."""
        for place in range(self._looked, len(self)):
            self._known.setdefault(self._key(place), place)
        self._looked = len(self)
        key = array("i", numbers).tobytes()
        if key not in self._known:
            self._known[key] = len(self)
            self.append_numbers(numbers)
        return self._known[key]

    def numbers(self, place: int) -> list[int]:
        """The numbers of a list's names."""
        return self._flat[self._ends[place] : self._ends[place + 1]].tolist()

    def all_numbers(self) -> Iterator[list[int]]:
        """The numbers of every list."""
        return map(self.numbers, range(len(self)))

    def _number(self, name: str) -> int:
        if name not in self._place:
            self._place[name] = len(self.names)
            self.names.append(name)
        return self._place[name]

    def _key(self, place: int) -> bytes:
        return self._flat[self._ends[place] : self._ends[place + 1]].tobytes()

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> list[str]: ...
    @overload
    def __getitem__(self, place: slice) -> list[list[str]]: ...
    def __getitem__(self, place: int | slice) -> list[str] | list[list[str]]:
        if isinstance(place, slice):
            return [self[k] for k in range(*place.indices(len(self)))]
        return [self.names[number] for number in self.numbers(range(len(self))[place])]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(one == listed for one, listed in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]
