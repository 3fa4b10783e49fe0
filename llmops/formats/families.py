"""Model families: one file of TEMPLATES each says how its models are told a conversation, and which mode fits whom.

Sources of the formats: the vendors' own demos and fine-tuning code.
"""

from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from llmops import files
from llmops.console import UserError
from llmops.formats.layouts import LAYOUTS

TEMPLATES = Path(__file__).with_name("templates")
OWN = "auto"  # the mode of the checkpoint's own chat template
GENERATION = ("max_new_tokens", "batch_size")  # keys of a family's `generation`
LAID_OVER = ("faq", "faq_en", "generation")  # keys of auto.json that every mode has, too


@dataclass(frozen=True)
class Family:
    """How one model family writes conversations, which layers its LoRA adapts, how its FAQ prompts are worded.

    One file of TEMPLATES, named after the `--mode`. `chat_template` is a Jinja template, or `layout` names the function
    of `layouts` that turns messages into pieces; with neither, the checkpoint's own template is used. `model_types` are
    the config.json model_type values that fit; `config_has` keys of config.json, `tokenizer_has` and `tokenizer_lacks`
    texts in the checkpoint's tokenizer files narrow them. `one_sample_per_answer`: the prompt is not causal. `stop`:
    tokens that end an answer, beside the end token.
    `faq`, `faq_en` (where English differs) and `generation` are laid over those of `auto`.
    """

    name: str
    about: str = ""
    model_types: tuple[str, ...] = ()
    config_has: tuple[str, ...] = ()
    tokenizer_has: str = ""
    tokenizer_lacks: str = ""
    chat_template: str = ""
    layout: str = ""
    stop: tuple[str, ...] = ()
    one_sample_per_answer: bool = False
    lora_layers: tuple[str, ...] = ()
    faq: dict[str, str] = field(default_factory=dict)
    faq_en: dict[str, str] = field(default_factory=dict)
    generation: dict[str, int] = field(default_factory=dict)

    def misfit(self, config: dict[str, Any], tokenizer_text: str) -> str | None:
        """What of a checkpoint speaks against this family, or None."""
        model_type = config.get("model_type", "")
        unnamed = not model_type and self.config_has  # the first ChatGLM2 has no model_type: its other keys tell it
        if self.model_types and model_type not in self.model_types and not unnamed:
            return f"is for model_type {' or '.join(self.model_types)}, the checkpoint is {model_type!r}"
        missing = [key for key in self.config_has if key not in config]
        if missing:
            return f"is for checkpoints with {', '.join(missing)} in config.json, which this one lacks"
        if self.tokenizer_has and self.tokenizer_has not in tokenizer_text:
            return f"is for tokenizers with {self.tokenizer_has}, which this checkpoint's lacks"
        if self.tokenizer_lacks and self.tokenizer_lacks in tokenizer_text:
            return f"is for tokenizers without {self.tokenizer_lacks}, which this checkpoint's has"
        return None


def read_families(folder: Path) -> dict[str, Family]:
    """The families by mode, `auto` first. Raises UserError for a file that does not describe one."""
    paths = sorted(folder.glob("*.json"), key=lambda path: (path.stem != "auto", path.stem))
    described = {path.stem: read_family(path) for path in paths}
    if "auto" not in described:
        raise UserError(f"{folder} has no auto.json, whose wording every mode is laid over; copy the project again")
    families = {}
    for name, values in described.items():
        both = {key: described["auto"].get(key, {}) | values.get(key, {}) for key in LAID_OVER}
        own = values.get("faq", {}) if name != "auto" else {}  # the wording of a file is for every language
        both["faq_en"] = {k: v for k, v in both["faq_en"].items() if k not in own or k in values.get("faq_en", {})}
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        families[name] = Family(name, **(plain | both))
        missing = [key for key in GENERATION if key not in families[name].generation]
        if missing:
            raise UserError(f"{folder / 'auto.json'}: generation has no {missing[0]}; copy the project again")
    return families


def read_family(path: Path) -> dict[str, Any]:
    """What one file of TEMPLATES says, every key checked. Raises UserError that names the file and the key."""
    found = files.read_object(path, "the template file", "mend it or copy the project again")
    known = {item.name: item for item in fields(Family) if item.name != "name"}
    for key, value in found.items():
        if key not in known:
            raise UserError(f"{path}: unknown key {files.plain(key)}; expected some of {', '.join(known)}")
        default = known[key].default
        if key in ("faq", "faq_en"):
            good, expected = is_texts_by_name(value), "an object of texts"
        elif key == "generation":
            good, expected = is_counts(value), f"an object of whole numbers from 1 under {', '.join(GENERATION)}"
        elif isinstance(default, tuple):
            good, expected = isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of texts"
        else:
            good, expected = type(value) is type(default), "true or false" if default is False else "a text"
        if not good:
            raise UserError(f"{path}: {key} is {files.shown(value)}, expected {expected}")
    if path.stem != "auto" and not any(found.get(key) for key in ("model_types", "chat_template", "layout")):
        raise UserError(f"{path}: expected model_types, chat_template or layout to say something, found none of them")
    if found.get("layout", "") not in ("", *LAYOUTS):
        raise UserError(f"{path}: unknown layout {files.shown(found['layout'])}; expected {', '.join(LAYOUTS)}")
    return found


def is_texts_by_name(value: Any) -> bool:
    """Whether a value is an object of texts."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def is_counts(value: Any) -> bool:
    """Whether a value is what `generation` may be."""
    return isinstance(value, dict) and all(k in GENERATION and type(n) is int and n > 0 for k, n in value.items())


@cache
def families() -> dict[str, Family]:
    """The families of TEMPLATES by mode, read when they are first asked for. Raises UserError for a damaged file."""
    return read_families(TEMPLATES)


def modes_text() -> str:
    """Every mode, for people."""
    return ", ".join(families())


def choose_family(mode: str, config: dict[str, Any], tokenizer_text: str, has_template: bool | None) -> Family:
    """The family of a checkpoint; that of the mode OWN for its own template.

    `config` is config.json, `tokenizer_text` what the tokenizer's files say; `has_template` None: not known yet.
    Raises UserError for a mode that does not fit or an `auto` that finds nothing.
    """
    known = families()
    if mode not in known:
        raise UserError(f"unknown mode {mode!r}; expected one of {modes_text()} (a file of {TEMPLATES})")
    if mode != OWN:
        misfit = known[mode].misfit(config, tokenizer_text)
        if misfit:
            raise UserError(f"--mode {mode} {misfit}; pass --mode auto or the mode that fits")
        return known[mode]
    if has_template is not False:
        return known[OWN]
    for family in known.values():
        if family.model_types and not family.misfit(config, tokenizer_text):
            return family
    raise UserError(
        f"the checkpoint (model_type {config.get('model_type', '')!r}) has no chat template and is of no family with a "
        f"known format ({modes_text()}); put a chat_template.jinja with its format into the checkpoint's folder"
    )
