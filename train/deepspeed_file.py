"""The DeepSpeed file: what is wrong with it, and where it says otherwise than the settings. Standard library only.

DeepSpeed's documentation of these keys: https://www.deepspeed.ai/docs/config-json/
"""

from typing import Any

from llmops import files
from llmops.console import UserError
from train.config import Config

WHAT = "the DeepSpeed file"
OFFLOADS = ("offload_optimizer", "offload_param")
AUTO = "auto"  # the Trainer fills in our setting
STAGES = (0, 1, 2, 3)
DEVICES = ("none", "cpu", "nvme")
COUNTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print")
SECTIONS = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "activation_checkpointing", "aio")
SETTINGS = (  # our setting, and the key of the same meaning
    ("per_device_train_batch_size", "train_micro_batch_size_per_gpu"),
    ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    ("max_grad_norm", "gradient_clipping"),
)
GATHERING = ("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save")  # now, once
CLIPPING = 1.0  # DeepSpeed's where the key is missing
DTYPES = ("bf16", "fp16")
OWN_RATES = ("OneCycle", "LRRangeTest")  # schedulers of DeepSpeed whose learning rates are all in their params


def find_problems(config: Config) -> list[str]:
    """Everything wrong with the DeepSpeed file in force, one sentence each."""
    path = config.deepspeed_file
    try:
        found = files.read_object(path, WHAT, "mend it or leave --ds_file out")
    except UserError as error:
        return [str(error)]
    return [f"{WHAT} {path}: {problem}" for problem in shape_problems(found) or disagreements(found, config)]


def shape_problems(found: dict[str, Any]) -> list[str]:
    """Values that are not of the kind that DeepSpeed takes."""
    problems = [expected(key, found[key], "a JSON object") for key in SECTIONS if not is_object(found.get(key, {}))]
    problems += [
        expected(key, found[key], f'a whole number of at least 1, or "{AUTO}"')
        for key in COUNTS
        if key in found and not is_auto(found[key]) and not (type(found[key]) is int and found[key] >= 1)
    ]
    clipping = found.get("gradient_clipping", 0)
    if not is_auto(clipping) and not (is_number(clipping) and clipping >= 0):
        problems.append(expected("gradient_clipping", clipping, f'a number of at least 0, or "{AUTO}"'))
    if "zero_optimization" not in found:
        problems.append('zero_optimization is missing, expected such as {"stage": 2}')
    if problems:
        return problems
    return zero_problems(found["zero_optimization"]) + enabled_problems(found) + type_problems(found)


def stage(config: Config) -> str:
    """The stage of ZeRO in force as --zero_stage names it, also where it stands in a file of the user's."""
    if not config.ds_file:
        return config.zero_stage
    zero = files.read_object(config.deepspeed_file, WHAT).get("zero_optimization")
    found = zero if isinstance(zero, dict) else {}
    parts = [part for key in OFFLOADS if isinstance(part := found.get(key), dict)]
    away = any(part.get("device", "none") != "none" for part in parts)
    return f"{found.get('stage', 0)}{'_offload' if away and found.get('stage') == 3 else ''}"


def zero_problems(zero: dict[str, Any]) -> list[str]:
    """The section zero_optimization: its stage, and where it offloads to."""
    problems = []
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in STAGES:
        problems.append(expected("zero_optimization.stage", stage, "0, 1, 2 or 3"))
    for key in OFFLOADS:
        part = zero.get(key)
        if part is None:
            continue
        if not is_object(part):
            problems.append(expected(f"zero_optimization.{key}", part, "a JSON object"))
        elif part.get("device", "none") not in DEVICES:
            problems.append(expected(f"zero_optimization.{key}.device", part["device"], " or ".join(DEVICES)))
    for key, value in zero.items():
        sized = key.endswith(("_size", "_threshold", "_max_live_parameters", "_max_reuse_distance"))
        if sized and not is_auto(value) and not (is_number(value) and value >= 0):
            problems.append(expected(f"zero_optimization.{key}", value, f'a number of at least 0, or "{AUTO}"'))
    return problems


