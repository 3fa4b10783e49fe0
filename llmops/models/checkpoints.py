"""Checkpoint folders: what is known of a model before torch is imported. `llmops.models.chat_model` opens them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llmops import files
from llmops.console import UserError
from llmops.formats.families import OWN, Family, choose_family, families

COPY = "copy the checkpoint again"
GENERATION = "generation_config.json"
RUN_SETTINGS = "finetune_config.json"  # of the run that trained a model, in its folder
JOB_RUN = "run"  # where the run is, in a folder that a job made a whole model of (job/publish.py)
SIZES = ("hidden_size", "num_hidden_layers", "num_layers", "num_attention_heads", "vocab_size")
LENGTHS = ("max_position_embeddings", "seq_length", "model_max_length", "max_sequence_length")


@dataclass(frozen=True)
class Checkpoint:
    """The folder of a whole model or of a PEFT adapter, and how it is used; its files are read once, when asked for.

    `mode`: whose chat format it gets, auto: its own template's, else its family's. `trust_remote_code`: whether code
    that it ships may run. `adapter`: one more adapter that goes on it. What is wrong with a file is a UserError.
    """

    folder: Path
    mode: str = OWN
    trust_remote_code: bool = False
    adapter: Path | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds a PEFT adapter and not a whole model."""
        return os.path.isfile(self.folder / "adapter_config.json")

    @property
    def is_whole(self) -> bool:
        """Whether the folder holds a whole model."""
        return os.path.isfile(self.folder / "config.json")

    @property
    def adapters(self) -> list[Path]:
        """The folders of the adapters that go on the base, in this order."""
        return [*([self.folder] if self.is_adapter else []), *([self.adapter] if self.adapter else [])]

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is: in the folder, or in the base's where an adapter came without one."""
        names = ("tokenizer_config.json", "tokenizer.json")
        alone = self.is_adapter and not any(os.path.isfile(self.folder / name) for name in names)
        return self.base.folder if alone else self.folder

    @property
    def trained(self) -> Path:
        """The folder of what was trained last: that of the one more adapter, where there is one."""
        return self.adapter or self.folder

    @cached_property
    def base(self) -> "Checkpoint":
        """The base model that an adapter's adapter_config.json names; a whole model is its own base.

        When that is not there, the folder of the same name beside the adapter: a mount that moved has both.
        """
        if not self.is_adapter:
            return self
        path = self.folder / "adapter_config.json"
        name = files.read_object(path, "the adapter's settings", COPY).get("base_model_name_or_path")
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise UserError(
                f"{path}: base_model_name_or_path is {files.shown(name)}, expected the folder of the base model; write "
                f"it there or {COPY}"
            )
        moved = files.real(self.folder).parent / Path(name).name
        for folder in (Path(name), moved):
            candidate = replace(self, folder=folder, adapter=None)
            if candidate.is_whole and not candidate.is_adapter:
                return candidate
        raise UserError(
            f"the adapter {self.folder} was trained on {files.plain(name, 200)}, which is not there, nor is {moved}; "
            "put the base model at one of these places"
        )

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, an adapter's base's; what this project reads of it is checked."""
        return self.base.config if self.is_adapter else read_config(self.folder / "config.json")

    @property
    def sizes(self) -> dict[str, Any]:
        """config.json with what it says of the text part, where the model has other parts, too."""
        text = self.config.get("text_config")
        return self.config | text if isinstance(text, dict) else self.config

    @property
    def length(self) -> int | None:
        """How many positions the model was made for, by its config.json; None when that does not say."""
        lengths = [size for size in map(self.sizes.get, LENGTHS) if type(size) is int]
        return max(lengths, default=None)

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the model has embeddings for, by its config.json; None when that does not say."""
        known = self.sizes.get("padded_vocab_size") or self.sizes.get("vocab_size")
        return known if isinstance(known, int) else None

    @property
    def end_tokens(self) -> list[int]:
        """Where the vendor ends an answer, by generation_config.json; without ids that the model does not have."""
        path = self.base.folder / GENERATION
        if not files.is_file(path):
            return []
        named = files.read_object(path, "the checkpoint's file", COPY).get("eos_token_id")
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(i) is int for i in ids):
            raise UserError(f"{path}: eos_token_id is {files.shown(named)}, expected the ids of tokens; {COPY}")
        return [i for i in ids if i >= 0 and (self.vocabulary is None or i < self.vocabulary)]

    def check_trust(self) -> None:
        """Code that a checkpoint ships runs only when the user says so."""
        if "auto_map" in self.config and not self.trust_remote_code:
            raise UserError(
                f"{self.folder} ships its own Python code (the .py files beside the weights), and its model and "
                "tokenizer exist nowhere else; such code runs with your rights and can read, change and send whatever "
                "you can: read it, and pass --trust_remote_code true if you trust it"
            )

    def family(self, has_template: bool | None = None) -> Family:
        """The family whose chat format the model gets; needs no tokenizer while `has_template` is not known."""
        base = self.base.folder
        check_files(base, ["tokenizer_config.json"])
        found = sorted([*base.glob("tokenizer_config.json"), *base.glob("tokenization_*.py")])
        text = "".join(files.read_bytes(path, "the checkpoint's file").decode("utf-8", "replace") for path in found)
        return choose_family(self.chosen_mode, self.config, text, has_template)

    @cached_property
    def chosen_mode(self) -> str:
        """`mode`; where that is auto, the one that was named when the model was trained: it learned that format."""
        told = recorded(self.trained, "mode") if self.mode == OWN else None
        return told if isinstance(told, str) and told in families() else self.mode

    @property
    def named_template(self) -> str:
        """The chat template of a mode that was named, now or when the model was trained; empty without one."""
        return "" if self.chosen_mode == OWN else families()[self.chosen_mode].chat_template

    @cached_property
    def lora_layers(self) -> Sequence[str] | None:
        """LoRA layers of the mode, else of the model's family, or None for a family that is not in the table."""
        family = self.family()
        if family.lora_layers:
            return family.lora_layers
        model_type = self.config.get("model_type")
        return next((f.lora_layers for f in families().values() if model_type in f.model_types), None)


