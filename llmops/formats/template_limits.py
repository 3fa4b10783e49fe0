"""Chat templates within bounds: a chat_template.jinja comes with a checkpoint, from anybody, and is a program.

Whatever it says, rendering one conversation ends within SECONDS (and a second more per hundred messages, beside the one
operation that runs at that moment), no text or list that it makes is larger than LARGEST characters and ten times the
conversation, and all that it makes in one rendering together is at most BUILT times that. A loop's round counts as the
number of its syntax nodes, a list's or dict's element as ten characters beside what it holds. A template has at most
SOURCE characters.

How: Jinja's syntax tree has few kinds of nodes that make a value, and each goes through a counter here: operators and
calls by the sandbox's own hooks, `~`, lists, tuples, dicts and slices as filters that the tree is rewritten to, filters
wrapped, macros and the output by `concat`. Where a single operation in C could make something huge ('a' * 10**9,
a width in a format), its size is estimated before. What no bound is known for is refused by its name: of builtin
methods and filters those remain that chat templates use. Loops and macros look at the clock in every round. No thread,
signal or process is involved, so it holds in every thread and DataLoader worker.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import Undefined, filters, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, TemplateReference
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from llmops.console import UserError
from llmops.formats.template_sizes import (
    GROWING_FILTERS,
    GROWING_METHODS,
    LARGEST,
    SMALL,
    percent_size,
    power_size,
    product_size,
    weigh,
)

SECONDS = 10.0
BUILT = 50
SOURCE = 200_000  # characters of a template: its compilation takes a few seconds at most
# what a template can end in, its compilation included; faults of ours are none of these but by chance
ERRORS = (
    TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip
TEXT_METHODS = """
    capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii isdecimal
    isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition
    removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip
    swapcase title upper zfill
"""
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(TEXT_METHODS.split()),
    list: frozenset(["copy", "count", "index"]),
    tuple: frozenset(["count", "index"]),
    dict: frozenset(["copy", "get", "items", "keys", "values"]),
    int: frozenset(["bit_length"]),
    float: frozenset(["is_integer"]),
}
FILTERS = """
    abs attr batch capitalize center count d default dictsort e escape filesizeformat first float forceescape format
    groupby indent int items join last length list lower map max min random reject rejectattr replace reverse round safe
    select selectattr slice sort string sum title tojson trim truncate unique upper urlencode
"""
PLAIN_OBJECTS = (Macro, LoopContext, BlockReference, TemplateReference, Joiner, Undefined)
OWNERS = (LoopContext, Cycler, Joiner, Extension)


class TooMuch(Exception):
    """A template is beyond its limits: what it does, as the end of a sentence."""


class Limits(threading.local):
    """What is left of a rendering's time and size, in each thread its own."""

    def __init__(self) -> None:
        self.seconds, self.deadline, self.largest, self.left = SECONDS, float("inf"), LARGEST, BUILT * LARGEST

    def start(self, messages: int) -> None:
        """Begin the time of a conversation with so many messages; it may be rendered many times in it."""
        self.seconds = SECONDS + messages / 100
        self.deadline = time.monotonic() + self.seconds

    def begin(self, size: int) -> None:
        """Begin one rendering of values of this size."""
        self.largest = LARGEST + 10 * size
        self.left = BUILT * self.largest

    def look(self) -> None:
        """Raise TooMuch when time is up."""
        if time.monotonic() > self.deadline:
            raise TooMuch(f"takes longer than {self.seconds:.0f} seconds")

    def room(self, size: int) -> None:
        """Raise TooMuch for a single value of this size, before it is made."""
        if size > self.largest:
            raise TooMuch(f"makes a text or a list of more than {self.largest:,} characters")

    def spend(self, size: int, value: Any = None) -> Any:
        """Count what was made, and hand it on. Raises TooMuch when it, or all of it together, is too large."""
        self.left = left = self.left - size
        if size > self.largest or left < 0:
            self.room(size)
            raise TooMuch(f"makes more than {BUILT * self.largest:,} characters of texts and lists")
        return value

    def made(self, value: Any) -> Any:
        """Count a value that was made, and hand it on."""
        kind = type(value)
        if kind is str:
            return self.spend(len(value), value)
        if kind in SMALL or (kind is int and -LARGEST < value < LARGEST):
            return value
        return self.spend(weigh(value, self.largest), value)


STEADY_METHODS = METHODS[str] - GROWING_METHODS.keys() - {"join"}  # whose results are no larger than the text
CALL_CONTEXT = frozenset(["_block_vars", "_loop_vars"])  # what Jinja hands to every call beside its arguments


