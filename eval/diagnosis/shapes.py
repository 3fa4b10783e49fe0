"""Lines whose names and values do not explain themselves, a row each: what tells the shape, and what it says.

A row is looked at when its mark is in a line; the first whose expression matches has the say. Everything else is read
by log_lines.py. The shapes are as the tools print them; examples stand in tests/test_diagnosis_shapes.py.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from eval.diagnosis.log_lines import NUMBER, Reading, parse_line
from eval.diagnosis.names import VALID_WORDS

Match = re.Match[bytes]
METRIC = re.compile(rb"([A-Za-z]\w*?)(?:_(\d+))?-([\w@]+):(" + NUMBER + rb")")
NAMED_METRIC = re.compile(rb"(\w+)'s ([\w@]+): (" + NUMBER + rb")")
OF_LOSS = re.compile(rb"(?i)logloss|loss|cross_entropy|rmse|mae|mse|^l1$|^l2$|deviance|xentropy")
ANY_LOSS = re.compile(rb"(?i)(?<![\w])loss:?\s*(" + NUMBER + rb")(?![\w.])")
MMENGINE_RATE = re.compile(rb"\blr: (" + NUMBER + rb")")
LEARNING_RATE = re.compile(rb"L\.r\. (" + NUMBER + rb")")


class LineShape(NamedTuple):
    """A kind of line: bytes that are in all of them, the expression, and what a match says (None: nothing)."""

    tool: str
    mark: bytes
    expression: re.Pattern[bytes]
    read: Callable[[Match, bytes], Reading | None]


def keras(match: Match, line: bytes) -> Reading | None:
    """A progress bar's mean over a part of an epoch tells nothing, the full bar the epoch."""
    return parse_line(line) if match[1] == match[2] else None


def marian(match: Match, line: bytes) -> Reading:
    """`Ep. 1 : Up. 1000 : Sen. 100,000 : Cost 5.10 : ...`."""
    rate = LEARNING_RATE.search(line)
    return Reading(
        step=number(match[2]), epoch=number(match[1]), loss=float(match[3]), lr=float(rate[1]) if rate else None
    )


def marian_valid(match: Match, line: bytes) -> Reading:
    """`[valid] Ep. 1 : Up. 5000 : ce-mean-words : 2.31 : new best`; one kind of measure is one curve."""
    kind = match[3].decode()
    value = float(match[4])
    if kind == "perplexity":
        value = math.log(value) if value > 0 else math.nan
    return Reading(step=number(match[2]), epoch=number(match[1]), eval_loss=value, data=f"valid {kind}")


def boosting(match: Match, line: bytes) -> Reading | None:
    """XGBoost: `[0]\\ttrain-logloss:0.6\\teval-logloss:0.7`; of several evaluation sets the last, as it stops by."""
    told: dict[str, Any] = {}
    for name, _, metric, value in METRIC.findall(line):
        if OF_LOSS.search(metric):
            told["loss" if name.lower() in (b"train", b"training", b"dtrain") else "eval_loss"] = float(value)
    return Reading(step=number(match[1]), **told) if told else None


def lightgbm(match: Match, line: bytes) -> Reading | None:
    """`[10]\\ttraining's binary_logloss: 0.4\\tvalid_1's binary_logloss: 0.5`."""
    told: dict[str, Any] = {}
    for name, metric, value in NAMED_METRIC.findall(line):
        if OF_LOSS.search(metric):
            told["loss" if name.lower().startswith(b"train") else "eval_loss"] = float(value)
    return Reading(step=number(match[1]), **told) if told else None


def catboost(match: Match, line: bytes) -> Reading:
    """`10:\\tlearn: 0.61\\ttest: 0.64\\tbest: 0.64 (10)\\ttotal: ...`."""
    return Reading(step=number(match[1]), loss=float(match[2]), eval_loss=float(match[3]) if match[3] else None)


def mmengine(match: Match, line: bytes) -> Reading | None:
    """`Epoch(train) [2][ 50/120] lr: ... loss: 0.42`: iterations are counted over all epochs."""
    mode, done, length = match["mode"] or match["kind"], int(match["done"]), int(match["all"])
    told = ANY_LOSS.search(line[match.end() :])
    rate = MMENGINE_RATE.search(line)
    if not told:
        return None
    if mode in (b"val", b"test"):  # told for a part of the data, too
        return Reading(eval_loss=float(told[1]), data="valid" if mode == b"val" else "test") if done == length else None
    step = (int(match["epoch"]) - 1) * length + done if match["epoch"] else done
    epoch = step / length if match["epoch"] and length else None
    return Reading(step=step, epoch=epoch, loss=float(told[1]), lr=float(rate[1]) if rate else None)


def nemo(match: Match, line: bytes) -> Reading:
    """NeMo: `Training epoch 0, iteration 28/99 | lr: 5.6e-06 | global_step: 28 | reduced_train_loss: 2.778 | ... |
    val_loss: 2.861`; every line carries the last evaluation on."""
    told = dict(NEMO.findall(line))
    values: dict[str, Any] = {name: float(told[key]) for name, key in NEMO_NAMES.items() if key in told}
    values = {"step": number(match[1])} | values
    return Reading(**values, data="valid" if "eval_loss" in values else "", bar=True)


