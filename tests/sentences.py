"""What the project's sources say to people, found without running them: the sentences, and the pieces they are made of.

A sentence is followed from where it leaves (an error, the log) to where its words stand: through names, conditions,
joined lists, what functions of the project return and what they are called with.
"""

import argparse
import ast
import errno
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("llmops", "train", "faq", "eval", "serve", "job")
SAYERS = frozenset(
    [
        "UserError",
        "RunStopped",
        "BadRow",
        "BadRecords",
        "BadJson",
        "NoLossError",
        "ArgumentTypeError",
        "log",
        "spoken",
        "progress",
    ]
)
SAYING_METHODS = frozenset(["error", "tell"])
GATHER = ("append", "extend")
DEEPEST = 6  # of steps from a sentence to where its words stand
ELSEWHERE = {  # argparse makes lines of these words, json says them in C
    "options:", "positional arguments:", "Invalid control character at"
}  # fmt: skip
PLACE = "\0"  # what an f-string puts in
TO_CLIENTS = (  # what goes to programs and browsers over HTTP is English there, or has its Chinese in the pages
    "serve/console/", "serve/openapi.py", "serve/model/asked.py", "serve/model/routes.py", "serve/model/exchange.py",
    "eval/similar/html_report.py",
)  # fmt: skip
CODE = re.compile(r"</|=>|;$|\{$|^<")  # of the pages that are written
PROSE = re.compile(r"[A-Za-z]{2,}[,:]? +[A-Za-z(]|^[a-z]+:? ?\0")


@dataclass(frozen=True)
class Said:
    """Words of a source; PLACE stands for what is put in. `whole`: a sentence, not a piece of one."""

    words: str
    where: str
    whole: bool


@dataclass(frozen=True)
class Scope:
    """A function (or a module's top) in its file."""

    node: ast.AST
    path: Path
    name: str = ""


def skeleton(text: str) -> str:
    """Words with one PLACE for all that is put in side by side, without what only says their kind or joins them."""
    return re.sub(r"^(error|warning|stopped): |^; ", "", re.sub(f"{PLACE}+", PLACE, text).strip())


