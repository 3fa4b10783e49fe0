"""One line of a training log, of whatever format, as a reading: step, epoch, rank and the losses it tells.

Names and values are found by one regular expression, so JSON, Python dicts, `name: value` and `name=value` are read
alike, and a line that was cut or damaged still gives what is whole in it.
"""

import re
from typing import NamedTuple

NUMBER = rb"[-+]?(?:(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|(?i:nan|inf(?:inity)?)(?![A-Za-z]))"
TRAIN = ("loss", "train_loss", "train/loss", "training_loss")
EVAL = (
    "eval_loss", "eval/loss", "val_loss", "val/loss", "valid_loss", "valid/loss", "validation_loss", "validation/loss",
    "test_loss", "test/loss", "dev_loss",
)  # fmt: skip
STEP = ("global_step/max_steps", "global_step", "current_steps", "step", "iteration", "iter")  # first known wins
ROLES = (
    dict.fromkeys(TRAIN, "loss") | dict.fromkeys(EVAL, "eval_loss") | {name: name for name in STEP}
    | {"retention_loss": "retention_loss", "epoch": "epoch", "rank": "rank", "learning_rate": "lr", "lr": "lr"}
)  # fmt: skip
PLACES = ("step", "epoch")
LARGEST_PLACE = 1e15
PAIR = re.compile(
    rb"(?<![\w./-])(?:([A-Za-z]+)[ ])?(['\"]?)((?i:"
    + b"|".join(re.escape(name.encode()) for name in sorted(ROLES, key=len, reverse=True))
    + rb"))\2(?:\s*[:=]\s*['\"]?(?:tensor\()?|[ ]+(?=\d))("
    + NUMBER
    + rb")(?![\w.])"
)
# words before "loss" that say which loss: "Training Loss: 1.2, Evaluation Loss: 1.4"
EVAL_WORDS = {b"evaluation", b"eval", b"validation", b"val", b"valid", b"test", b"dev"}
PARTIAL_WORDS = {b"aux", b"auxiliary", b"kl", b"router", b"balance", b"policy", b"value", b"z", b"moe", b"mtp", b"reg"}
INTERESTING = re.compile(rb"(?i)loss|step|epoch|iter")
KERAS = re.compile(rb"^\s*(\d+)/(\d+)\s.*?(?:\[[=>.]*\]|\xe2\x94\x81|- *\d+m?s).* - loss:")
KERAS_EPOCH = re.compile(rb"^\s*Epoch (\d+)/\d+\s*$")
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

    @property
    def has_loss(self) -> bool:
        """Whether any loss is in it."""
        return self.loss is not None or self.eval_loss is not None or self.retention_loss is not None


def role_of(match: re.Match[bytes]) -> str | None:
    """What a found pair is about, or None for a part of a loss (aux loss, KL loss)."""
    before = match[1].lower() if match[1] else b""
    role = ROLES[match[3].decode().lower()]
    if role == "loss" and before in EVAL_WORDS:
        return "eval_loss"
    return None if role == "loss" and before in PARTIAL_WORDS else role


def find_pairs(line: bytes) -> dict[str, re.Match[bytes]]:
    """The first match of every role in a line, a single one for all names of the step."""
    found: dict[str, re.Match[bytes]] = {}
    for match in PAIR.finditer(line):
        role = role_of(match)
        if role and role not in found and not (match[3].lower() == b"train_loss" and SUMMARY in line):
            found[role] = match
    steps = [name for name in STEP if name in found]
    for name in steps[1:]:
        del found[name]
    if steps:
        found["step"] = found.pop(steps[0])
    return found


def parse_line(line: bytes) -> Reading | None:
    """What a line says, None for nothing."""
    if not INTERESTING.search(line):
        return None
    heading = KERAS_EPOCH.match(line)
    if heading:
        return Reading(epoch=float(heading[1]), heading=True)
    keras = KERAS.match(line)
    if keras and keras[1] != keras[2]:
        return None  # a mean over a part of the epoch
    found = {role: float(match[4]) for role, match in find_pairs(line).items()}
    if not found:
        return None
    rank = found.pop("rank", None)
    for name in PLACES:
        if name in found and not abs(found[name]) < LARGEST_PLACE:  # NaN, too
            del found[name]
    return Reading(rank=int(rank) if rank is not None and abs(rank) < 1e9 else None, **found)


# --- the shape that most lines of a log have, as one expression -------------------------------------------------------
SCALAR = re.compile(rb"(?<![\w.])(?:" + NUMBER + rb"|null|None)(?![\w.])")
ANY_SCALAR = rb"[-+0-9A-Za-z.]+"


class Shape(NamedTuple):
    """An expression that matches whole lines of one shape, with a group for each role, or any line as the last."""

    expression: re.Pattern[bytes]
    roles: tuple[str, ...]


def shape_of(line: bytes) -> Shape | None:
    """The shape of a line with a loss and a step or an epoch; None for a line that must be read on its own."""
    if KERAS.match(line) or SUMMARY in line or b"}," in line or not line.isascii():
        return None
    found = find_pairs(line)
    if "loss" not in found or not ({"step", "epoch"} & found.keys()):
        return None
    wanted = {match.start(4): (role, match.end(4)) for role, match in found.items()}
    parts, roles, position = [], [], 0
    for scalar in SCALAR.finditer(line):
        if scalar.start() < position:
            continue
        role, end = wanted.get(scalar.start(), (None, scalar.end()))
        parts.append(literal(line[position : scalar.start()]))
        if role:
            parts.append(b"(" + ANY_SCALAR + b")")
            roles.append(role)
        else:
            parts.append(ANY_SCALAR)
        position = end
    if len(roles) != len(wanted):
        return None
    parts.append(literal(line[position:]))
    return Shape(re.compile(rb"^(?:" + b"".join(parts) + rb"|(.+))$", re.MULTILINE), tuple(roles))


def literal(text: bytes) -> bytes:
    """An expression for the text between values; its digits may vary."""
    return re.sub(rb"\d+", rb"\\d+", re.escape(text))