class Counted(NodeTransformer):
    """Rewrites a template's tree so that what the sandbox has no hook for is counted, too."""

    def counted(self, node: nodes.Expr, name: str = "counted") -> nodes.Filter:
        """The node, handed through one of our filters."""
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def literal(self, node: nodes.Expr, items: Sequence[nodes.Node]) -> nodes.Node:
        """A list, tuple or dict; one of constants is no larger than the template."""
        simple = all(isinstance(item, nodes.Const) for item in items)
        visited: Any = self.generic_visit(node)
        return visited if simple or getattr(visited, "ctx", "load") != "load" else self.counted(visited)

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return self.literal(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return self.literal(node, node.items)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        return self.literal(node, [node for pair in node.items for node in (pair.key, pair.value)])

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        slices = isinstance(node.arg, nodes.Slice)
        visited: Any = self.generic_visit(node)
        return self.counted(visited) if slices else visited

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        visited: Any = self.generic_visit(node)
        return self.counted(nodes.List(visited.nodes, lineno=node.lineno), "concatenated")

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802
        """Chains of `+`, which templates are made of, are added up in one go: half the price of the hook."""
        parts: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            parts.append(self.visit(left.right))
            left = left.left
        parts.append(self.visit(left))
        return self.counted(nodes.List(parts[::-1], lineno=node.lineno), "added")

    def body(self, node: Any) -> nodes.Node:
        """A body that may run many times begins with a look at the clock."""
        weight = sum(1 for part in node.body for _ in part.find_all(nodes.Node)) + len(node.body)
        node = self.generic_visit(node)
        tick = self.counted(nodes.Const(weight, lineno=node.lineno), "tick")
        node.body = [nodes.ExprStmt(tick, lineno=node.lineno), *node.body]
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = body  # noqa: N815


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The environment in which transformers renders chat templates, with everything that makes a value counted."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, limits: Limits) -> None:
        # what chat templates may expect is defined by transformers, in a function that hands out nothing else
        theirs = chat_template_utils._cached_compile_jinja_template("").environment
        super().__init__(
            trim_blocks=theirs.trim_blocks, lstrip_blocks=theirs.lstrip_blocks,
            extensions=[type(extension) for extension in theirs.extensions.values()],
        )  # fmt: skip
        self.limits = limits
        self.globals.update(theirs.globals)
        del self.globals["lipsum"]
        self.globals["namespace"] = brief_namespace(theirs.globals["namespace"])
        self.known = tuple(self.globals.values())
        kept = {name: function for name, function in theirs.filters.items() if name in FILTERS.split()}
        kept |= {"join": self._join, "tojson": self._to_json(kept["tojson"]), "sum": self._sum}
        self.filters = {name: self._filter(name, function) for name, function in kept.items()}
        self.filters |= {"counted": self._counted, "concatenated": self._concatenated}
        self.filters |= {"added": self._added, "tick": self._tick}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = Counted().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)

    # --- the hooks

    def concat(self, pieces: Iterable[str]) -> str:
        """The output of a template, a macro or a block."""
        limits, parts, size = self.limits, [], 0
        largest = limits.largest
        for piece in pieces:
            size += len(piece)
            if size > largest:
                limits.room(size)
            limits.look()
            parts.append(piece)
        return limits.spend(size, "".join(parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Every operator but the logical ones and comparisons."""
        limits = self.limits
        if operator == "*":
            limits.room(product_size(left, right))
        elif operator == "**":
            limits.room(power_size(left, right))
        elif operator == "%" and isinstance(left, str):
            limits.room(percent_size(left, right))
        return limits.made(self.binop_table[operator](left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Every call: a method, a macro or a function that chat templates are given."""
        __self.limits.look()
        steady = type(__obj) is BuiltinMethodType and type(__obj.__self__) is str and __obj.__name__ in STEADY_METHODS
        if steady and kwargs.keys() <= CALL_CONTEXT:  # what most calls are
            return __self.limits.made(__obj(*args))
        method = getattr(__obj, "__wrapped__", __obj)  # str.format comes wrapped by the sandbox
        owner = getattr(method, "__self__", None)
        if isinstance(method, BuiltinMethodType | MethodType) and not isinstance(owner, OWNERS):
            args = __self._bounded(owner, method.__name__, args, kwargs)
        elif not isinstance(__obj, (*PLAIN_OBJECTS, MethodType)) and not any(__obj is one for one in __self.known):
            raise SecurityError(f"it calls {type(__obj).__name__} objects, which no limit is known for")
        elif getattr(__obj, "__name__", "") == "strftime_now" and re.search(r"%[^a-zA-Z%]*\d{3}", str(args)):
            raise SecurityError("it formats a date with a width")
        return __self.limits.made(super().call(__context, __obj, *args, **kwargs))

    def _bounded(self, owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of a builtin method, when it is one that is known and its result not too large."""
        kind = next((kind for kind in METHODS if isinstance(owner, kind)), None)
        if kind is None or name not in METHODS[kind]:
            raise SecurityError(f"it calls {type(owner).__name__}.{name}, which no limit is known for")
        given = {key: value for key, value in kwargs.items() if key not in CALL_CONTEXT}
        if name == "join":
            args = (self._joinable(owner, *args),)
        elif kind is str and name in GROWING_METHODS:
            self.limits.room(GROWING_METHODS[name](owner, *args, **given))
        return args

    # --- filters

    def _filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose result is counted. All take the context, so that none is computed while compiling."""
        passed = getattr(getattr(function, "jinja_pass_arg", None), "name", "")
        first: Callable[[Context], tuple[Any, ...]] = {
            "context": lambda context: (context,), "eval_context": lambda context: (context.eval_ctx,),
            "environment": lambda context: (self,),
        }.get(passed, lambda context: ())  # fmt: skip
        estimate = GROWING_FILTERS.get(name)
        limits = self.limits

        @pass_context
        def counted(context: Context, *args: Any, **kwargs: Any) -> Any:
            limits.look()
            if estimate:
                limits.room(estimate(*args, **kwargs))
            return limits.made(function(*first(context), *args, **kwargs))

        return counted

    @staticmethod
    @pass_context
    def _counted(context: Context, value: Any) -> Any:
        return context.environment.limits.made(value)  # type: ignore[attr-defined]

    @staticmethod
    @pass_context
    def _concatenated(context: Context, parts: list[Any]) -> str:
        limits = context.environment.limits  # type: ignore[attr-defined]
        limits.room(weigh(parts, limits.largest) - 10 * len(parts))
        return limits.made("".join(map(str, parts)))

    @staticmethod
    @pass_context
    def _added(context: Context, parts: list[Any]) -> Any:
        limits = context.environment.limits  # type: ignore[attr-defined]
        value, small = parts[0], 0
        for part in parts[1:]:
            value = value + part
            size = len(value) if type(value) is str else weigh(value, limits.largest)
            if size > LARGEST // 100:
                limits.spend(size)
            else:
                small += size
        limits.left -= small
        return value

    @staticmethod
    @pass_context
    def _tick(context: Context, weight: int) -> None:
        limits = context.environment.limits  # type: ignore[attr-defined]
        limits.look()
        limits.spend(weight)

    def _joinable(self, separator: Any, values: Iterable[Any]) -> list[Any]:
        values = list(values)
        self.limits.room(weigh(values, self.limits.largest) - 11 * len(values) + len(str(separator)) * len(values))
        return values

    @staticmethod
    @pass_context
    def _join(context: Context, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
        values = context.environment._joinable(d, value)  # type: ignore[attr-defined]
        return filters.sync_do_join(context.eval_ctx, values, d, attribute)

    @staticmethod
    @pass_context
    def _sum(context: Context, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
        if not isinstance(start, int | float):
            raise TypeError(f"sum adds numbers, not {type(start).__name__}")
        return filters.sync_do_sum(context.environment, iterable, attribute, start)

    def _to_json(self, theirs: Callable[..., str]) -> Callable[..., str]:
        """JSON as transformers writes it; indented, piece by piece, because deep data grows by its indentation."""

        def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
                    sort_keys: bool = False) -> str:  # fmt: skip
            self.limits.room(weigh(value, self.limits.largest))
            if indent is None:
                return theirs(value, ensure_ascii, indent, separators, sort_keys)
            self.limits.room(indent if isinstance(indent, int) else len(indent))
            encoder = json.JSONEncoder(
                ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
            )
            return self.concat(encoder.iterencode(value))

        return to_json


def brief_namespace(theirs: type[Namespace]) -> type[Namespace]:
    """Their namespace with a short repr: what a namespace holds is not counted when it is put there."""
    return type("BriefNamespace", (theirs,), {"__repr__": lambda self: "<Namespace>"})


class LimitedTemplate:
    """A chat template that renders as transformers does, within the limits of this module.

    `name` is what errors call it. Raises UserError for a source that is no Jinja template.
    """

    def __init__(self, source: str, name: str) -> None:
        self.name, self.source = name, source
        self.limits = Limits()
        if len(source) > SOURCE:
            raise UserError(f"{name} has {len(source):,} characters, expected at most {SOURCE:,}")
        try:
            environment = LimitedEnvironment(self.limits)
            self._template = environment.from_string(source)
            self.names = {node.name for node in environment.parse(source).find_all(nodes.Name)}
        except ERRORS as error:
            raise UserError(f"{name} is no Jinja template that can be used: {said(error)}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text. Raises UserError, one sentence, for whatever the template does wrong."""
        size = sum(len(message["content"]) for message in messages)
        size += sum(weigh(message["tool_calls"], LARGEST) for message in messages if "tool_calls" in message)
        size += weigh(variables["tools"], LARGEST) if variables.get("tools") else 0
        try:
            self.limits.begin(size)
            return self._template.render(messages=[dict(message) for message in messages], **variables)
        except TooMuch as error:
            raise UserError(f"{self.name} {error} for a conversation of {size:,} characters, which no honest "
                            "template needs; look into the checkpoint's chat_template.jinja") from error  # fmt: skip
        except ERRORS as error:
            raise UserError(f"{self.name} refuses a conversation: {said(error)}") from error


def said(error: BaseException) -> str:
    """An error in a template as the end of a sentence: what it says, its kind unless it is Jinja's, its line."""
    text = (str(error).strip().splitlines() or [""])[0][:300]
    if not isinstance(error, TemplateError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{text} (line {line} of the template)" if line else text
