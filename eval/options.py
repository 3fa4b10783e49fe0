"""additional_parameters of the five dimensions: every key with its default, read from JSON and checked."""

import argparse
import json
from dataclasses import dataclass
from typing import Any

from llmops import files, json_text
from llmops.console import UserError, to_bool
from llmops.formats.families import families
from llmops.machine import cpu_kernels


@dataclass(frozen=True)
class Options:
    """additional_parameters: every key with its default. "" and 0 mean "choose for me"."""

    max_seq_len: int = 0
    batch_size: int = 0
    num_fewshot: int = 0
    limit: int = 0
    seed: int = 0
    gpu_id: int = 0
    data_dir: str = ""
    output_path: str = ""
    adapter: str = ""
    trust_remote_code: bool = False
    chat_template: bool = True
    enable_thinking: str = "auto"
    mode: str = "auto"
    dtype: str = "auto"
    cpu_kernels: str = "auto"
    reuse_prefix: bool = True
    compare_with: tuple[str, ...] = ()
    export_official: bool = False


THINKING = ("auto", "true", "false")
EXAMPLES = {"max_seq_len": 512, "enable_thinking": "false"}  # where the default is no example of what one gives
HELP = """additional_parameters (JSON object), with their defaults:
  max_seq_len 0          tokens of prompt and answer together; longer prompts are cut, and diagnosis says so;
                         0: what the data needs, up to what the model can
  batch_size 0           prompts at once, 0: what memory holds; halved when it runs out; scores do not depend on it
  num_fewshot 0          solved examples before each question
  limit 0                evaluate so many samples per dimension, drawn with the seed; 0: all
  seed 0                 of the draw, the examples and the bootstrap
  gpu_id 0               number of the GPU; -1: CPU; without any GPU 0 is the CPU too
  data_dir               folder with the benchmarks' files; else mnt/datasets/eval, else the samples shipped here
  output_path            folder for eval_results.json, the answers and the radar chart; else nothing is written
  adapter                an adapter's folder, put on the model
  trust_remote_code false   run Python code that the checkpoint's folder ships
  chat_template true     false: ask in plain text, for base models
  enable_thinking auto   what a thinking model's chat template is told: true or false; auto: as in its training
  mode auto              chat format, as --mode of chat_main.sh
  dtype auto             bf16 where the GPU has it; or bf16, fp16, fp32
  cpu_kernels auto       float32 products by oneDNN where they are as exact as torch's and faster; or default
  reuse_prefix true      compute what prompts share once
  compare_with           list of eval_results.json of other models to draw in the same radar chart
  export_official false  write the answers as CMRC2018's script and CLUE's submission want them, into
                         output_path/official
Exit codes: 0 done, 1 stopped on the way, 2 something you can mend (one sentence on stderr, stdout empty),
130 and 143 ended by Ctrl-C and SIGTERM. With 1, 130 and 143 stdout has the dimensions that were finished."""


def read_options(text: str) -> Options:
    """The options of `{"additional_parameters": {...}}`, or of the inner object by itself."""
    if not text.strip():
        return Options()
    found = read_json_argument(text, dict, '{"additional_parameters": {"max_seq_len": 512}}')
    if "additional_parameters" in found:
        others = [key for key in found if key != "additional_parameters"]
        if others:
            raise UserError(f"unknown key {others[0]!r} beside additional_parameters; put it inside")
        found = found["additional_parameters"]
        if not isinstance(found, dict):
            raise UserError('additional_parameters is no object; expected {"max_seq_len": 512, ...}')
    defaults = vars(Options())
    unknown = [key for key in found if key not in defaults]
    if unknown:
        raise UserError(f"additional_parameters: unknown key {unknown[0]!r}; expected some of {', '.join(defaults)}")
    options = Options(**{key: as_kind(key, value, defaults[key]) for key, value in found.items()})
    if options.enable_thinking not in THINKING:
        raise UserError(
            f"additional_parameters: enable_thinking {options.enable_thinking!r}, expected auto, true or false"
        )
    if min(options.limit, options.num_fewshot, options.seed) < 0:
        raise UserError("additional_parameters: limit, num_fewshot and seed must be 0 or more")
    if options.max_seq_len < 0:
        raise UserError(f"additional_parameters: max_seq_len is {options.max_seq_len}, expected 0 or more")
    if options.mode not in families():
        raise UserError(f"additional_parameters: mode {options.mode!r}, expected one of {', '.join(families())}")
    if options.cpu_kernels not in cpu_kernels.SETTINGS:
        raise UserError(f"additional_parameters: cpu_kernels {options.cpu_kernels!r}, expected auto or default")
    if options.dtype not in ("auto", "bf16", "fp16", "fp32"):
        raise UserError(f"additional_parameters: dtype {options.dtype!r}, expected auto, bf16, fp16 or fp32")
    return options


def read_json_argument(text: str, kind: type, example: str) -> Any:
    """A JSON argument of the kind that is expected."""
    try:
        found = json_text.parse_json(text)
    except json_text.BadJson as error:
        raise UserError(f"{files.shown(text)} is not JSON ({error}); expected for example {example}") from error
    if not isinstance(found, kind):
        raise UserError(f"found a JSON {type(found).__name__} ({text[:60]}), expected for example {example}")
    return found


def as_kind(key: str, value: Any, default: Any) -> Any:
    """A value of the kind its default has; on and off, true and false as text are switches too."""
    like = json.dumps(EXAMPLES.get(key, default))
    wrong = UserError(f"additional_parameters: {key} is {files.shown(value)}, expected a value like {like}")
    if isinstance(default, tuple):
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            raise wrong
        return tuple(listed)
    if key == "enable_thinking" and isinstance(value, bool):
        return json.dumps(value)
    if isinstance(default, bool) and isinstance(value, str):
        try:
            return to_bool({"on": "true", "off": "false"}.get(value.lower(), value))
        except argparse.ArgumentTypeError as error:
            raise wrong from error
    if isinstance(default, bool) != isinstance(value, bool) or not isinstance(value, type(default)):
        if isinstance(default, int) and not isinstance(default, bool) and isinstance(value, str) and is_whole(value):
            return int(value)
        raise wrong
    return value


def is_whole(text: str) -> bool:
    """Whether a text is a whole number."""
    return text.strip().removeprefix("-").isdecimal()