def llm_c(match: Match, line: bytes) -> Reading:
    """`s:100 trl:4.2 tel:4.1`: the step, the training loss, the test loss of llm.c."""
    told: dict[str, Any] = {}
    for name, value in LLM_C.findall(line):
        told["loss" if name == b"trl" else "eval_loss"] = float(value)
    return Reading(step=number(match[1]), **told)


def split_words(match: Match, line: bytes) -> Reading:
    """`250 val 3.2841`: the main log of small GPT trainers."""
    value = float(match[3])
    step = number(match[1])
    return Reading(step=step, loss=value) if match[2] == b"train" else Reading(step=step, eval_loss=value)


def perplexity(match: Match, line: bytes) -> Reading:
    """OpenNMT: `Validation perplexity: 9.97`, the exponential of the loss per token."""
    value = float(match[1])
    return Reading(eval_loss=math.log(value) if value > 0 else math.nan, data="valid")


def evaluated(match: Match, line: bytes) -> Reading:
    """A line that tools print after an evaluation only."""
    return Reading(eval_loss=float(match[1]), data="valid")


def number(text: bytes) -> float:
    """A count, with or without thousands separators."""
    return float(text.replace(b",", b"")[:18])


NEMO = re.compile(rb"\| (global_step|lr|reduced_train_loss|val_loss): (" + NUMBER + rb")(?![\w.])")
NEMO_NAMES = {"step": b"global_step", "lr": b"lr", "loss": b"reduced_train_loss", "eval_loss": b"val_loss"}
LLM_C = re.compile(rb"\b(trl|tel):(" + NUMBER + rb")(?![\w.])")
SHAPES = (
    LineShape("Keras", b"- loss: ",
        re.compile(rb"^\s*(\d+)/(\d+)\s.*?(?:\[[=>.]*\]|\xe2\x94\x81|- *\d+m?s).* - loss:"), keras),
    LineShape("Marian", b": Up. ",
        re.compile(rb"Ep\. (\d+) : Up\. (\d+) : Sen\. [\d,]+ : Cost (" + NUMBER + rb")(?![\w.])"), marian),
    LineShape("Marian", b"[valid]",
        re.compile(rb"\[valid\]\s+Ep\. (\d+) : Up\. (\d+) : (cross-entropy|ce-mean-words|perplexity) : (" + NUMBER
                   + rb")(?![\w.])"), marian_valid),
    LineShape("XGBoost", b"]", re.compile(rb"^(?:\[\d\d:\d\d:\d\d\] )?\[(\d+)\]\s+(?=[A-Za-z]\w*-[\w@]+:)"), boosting),
    LineShape("LightGBM", b"'s ", re.compile(rb"^(?:\[LightGBM\].*?)?\[(\d+)\]\s+(?=\w+'s [\w@]+: )"), lightgbm),
    LineShape("CatBoost", b"learn: ",
        re.compile(rb"^(\d+):\s+learn: (" + NUMBER + rb")(?:\s+test: (" + NUMBER + rb"))?\s"), catboost),
    LineShape("mmengine", b"/",
        re.compile(rb"(?:Epoch(?:\((?P<mode>\w+)\))?\s*\[(?P<epoch>\d{1,9})\]|Iter(?:\((?P<kind>\w+)\))?\s*)"
                   rb"\[\s*(?P<done>\d{1,12})/(?P<all>\d{1,12})\]"), mmengine),
    LineShape("NeMo", b"| reduced_train_loss: ", re.compile(rb"Training epoch \d+, iteration (\d+)/\d+ \| "), nemo),
    LineShape("llm.c", b"l:", re.compile(rb"^s(?:tep)?:(\d+)\s.*\b(?:trl|tel):"), llm_c),
    LineShape("GPT trainers", b" ", re.compile(rb"^(\d{1,12}) (train|val) (" + NUMBER + rb")\s*$"), split_words),
    LineShape("OpenNMT", b" perplexity: ",
        re.compile(rb"(?i)\b(?:" + "|".join(VALID_WORDS).encode() + rb") perplexity: (" + NUMBER + rb")(?![\w.])"),
        perplexity),
    LineShape("timm", b"* ", re.compile(rb"^\s*\* .*\bloss:?\s+(" + NUMBER + rb")(?![\w.])"), evaluated),
    LineShape("TensorFlow estimator", b"for global step",
        re.compile(rb"Saving dict for global step \d+:.*\bloss = (" + NUMBER + rb")(?![\w.])"), evaluated),
)  # fmt: skip


def shaped(line: bytes) -> tuple[bool, Reading | None]:
    """Whether a line has one of the shapes, and what it says then."""
    for shape in SHAPES:
        if shape.mark in line:
            match = shape.expression.search(line)
            if match:
                return True, shape.read(match, line)
    return False, None
