"""One line of a training log, of whatever format, as a reading: step, epoch, rank and the losses it tells.

Names and values are found by one regular expression, so JSON, Python dicts, `name: value` and `name=value` are read
alike, and a line that was cut or damaged still gives what is whole in it. What a name is about says names.py; of a
plain `loss` the words before it say which one it is. An evaluation is never taken for a training loss: where the line
leaves that open the loss counts for nothing, and the line is counted.
"""

import re
from typing import Any, NamedTuple

from eval.diagnosis.names import BEST_WORDS, EVAL_WORDS, PART_WORDS, TRAIN_WORDS, Name, data_of, name_of

# The exponent is no possessive group: Python before 3.11.5 leaves half of it in the match (gh-101955).
NUMBER = rb"[-+]?(?:(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?|(?i:nan|inf(?:inity)?)(?![A-Za-z]))"
LARGEST_PLACE = 1e15
CHINESE = ("utf-8", "gb18030")


def either(*words: str) -> bytes:
    """An expression for Chinese words in the encodings of logs."""
    return b"|".join(re.escape(word.encode(encoding)) for word in words for encoding in CHINESE)


PAIR = re.compile(
    rb"(?<![\w./@-])(?:([A-Za-z_][\w./@-]*+)|(" + either("损失值", "损失") + rb"))(?<![.-])"
    rb"(?:['\"]?\s*+(?:[:=]|"
    + either("：")
    + rb")\s*+['\"]?(?:tensor\(|\[\s*+)?|['\"]?[ ]++(?=\d)|['\"]?[ ]*+\[\s*+(?=\d))"
    rb"(" + NUMBER + rb")(?![\w.])"
)
QUOTED = re.compile(rb"(['\"])([\w ./-]{1,60})\1\s*:\s*(" + NUMBER + rb")(?![\w.])")
INTERESTING = re.compile(rb"(?i)loss|step|epoch|iter|train|xent|nll|val|test|dev|entropy|" + either("损失"))
NEAR = 500  # bytes beside a value: words further away do not tell what it is, and nobody's line costs its square
SIDE = re.compile(
    rb"(?i)(?<![\w./-])(?:(?P<train>" + "|".join(TRAIN_WORDS).encode() + rb")|(?P<eval>"
    + "|".join(EVAL_WORDS).encode() + rb"))(?:_\d+)?(?![\w/-]|\.\w)(?!\s+(?:tokens|samples|labels|examples|steps)\b)"
    rb"|(?P<zh_train>" + either("训练") + rb")|(?P<zh_eval>" + either("验证", "测试", "评估", "开发集") + rb")"
)  # fmt: skip
BEST = re.compile(
    rb"(?i)(?<![\w-])(?:" + "|".join(BEST_WORDS).encode() + rb")(?![\w-])|" + either("最佳", "最优", "最低", "保存")
)
BEFORE = re.compile(rb"([A-Za-z]+)[ -]['\"]?$")  # the word right before a name
JOINED = {"value": (b"loss ", Name("loss")), "rate": (b"learning ", Name("lr"))}  # "lm loss value: 2.3"
TRAILING = re.compile(rb"^\s*\(\s*(?i:" + "|".join(EVAL_WORDS).encode() + rb")\b")
PARTIAL = re.compile(rb"(?i)(?:" + "|".join(EVAL_WORDS).encode() + rb")\)?[^\w\[]*\[\s*(\d+)\s*/\s*(\d+)\s*\]")
HEADING = re.compile(rb"^\W*(?i:epoch)\s*[:#]?\s*\[?\s*(\d{1,9})(?:\s*/\s*\d+)?\]?\W*$")
SECTION = re.compile(rb"^(?:[^\d=]{0,80}|\s*[*=#-]{3,}[^=]{0,100})$")  # a line of words alone, or between rules
METRICS = re.compile(rb"^\s*\*{3,} \w+ metrics \*{3,}")  # the Trainer's: what follows was told before
BAR = b"%|"
SUMMARY = b"train_runtime"  # the Trainer's last line: its train_loss is the mean of the whole run


class Reading(NamedTuple):
    """What a line says; None where it says nothing."""

    step: float | None = None
    epoch: float | None = None
    rank: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    retention_loss: float | None = None
    lr: float | None = None
    heading: bool = False  # "Epoch 3/10" alone: the lines that follow belong to it
    data: str = ""  # which evaluation data, where there are several
    passed: str = ""  # a loss that counts for nothing: "best" (a record is told again) or "doubt"
    bar: bool = False  # a progress bar, which carries the last evaluation on
    section: str = ""  # "train", "eval" or "summary": words alone, what follows without a place belongs to it

    @property
    def has_loss(self) -> bool:
        """Whether any loss is in it."""
        return self.loss is not None or self.eval_loss is not None or self.retention_loss is not None


class Pair(NamedTuple):
    """A name with its value in a line: what it is about, and where the value stands."""

    name: Name
    start: int
    end: int


def side_of(text: bytes) -> str:
    """The last word in a text that says which data: `train`, `valid`, `test`, or "" for none."""
    side = ""
    for match in SIDE.finditer(text):
        if match["train"] or match["zh_train"]:
            side = "train"
        else:
            side = data_of([match["eval"].lower().decode()]) if match["eval"] else "valid"
    return side


def in_its_line(name: Name, line: bytes, side: str, before: bytes, after: bytes) -> Name:
    """A plain loss as the words around it tell it.

    `side` is what the last word of that kind says; `before` is the text since the last loss, without other names and
    values.
    """
    neighbour = BEFORE.search(before)
    if neighbour and neighbour[1].lower().decode() in PART_WORDS:
        return Name("part")
    if BEST.search(before):
        return Name("best")
    if name.role != "loss" or name.trained:
        return name
    if side == "train":
        return name
    if side:
        part = PARTIAL.search(line[:1000])
        return Name("doubt") if BAR in line or (part and part[1] != part[2]) else Name("eval_loss", data=side)
    return Name("doubt") if TRAILING.match(after) or side_of(after.rsplit(b":", 1)[-1]) not in ("", "train") else name