def spelled(node: ast.AST) -> str | None:
    """The words of a string as it is written down; None for other expressions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(spelled(part) or PLACE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = spelled(node.left), spelled(node.right)
        if left is None and right is None:
            return None
        return (PLACE if left is None else left) + (PLACE if right is None else right)
    return None


def name_of(call: ast.Call) -> str:
    """The last name of what is called."""
    called = call.func
    return called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""


class Sources:
    """All Python files of the project, read once."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.modules: list[Scope] = []
        self.functions: dict[str, list[Scope]] = defaultdict(list)
        self.calls: dict[str, list[tuple[ast.Call, Scope]]] = defaultdict(list)
        self.parents: dict[ast.AST, Scope] = {}
        self.reached: dict[ast.AST, int] = {}  # with how many steps
        self.assigned: dict[ast.AST, dict[str, list[ast.AST]]] = {}
        for folder in FOLDERS:
            for path in sorted((root / folder).rglob("*.py")):
                module = Scope(ast.parse(path.read_text(encoding="utf-8")), path)
                self.modules.append(module)
                self._read(module.node, module)

    def _read(self, node: ast.AST, scope: Scope) -> None:
        for child in ast.iter_child_nodes(node):
            inner = scope
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = Scope(child, scope.path, child.name)
                self.functions[child.name].append(inner)
                self.parents[child] = scope
            if isinstance(child, ast.Call):
                self.calls[name_of(child)].append((child, scope))
            self._read(child, inner)

    def sentences(self) -> Iterator[Said]:
        """All that is said, with the pieces."""
        for name, calls in list(self.calls.items()):
            for call, scope in calls:
                method = isinstance(call.func, ast.Attribute)
                if name in (SAYING_METHODS if method else SAYERS) and len(call.args) > (name == "progress"):
                    yield from self.reach(call.args[1 if name == "progress" else 0], scope)

    def reach(self, node: ast.AST | None, scope: Scope, depth: int = 0) -> Iterator[Said]:
        """What an expression can say."""
        if node is None or depth > DEEPEST or depth >= self.reached.get(node, DEEPEST + 1):
            return
        self.reached[node] = depth
        words = spelled(node)
        if words is not None:
            line = f"{scope.path.relative_to(self.root)}:{node.lineno}"  # type: ignore[attr-defined]
            for part in words.split("\n"):
                yield Said(skeleton(part), line, depth == 0)
        for part in self.parts(node, scope):
            yield from self.reach(part[0], part[1], depth + 1)

    def parts(self, node: ast.AST, scope: Scope) -> Iterator[tuple[ast.AST | None, Scope]]:
        """The expressions that an expression's words come from."""
        if isinstance(node, ast.JoinedStr):
            yield from ((value.value, scope) for value in node.values if isinstance(value, ast.FormattedValue))
        elif isinstance(node, ast.BinOp):
            for side in (node.left, node.right):
                yield from ((side, scope),) if spelled(side) is None else self.parts(side, scope)
        elif isinstance(node, ast.IfExp):
            yield from ((node.body, scope), (node.orelse, scope))
        elif isinstance(node, ast.BoolOp | ast.JoinedStr):
            yield from ((value, scope) for value in node.values)
        elif isinstance(node, ast.List | ast.Tuple | ast.Set):
            yield from ((element, scope) for element in node.elts)
        elif isinstance(node, ast.Dict):
            yield from ((value, scope) for value in node.values)
        elif isinstance(node, ast.GeneratorExp | ast.ListComp):
            yield node.elt, scope
        elif isinstance(node, ast.Starred | ast.Subscript | ast.NamedExpr):
            yield node.value, scope
        elif isinstance(node, ast.Name):
            yield from self.meanings(node.id, scope)
        elif isinstance(node, ast.Call):
            yield from self.called(node, scope)

    def called(self, call: ast.Call, scope: Scope) -> Iterator[tuple[ast.AST | None, Scope]]:
        """What a call gives: the returns of a function of ours; what a join joins; a default of get or next."""
        name = name_of(call)
        if name in ("join", "get", "next", "append"):
            yield from ((argument, scope) for argument in call.args)
            if name == "get" and isinstance(call.func, ast.Attribute):
                yield call.func.value, scope
        for function in self.functions.get(name, []):
            if len(self.functions[name]) <= 3:
                for inner in ast.walk(function.node):
                    if isinstance(inner, ast.Return | ast.Yield):
                        yield inner.value, function

    def meanings(self, name: str, scope: Scope) -> Iterator[tuple[ast.AST | None, Scope]]:
        """What a name can stand for: what is assigned or appended to it here, or what a function is called with."""
        here = self.assignments(scope)
        yield from ((value, scope) for value in here.get(name, ()))
        if isinstance(scope.node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = scope.node.args
            names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
            if name in (*names, *(argument.arg for argument in arguments.kwonlyargs)):
                yield from self.given(name, names, scope)
            elif name not in here:
                yield from self.meanings(name, self.parents[scope.node])

    def assignments(self, scope: Scope) -> dict[str, list[ast.AST]]:
        """The expressions that names get in a function or at a module's top."""
        if scope.node not in self.assigned:
            found = self.assigned[scope.node] = defaultdict(list)
            for inner in ast.walk(scope.node):
                if isinstance(inner, ast.Assign):
                    for target in inner.targets:
                        assign(target, inner.value, found)
                elif isinstance(inner, ast.AugAssign | ast.AnnAssign | ast.NamedExpr):
                    assign(inner.target, inner.value, found)
                elif isinstance(inner, ast.For | ast.comprehension):
                    assign(inner.target, inner.iter, found)
                elif isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and name_of(inner) in GATHER:
                    assign(inner.func.value, inner.args[0], found)
        return self.assigned[scope.node]

    def given(self, name: str, names: list[str], scope: Scope) -> Iterator[tuple[ast.AST | None, Scope]]:
        """The arguments that a function's parameter gets, and its default."""
        assert isinstance(scope.node, ast.FunctionDef | ast.AsyncFunctionDef)
        arguments = scope.node.args
        defaults = dict(zip(reversed(names), reversed(arguments.defaults), strict=False))
        keyword_defaults = dict(zip((one.arg for one in arguments.kwonlyargs), arguments.kw_defaults, strict=True))
        yield defaults.get(name) or keyword_defaults.get(name), scope
        method = bool(names) and names[0] in ("self", "cls")
        own = names[1:] if method else names
        place = own.index(name) if name in own else None
        for call, caller in self.calls[scope.name]:
            if place is not None and place < len(call.args):
                yield call.args[place], caller
            yield from ((keyword.value, caller) for keyword in call.keywords if keyword.arg == name)


def assign(target: ast.AST, value: ast.AST | None, found: dict[str, list[ast.AST]]) -> None:
    """Note the expression that an assignment gives to each name of its target."""
    if isinstance(target, ast.Name) and value is not None:
        found[target.id].append(value)
    elif isinstance(target, ast.Tuple):
        for place, one in enumerate(target.elts):
            fits = isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
            assign(one, value.elts[place] if fits else value, found)


def all_words(root: Path = ROOT) -> set[str]:
    """Every string of the sources and shell scripts, and of what speaks through them: argparse, json, the system."""
    found = {words for words, _ in shell_sentences(root)} | set(map(os.strerror, errno.errorcode)) | ELSEWHERE
    paths = [path for folder in FOLDERS for path in (root / folder).rglob("*.py")]
    for path in [*paths, Path(argparse.__file__), Path(json.decoder.__file__)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words = spelled(node)
            if words is not None:
                plain = re.sub(r"%\(\w+\)[sr]|%[sr]", PLACE, words) if path.name == "argparse.py" else words
                found |= {skeleton(part) for part in plain.split("\n")}
    return found


def shell_sentences(root: Path = ROOT) -> Iterator[tuple[str, str]]:
    """(words, file and line) of what the shell scripts say."""
    scripts = [*root.glob("*.sh"), *(path for folder in FOLDERS for path in (root / folder).rglob("*.sh"))]
    for path in sorted(scripts):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            plain = re.sub(r"\$\([^()]*\)|\$\{[^{}]*\}|\$\w|%s", PLACE, re.sub(r"\$([A-Za-z_]\w*)", PLACE, line))
            for quoted in re.findall(r"""\b(?:log|die|spoken|printf --) "((?:[^"\\]|\\.)*)\"""", plain):
                words = skeleton(re.sub(r"\\(.)", r"\1", quoted))
                if any(map(str.isalpha, words)):
                    yield words, f"{path.relative_to(root)}:{number}"