def enabled_problems(found: dict[str, Any]) -> list[str]:
    """The sections of the number formats: enabled is true, false or auto, and not in both."""
    values = {key: found.get(key, {}).get("enabled", False) for key in DTYPES}
    problems = [
        expected(f"{key}.enabled", value, f'true, false or "{AUTO}"')
        for key, value in values.items()
        if not isinstance(value, bool) and not is_auto(value)
    ]
    if all(value is True for value in values.values()):
        problems.append("bf16 and fp16 are both enabled, expected one of them at most")
    return problems


def type_problems(found: dict[str, Any]) -> list[str]:
    """The sections optimizer and scheduler: a type by name, parameters as an object."""
    problems = []
    for key in ("optimizer", "scheduler"):
        part = found.get(key)
        if part is None:
            continue
        if not isinstance(part.get("type"), str):
            problems.append(expected(f"{key}.type", part.get("type"), "a name"))
        if not is_object(part.get("params", {})):
            problems.append(expected(f"{key}.params", part["params"], "a JSON object"))
    return problems


def disagreements(found: dict[str, Any], config: Config) -> list[str]:
    """Numbers that are not those of the settings: the Trainer refuses such a file when everything is loaded.

    And weights that would not be saved: the Trainer goes on without them.
    """
    problems = []
    zero = found["zero_optimization"]
    if zero.get("stage") == 3 and config.train_type == "all" and not any(zero.get(key) is True for key in GATHERING):
        problems.append(
            f"zero_optimization.{GATHERING[0]} is not true, so stage 3 would save no weights with --train_type all; "
            "set it to true"
        )
    for setting, key in SETTINGS:
        value, ours = found.get(key, AUTO), getattr(config, setting)
        if not is_auto(value) and value != ours:
            problems.append(f'{key} is {value} and --{setting} is {ours:g}; write "{AUTO}" or pass --{setting} {value}')
    for key in DTYPES:
        value = found.get(key, {}).get("enabled", AUTO)
        if config.dtype != "auto" and not is_auto(value) and value != (config.dtype == key):
            problems.append(f'{key}.enabled is {str(value).lower()} and --dtype is {config.dtype}; write "{AUTO}"')
    return problems


def warnings(config: Config) -> list[str]:
    """Settings that the DeepSpeed file leaves out, so that DeepSpeed's own default is in force instead."""
    found = files.read_object(config.deepspeed_file, WHAT)
    told = []
    if "gradient_clipping" not in found and config.max_grad_norm != CLIPPING:
        told.append(
            f"gradient_clipping is missing, so DeepSpeed clips at {CLIPPING:g} and not at --max_grad_norm "
            f'{config.max_grad_norm:g}; write "{AUTO}"'
        )
    if config.dtype in DTYPES and config.dtype not in found:
        told.append(
            f"{config.dtype} is missing, so DeepSpeed keeps no fp32 copy of the weights and scales no loss; "
            f'write "{config.dtype}": {{"enabled": "{AUTO}"}}'
        )
    unused = unused_by_scheduler(found.get("scheduler"))
    if unused:
        told.append(
            f"its section scheduler decides how the learning rate runs, and not {', '.join(unused)}; "
            "leave the section out to use these settings"
        )
    return [f"warning: {WHAT} {config.deepspeed_file}: {sentence}" for sentence in told]


def unused_by_scheduler(section: dict[str, Any] | None) -> list[str]:
    """The flags that have no effect beside a section scheduler.

    Of its params the Trainer fills in and compares warmup_num_steps, total_num_steps and warmup_max_lr alone.
    """
    if section is None:
        return []
    warms_up = "warmup_num_steps" in section.get("params", {})
    own_rate = section["type"] in OWN_RATES
    return ["--lr_scheduler_type"] + ["--warmup_ratio"] * (not warms_up) + ["--learning_rate"] * own_rate


def expected(key: str, value: Any, wanted: str) -> str:
    """The sentence for a value of the wrong kind."""
    return f"{key} is {files.shown(value)}, expected {wanted}"


def is_auto(value: Any) -> bool:
    """Whether the Trainer fills in this value."""
    return value == AUTO


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that DeepSpeed can hold (true and false, NaN and Infinity are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 63


def is_object(value: Any) -> bool:
    """Whether a JSON value is an object."""
    return isinstance(value, dict)