def named_values(line: bytes) -> list[tuple[str, int, int, int]]:
    """(name, where the name begins, where its value begins and ends) of every pair in a line."""
    found = {}
    if b"loss" in line and b" " in line:
        found = {m.start(3): (m[2].decode(), m.start(), m.start(3), m.end(3)) for m in QUOTED.finditer(line)
                 if b" " in m[2]}  # fmt: skip
    for m in PAIR.finditer(line):
        found.setdefault(
            m.start(3), (m[1].decode("ascii", "replace") if m[1] else "loss", m.start(), m.start(3), m.end(3))
        )
    return [found[place] for place in sorted(found)]


def find_pairs(line: bytes) -> tuple[dict[str, Pair], str]:
    """The plainest pair of every role in a line; and `best` or `doubt` where a loss was passed over."""
    found: dict[str, Pair] = {}
    passed, side, before, done = "", "", b"", 0
    pairs = named_values(line)
    last = pairs[-1][3] if pairs else 0
    for text, begin, start, end in pairs:
        before += line[done:begin]
        done = end
        before = before[-NEAR:]
        name = name_of(text)
        if text in JOINED and before.lower().endswith(JOINED[text][0]):
            name = JOINED[text][1]
        if name is None or (text.lower() == "train_loss" and SUMMARY in line):
            before += line[begin:start]
            continue
        if name.role in ("loss", "eval_loss"):
            side = side_of(before) or side
            name = in_its_line(name, line, side, before, line[last : last + NEAR])
            before = b""
        else:
            before += line[begin:start]  # "Test: [10/20] loss: 2.5", but not "val_accuracy: 0.4 loss: 2.5"
        if name.role in ("best", "doubt"):
            passed = passed if passed == "doubt" else name.role
        elif name.role != "part" and (name.role not in found or name.order < found[name.role].name.order):
            found[name.role] = Pair(name, start, end)
    return found, passed


def parse_line(line: bytes) -> Reading | None:
    """What a line says, None for nothing."""
    if not INTERESTING.search(line):
        return None
    heading = HEADING.match(line)
    if heading:
        return Reading(epoch=float(heading[1]), heading=True)
    if METRICS.match(line):
        return Reading(section="summary")
    found, passed = find_pairs(line)
    if found.keys() <= {"epoch"} and not passed:
        side = side_of(line) if SECTION.match(line) else ""
        if side or not found:
            return Reading(section="train" if side == "train" else "eval") if side else None
    return reading_of({role: line[pair.start : pair.end] for role, pair in found.items()}, data=data_in(found),
                      passed=passed, bar=BAR in line)  # fmt: skip


def data_in(found: dict[str, Pair]) -> str:
    """Which evaluation data a line's pairs are about."""
    return found["eval_loss"].name.data if "eval_loss" in found else ""


def reading_of(texts: dict[str, bytes], data: str = "", passed: str = "", bar: bool = False) -> Reading:
    """The reading of values by role; what is no number (null, None) is not told."""
    told: dict[str, Any] = {}
    for role, text in texts.items():
        try:
            value = float(text)
        except ValueError:
            continue
        if role not in ("step", "epoch", "rank") or abs(value) < LARGEST_PLACE:  # not NaN either
            told[role] = value
    rank = told.pop("rank", None)
    return Reading(rank=None if rank is None else int(rank), data=data, passed=passed, bar=bar, **told)


# --- the shape that most lines of a log have, as one expression -------------------------------------------------------
SCALAR = re.compile(rb"(?<![\w.])(?:" + NUMBER + rb"|null|None)(?![\w.])")
ANY_SCALAR = rb"[-+0-9A-Za-z.]+"
IN_SCALAR = re.compile(rb"[-+0-9A-Za-z.]")


class Shape(NamedTuple):
    """An expression that matches whole lines of one shape, with a group for each role, or any line as the last."""

    expression: re.Pattern[bytes]
    roles: tuple[str, ...]
    data: str


def shape_of(line: bytes) -> Shape | None:
    """The shape of a line with a loss and a step or an epoch; None for a line that must be read on its own."""
    if SUMMARY in line or BAR in line or b"}," in line.rstrip(b", ")[:-1] or not line.isascii():
        return None
    found, passed = find_pairs(line)
    if "loss" not in found or passed or not ({"step", "epoch"} & found.keys()):
        return None
    wanted = {pair.start: (role, pair.end) for role, pair in found.items()}
    parts, roles, position = [], [], 0
    for scalar in SCALAR.finditer(line):
        if scalar.start() < position:
            continue
        role, end = wanted.get(scalar.start(), (None, scalar.end()))
        parts.append(literal(line[position : scalar.start()]))
        value = ANY_SCALAR if IN_SCALAR.match(line, end) else ANY_SCALAR + b"+"  # possessive: nothing to give back
        parts.append(b"(" + value + b")" if role else value)
        roles += [role] if role else []
        position = end
    if len(roles) != len(wanted):
        return None
    parts.append(literal(line[position:]))
    expression = re.compile(rb"^(?:" + b"".join(parts) + rb"|(.+))$", re.MULTILINE)
    return Shape(expression, tuple(roles), data_in(found))


def literal(text: bytes) -> bytes:
    """An expression for the text between values; its digits may vary, and so may runs of blanks."""
    return re.sub(rb"(?:\\ ){2,}", rb"\\ ++", re.sub(rb"\d+", rb"\\d++", re.escape(text)))