def read_config(path: Path) -> dict[str, Any]:
    """A model's config.json, checked."""
    config = files.read_object(path, "the model's config.json", COPY)
    kind = config.get("model_type", "")
    if not isinstance(kind, str):
        raise UserError(f'{path}: model_type is {files.shown(kind)}, expected a name such as "llama"; {COPY}')
    classes = config.get("auto_map", {})
    if not isinstance(classes, dict) or not all(map(is_reference, classes.values())):
        raise UserError(f"{path}: auto_map is {files.shown(classes)}, expected names of classes; {COPY}")
    for name in (*LENGTHS, *SIZES):
        size = config.get(name)
        if isinstance(size, int) and size < 1:  # a model without layers is built without complaint
            raise UserError(f"{path}: {name} is {files.shown(size)}, expected a whole number from 1; {COPY}")
    return config


def is_reference(value: Any) -> bool:
    """Whether a value of an auto_map names a class: "file.Class", or several such (a tokenizer's, slow and fast)."""
    listed = value if isinstance(value, list) else [value]
    return bool(listed) and all(item is None or isinstance(item, str) for item in listed)


def run_settings(folder: Path) -> Path | None:
    """The settings of the run that made a folder: in it, in JOB_RUN below it, or above it (merged/, checkpoint-N/)."""
    places = (folder, folder / JOB_RUN, files.real(folder).parent)
    return next((place / RUN_SETTINGS for place in places if files.is_file(place / RUN_SETTINGS)), None)


def recorded(folder: Path, name: str) -> Any:
    """A setting of the run that made a folder; None without one."""
    path = run_settings(folder)
    return files.read_object(path, "the settings of the run").get(name) if path else None


def recorded_thinking(folder: Path) -> bool | None:
    """What the run that made a folder told the template about thinking."""
    return {"true": True, "false": False}.get(str(recorded(folder, "enable_thinking")).lower())


def check_files(folder: Path, patterns: Sequence[str]) -> None:
    """Raise UserError that names a file of a checkpoint that cannot be read, or is no JSON object where it should be.

    The libraries name none, and pass over some of them: a generation_config.json with the end tokens, for one.
    """
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if path.suffix == ".json":
            files.read_object(path, "the checkpoint's file", COPY)
        else:
            files.open_regular(path, "the checkpoint's file", COPY).close()
