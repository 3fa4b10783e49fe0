"""What a saved folder needs to load in other people's software, that of 2024 (transformers 4.41, PEFT 0.11) included.

Today's libraries write files that yesterday's cannot read: a tokenizer class they do not have, merges in another form,
`rope_theta` under another name, the chat template in a file of its own, settings of LoRA that did not exist. Nothing
of it is another model, so both ways of writing stand side by side.
"""

import inspect
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmops import files
from llmops.models.checkpoints import GENERATION

VOCABULARIES = (
    "tokenizer.json", "vocab*", "merges.txt", "*.model", "*.model.v*", "*.tiktoken", "tekken.json",
)  # fmt: skip
TOKENIZER_FILES = (
    *VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
# what a folder with its own architecture needs to run, and the terms under which all of it may be used
COMPANIONS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
CODE = ("*.py",)
CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
NAMED = "additional_chat_templates"  # a folder of those for tools and others, beside TEMPLATE
NEW_CLASS, OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"  # one class under two names
BESIDE_ROPE = ("rope_theta", "partial_rotary_factor")  # inside rope_parameters, beside rope_scaling before release 5
# settings of LoRA that every release of PEFT knows; the others are written where they say something
LORA_SETTINGS = (
    "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
    "revision", "target_modules", "task_type",
)  # fmt: skip


def make_portable(
    folder: Path, base: Path, tokenizer: Path | None = None, template: str = "", ends: Sequence[int] = ()
) -> None:
    """Mend the files of a model or an adapter that was just saved in `folder`, trained from `base`.

    `tokenizer`: the folder that its tokenizer was loaded from (`base`). Its vocabulary must be the same as there.
    `template`: the chat template that it learned, where that is not the tokenizer's own. `ends`: the tokens that it
    learned to end an answer with.
    """
    copy_tokenizer(folder, tokenizer or base, template)
    if files.is_file(folder / CONFIG):
        write_config(folder, base)
        copy(base, folder, [*COMPANIONS, GENERATION])
        add_ends(folder / GENERATION, ends)
    if files.is_file(folder / "adapter_config.json"):
        write_adapter_config(folder)
    if has_code(folder):
        copy(base, folder, CODE)


def has_code(folder: Path) -> bool:
    """Whether a model or a tokenizer in `folder` is made by Python files beside it."""
    found = [folder / name for name in (CONFIG, TOKENIZER_CONFIG)]
    return any("auto_map" in files.read_object(path) for path in found if files.is_file(path))


def copy(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy the files of `source` that fit a pattern, byte for byte."""
    for path in sorted({path for pattern in patterns for path in source.glob(pattern) if files.is_file(path)}):
        shutil.copyfile(path, target / path.name)


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's vocabulary under a name that is known here."""
    return any(files.is_file(path) for pattern in VOCABULARIES for path in folder.glob(pattern))


def copy_tokenizer(folder: Path, source: Path, learned: str = "") -> None:
    """Put the tokenizer of `source` in the place of what a library wrote of it: byte for byte, where that is readable.

    The chat template stands in tokenizer_config.json and in chat_template.jinja; it is the `learned` one, else that of
    `source`, or where that has none the one that was written with the tokenizer. Several stand in tokenizer_config.json
    alone, which both releases read.
    """
    written = files.read_text(folder / TEMPLATE) if files.is_file(folder / TEMPLATE) else None
    if has_vocabulary(source):  # else it has a name that is not known here, and what was written stays
        for path in {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}:
            path.unlink()
    copy(source, folder, TOKENIZER_FILES)
    path = source / TOKENIZER_CONFIG
    settings = files.read_object(path, "the tokenizer's settings") if files.is_file(path) else {}
    mended = tokenizer_settings(settings)
    template = files.read_text(source / TEMPLATE) if files.is_file(source / TEMPLATE) else None
    if learned:
        mended["chat_template"] = learned
    template = learned or template or mended.get("chat_template") or written
    named = {} if learned else {path.stem: files.read_text(path) for path in sorted((source / NAMED).glob("*.jinja"))}
    if named and isinstance(template, str):
        several = {"default": template} | named
        mended["chat_template"] = [{"name": name, "template": text} for name, text in several.items()]
        (folder / TEMPLATE).unlink(missing_ok=True)
        if files.is_folder(folder / NAMED):
            shutil.rmtree(folder / NAMED)
    elif isinstance(template, str):
        mended.setdefault("chat_template", template)
        if learned or not files.is_file(folder / TEMPLATE):
            files.write_text(folder / TEMPLATE, template)
    if mended != settings:
        files.write_json(folder / TOKENIZER_CONFIG, mended)
    if files.is_file(source / "tokenizer.json"):
        write_old_merges(folder / "tokenizer.json")


def tokenizer_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json in words that releases 4 and 5 of transformers both read."""
    mended = dict(settings)
    if mended.get("tokenizer_class") == NEW_CLASS:
        mended["tokenizer_class"] = OLD_CLASS
        for key in ("backend", "is_local", "local_files_only"):  # how the folder was read when it was saved
            mended.pop(key, None)
    if isinstance(mended.get("extra_special_tokens"), list):  # an object, or unknown, before release 5
        mended.setdefault("additional_special_tokens", mended.pop("extra_special_tokens"))
    return mended


def write_old_merges(path: Path) -> None:
    """Merges as "a b" instead of ["a", "b"], which tokenizers before 0.20 refuse; they say the same.

    Left as it is where a piece holds a blank, which the old form cannot say.
    """
    tokenizer = files.read_object(path, "the tokenizer")
    model = tokenizer.get("model") or {}
    merges = model.get("merges") or []
    if not merges or isinstance(merges[0], str) or any(" " in piece for pair in merges for piece in pair):
        return
    model["merges"] = [" ".join(pair) for pair in merges]
    files.write_json(path, tokenizer)


def add_ends(path: Path, ends: Sequence[int]) -> None:
    """generation_config.json with `ends` beside the end tokens that it names: others know an answer's end from there.

    A base that was no chat model names the end of a text alone. Nothing is written where all of them are named.
    """
    if not files.is_file(path):
        return
    settings = files.read_object(path, "the checkpoint's file")
    named = settings.get("eos_token_id")
    known = named if isinstance(named, list) else [] if named is None else [named]
    missing = [token for token in ends if token not in known]
    if missing:
        every = [*known, *missing]
        files.write_json(path, settings | {"eos_token_id": every if len(every) > 1 else every[0]})


def write_config(folder: Path, base: Path) -> None:
    """config.json with today's and yesterday's keys, and with the keys of the base's that saving left out.

    Where the text part of a larger model was saved, the base's keys are those of that part.
    """
    saved = files.read_object(folder / CONFIG)
    original = files.read_object(base / CONFIG)
    if saved.get("model_type") != original.get("model_type") and isinstance(original.get("text_config"), dict):
        original = original["text_config"]
    for key in ("quantization_config", "_name_or_path", "dtype", "torch_dtype"):  # of the base's own weights
        original.pop(key, None)
    saved["use_cache"] = original.get("use_cache", True)  # training turned it off
    files.write_json(folder / CONFIG, both_spellings(original | saved))


def both_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """Keys of release 5 of transformers, with those of release 4 beside them."""
    config = dict(config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = both_spellings(config["text_config"])
    if isinstance(config.get("dtype"), str):
        config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # flat; layers of several kinds have no old spelling
        config |= {key: rope[key] for key in BESIDE_ROPE if key in rope}
        config["rope_scaling"] = old_scaling(rope, config.get("max_position_embeddings"))
    return config


def old_scaling(rope: dict[str, Any], length: object) -> dict[str, Any] | None:
    """`rope_scaling` of release 4; None where nothing is scaled.

    Until release 4.42 `linear` and `dynamic` had to have `type` and `factor` and no other field. So what release 5 adds
    to them is left out where it says nothing: the old name, and the model's own `length` as that before scaling.
    """
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    scaling = {key: value for key, value in rope.items() if key not in BESIDE_ROPE} | {"type": kind}
    told = {key: value for key, value in scaling.items() if key != "rope_type"}
    if told.get("original_max_position_embeddings") == length:
        told.pop("original_max_position_embeddings", None)
    if kind in ("linear", "dynamic") and set(told) == {"type", "factor"}:
        return {"type": kind, "factor": float(told["factor"])}
    return scaling


def write_adapter_config(folder: Path) -> None:
    """adapter_config.json without the settings that are at their default: an older PEFT refuses names it lacks."""
    from peft import LoraConfig

    path = folder / "adapter_config.json"
    settings = files.read_object(path)
    if settings.get("peft_type") != "LORA":
        return
    defaults = {name: given.default for name, given in inspect.signature(LoraConfig).parameters.items()}
    kept = {
        key: value for key, value in settings.items()
        if key in LORA_SETTINGS or (value and value != defaults.get(key))
    }  # fmt: skip
    kept.pop("peft_version", None)
    files.write_json(path, kept)
