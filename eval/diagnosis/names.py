"""What a name in a training log is about: a place (step, epoch), a rate, a loss and of which data.

Names are taken apart into words ("valLoss", "eval/c4_en/CrossEntropyLoss", "train-logloss"), and the words decide. A
loss whose words say neither training nor evaluation is `loss`: the line around it has the say. A part of a loss (aux
loss, loss_cls) and a record (best_val_loss) are losses of no curve.
"""

import re
from functools import lru_cache
from typing import NamedTuple

TRAIN_WORDS = ("train", "training", "trn")
VALID_WORDS = ("eval", "evaluation", "evaluating", "val", "valid", "validation", "validating", "dev", "heldout")
TEST_WORDS = ("test", "testing")
EVAL_WORDS = (*VALID_WORDS, *TEST_WORDS)
BEST_WORDS = ("best", "lowest", "min", "minimum", "improved", "saving", "saved", "save", "checkpoint")
PART_WORDS = frozenset((
    "aux", "auxiliary", "kl", "router", "balance", "balancing", "policy", "value", "z", "moe", "mtp", "reg", "box",
    "bbox", "cls", "class", "classification", "mask", "dfl", "obj", "objectness", "rpn", "giou", "iou", "generator",
    "discriminator", "gen", "disc", "adversarial", "adv", "gan", "critic", "actor", "reconstruction", "recon",
    "commitment", "vq", "perceptual", "distill", "distillation", "kd", "contrastive", "consistency",
    "regularization", "dice", "focal", "triplet", "reward", "entropy", "penalty", "style", "content", "cycle",
    "mel", "duration", "scale", "scaling", "weight",
))  # fmt: skip
LOSS_WORDS = frozenset(("loss", "xent", "logloss", "mlogloss", "nll", "crossentropy"))
# words that a loss may have and still be the loss; by them the plainest of several is found
QUALIFIERS = {"total": 0, "overall": 0, "lm": 0, "step": 0, "epoch": 1, "avg": 1, "average": 1, "ave": 1, "mean": 1}
QUALIFIERS |= dict.fromkeys((
    "mlm", "clm", "ce", "cross", "log", "main", "running", "global", "batch", "curr", "current", "cur", "smooth",
    "smoothed", "iter", "iteration", "model", "language", "modeling", "token", "tokens", "per", "sft", "supervised",
    "optim", "final", "last", "binary", "multi", "set", "data", "dataset", "micro", "macro",
), 2)  # fmt: skip
STEPS = ("global_step/max_steps", "global_step", "current_steps", "num_updates", "step", "_step", "iteration", "iter",
         "iters", "it")  # fmt: skip
PLACES = dict.fromkeys(STEPS, "step") | {"epoch": "epoch", "ep": "epoch"}
OTHERS = {"learning_rate": "lr", "lr": "lr", "base_lr": "lr", "rank": "rank"}
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


class Name(NamedTuple):
    """What a name is about.

    role: `loss`, `eval_loss`, `retention_loss`, `step`, `epoch`, `lr`, `rank`; `part` or `best` for losses of no curve
    trained: whether the name itself says that a loss is of training
    order: the lower, the plainer: of several losses or steps in a line the plainest is taken
    data: which evaluation data, such as `valid`, `test` or `valid en`
    """

    role: str
    trained: bool = False
    order: int = 0
    data: str = ""


@lru_cache(4096)
def name_of(text: str) -> Name | None:
    """What a name is about, None for nothing of ours."""
    lowered = text.strip().lower()
    place = lowered.removeprefix("train/").removeprefix("trainer/")
    if place in PLACES:
        return Name(PLACES[place], order=STEPS.index(place) if place in STEPS else 0)
    if place in OTHERS or lowered.replace(" ", "_") in OTHERS:
        return Name(OTHERS.get(place) or OTHERS[lowered.replace(" ", "_")])
    words = [word.lower() for word in WORDS.findall(text[:200])]
    if not LOSS_WORDS.intersection(words) and not {"cross", "entropy"} <= set(words):
        return None
    return loss_name(words)


def loss_name(words: list[str]) -> Name:
    """Which loss some words say."""
    if "retention" in words:
        return Name("retention_loss")
    if any(word in BEST_WORDS for word in words):
        return Name("best")
    if words[-1] == "value":  # "loss value", but a "value loss" is a part
        words = words[:-1]
    known = LOSS_WORDS | set(TRAIN_WORDS) | set(EVAL_WORDS) | QUALIFIERS.keys()
    if "cross" in words:
        known |= {"entropy"}
    rest = [word for word in words if word not in known and not word.isdigit()]
    of_eval = [word for word in words if word in EVAL_WORDS]
    of_train = any(word in TRAIN_WORDS for word in words)
    if PART_WORDS.intersection(rest) or (rest and not of_eval) or (of_eval and of_train):
        return Name("part", of_train, data="eval" if of_eval else "")
    order = sum(QUALIFIERS.get(word, 0) for word in words) + 2 * ("loss" not in words)
    if of_eval:
        return Name("eval_loss", order=order, data=data_of([*of_eval, *rest]))
    return Name("loss", of_train, order)


def data_of(words: list[str]) -> str:
    """The name of evaluation data: all words for validation are one."""
    return " ".join(dict.fromkeys("valid" if word in VALID_WORDS else word for word in words))
