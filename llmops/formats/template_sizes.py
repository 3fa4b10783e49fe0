"""How large what a chat template makes is, or will be: sizes of values, and of results before an operation runs."""

import re
from collections.abc import Callable, Collection
from typing import Any

from jinja2.utils import Namespace

LARGEST = 1_000_000
BITS = 100_000  # of an integer
SMALL = frozenset([bool, float, type(None)])
GROUPS: tuple[type[Collection[Any]], ...] = (
    list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items())
)  # fmt: skip


def weigh(value: Any, limit: int) -> int:
    """The size of a value with all that it holds, counted as often as it is held; stops counting beyond `limit`.

    Exact types come first: this runs for every value that a template makes.
    """
    kind = type(value)
    if kind in SMALL:
        return 1
    if kind is int:
        return 1 + value.bit_length() // 3
    if isinstance(value, str):
        return len(value)
    total, waiting = 0, [value]
    while waiting and total <= limit:
        item = waiting.pop()
        kind = type(item)
        if kind is str:
            total += len(item) + 1
        elif kind is dict:
            total += 10 * len(item) + 1
            waiting += [*item, *item.values()] if 10 * len(item) <= limit else []
        elif kind in SMALL:
            total += 1
        elif kind is int:
            total += 1 + item.bit_length() // 3
        elif isinstance(item, str):
            total += len(item) + 1
        elif isinstance(item, GROUPS):
            total += 10 * len(item) + 1
            waiting += item if 10 * len(item) <= limit else []
        elif isinstance(item, Namespace):
            waiting.append(object.__getattribute__(item, "_Namespace__attrs"))
        else:
            total += 1
    return total


def widths(text: str, values: Any, fields: int) -> int:
    """An upper bound for a format's result: every field as wide as the widest number in it says, and as all values."""
    numbers = re.findall(r"\d+", text)
    if any(len(number) > 6 for number in numbers):
        return 1 << 60
    return len(text) + fields * (max(map(int, numbers), default=0) + 64 + 10 * weigh(values, 1 << 40))


def percent_size(text: str, values: Any) -> int:
    """Of `text % values`."""
    if re.search(r"%[^a-zA-Z%]*\*", text):  # a width that is a value
        return 1 << 60
    return widths(text, values, text.count("%"))


def braces_size(text: str, *args: Any, **kwargs: Any) -> int:
    """Of `text.format(...)` and `text.format_map(...)`."""
    if re.search(r"\{[^{}]*\{", text.replace("{{", "")):  # a width that is a value
        return 1 << 60
    return widths(text, [*args, *kwargs.values()], text.count("{"))


def replaced_size(text: Any, old: str, new: str, count: Any = None) -> int:
    """Of `text.replace(old, new)`."""
    text = str(text)
    return len(text) + text.count(str(old)) * len(str(new))


def power_size(left: Any, right: Any) -> int:
    """Of `left ** right` where both are integers: BITS of them count as the largest text."""
    if not isinstance(left, int) or not isinstance(right, int):
        return 0
    return left.bit_length() * abs(right) * (LARGEST // BITS)


def product_size(left: Any, right: Any) -> int:
    """Of `left * right`: of a sequence, or of integers, BITS of which count as the largest text."""
    if isinstance(left, int) and isinstance(right, int):
        return (left.bit_length() + right.bit_length()) * (LARGEST // BITS)
    held, times = (left, right) if isinstance(right, int) else (right, left)
    return max(1, weigh(held, 1 << 40)) * times if isinstance(times, int) else 0


GROWING_METHODS: dict[str, Callable[..., int]] = {
    "replace": replaced_size,
    "center": lambda text, width, fill=" ": width,
    "ljust": lambda text, width, fill=" ": width,
    "rjust": lambda text, width, fill=" ": width,
    "zfill": lambda text, width: width,
    "expandtabs": lambda text, tabsize=8: len(text) + text.count("\t") * tabsize,
    "format": braces_size,
    "format_map": braces_size,
}
GROWING_FILTERS: dict[str, Callable[..., int]] = {
    "replace": replaced_size,
    "center": lambda value, width=80: width,
    "indent": lambda value, width=4, first=False, blank=False: (
        (width if isinstance(width, int) else len(width)) * (len(str(value).splitlines()) + 1) + len(str(value))
    ),
    "format": lambda value, *args, **kwargs: percent_size(str(value), [*args, *kwargs.values()]),
    "batch": lambda value, linecount, fill_with=None: linecount,
    "slice": lambda value, slices, fill_with=None: slices,
    "round": lambda value, precision=0, method="common": abs(precision) * 1000,
}
