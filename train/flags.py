"""The settings of a fine-tuning run from the command line: a flag per field of Config. Standard library only."""

import argparse
from collections.abc import Sequence
from dataclasses import fields

from llmops.console import Parser, UserError, to_bool
from train.config import FAQ_DEFAULTS, Config
from train.problems import find_problems


def build_parser() -> argparse.ArgumentParser:
    """One flag per field of Config; the defaults live in the dataclass alone."""
    parser = Parser(
        prog="finetune.py", description="Fine-tune a chat model with DeepSpeed, LoRA or full.", allow_abbrev=False
    )
    for item in fields(Config):
        kind = to_bool if item.type in (bool, "bool") else item.type
        if item.name == "lr_scheduler_type":  # CONSTANT_WITH_WARMUP, as the enumeration's names are written
            kind = str.lower
        default = str(item.default).lower() if kind is to_bool else item.default
        shown = f" (default: {default})" if item.default != "" else ""
        if item.name in FAQ_DEFAULTS:
            shown = f" (default: {default}, faq: {FAQ_DEFAULTS[item.name]})"
        choices = item.metadata["choices"]
        parser.add_argument(
            f"--{item.name}",
            type=kind,
            default=argparse.SUPPRESS,  # Config and FAQ_DEFAULTS have the defaults
            metavar="true|false" if kind is to_bool else None,
            choices=list(choices()) if callable(choices) else choices,
            help=(item.metadata["help"] + shown).replace("%", "%%"),
        )
    parser.add_argument("--check", action="store_true", help="check settings, paths and data, then end")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # launchers may add it
    return parser


def parse(argv: Sequence[str]) -> tuple[Config, bool]:
    """(settings, only check them). Raises UserError that lists every problem of the settings at once."""
    options = vars(build_parser().parse_args(argv))
    options.pop("local_rank")
    only_check = options.pop("check")
    if options.get("enable_thinking") == "auto":  # as the evaluations say it
        options["enable_thinking"] = ""
    config = Config(**((FAQ_DEFAULTS if options.get("scenario") == "faq" else {}) | options))
    problems = find_problems(config)
    if problems:
        raise UserError("; ".join(problems))
    return config, only_check
