"""What can be known of a folder with an embedding model without loading it: sentence-transformers' layout, or a BERT.

sentence-transformers reads the folder itself; here stands what it would find out late, badly or never.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmops import files
from llmops.console import UserError

LIBRARY = "sentence_transformers."
MODULES = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout", "LayerNorm", "CNN", "LSTM")
POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ENCODERS_OF = ("t5", "mt5", "umt5", "t5gemma", "t5gemma2")  # both halves are saved, the library takes the first
COPY = "copy the model folder again"
WANTED = "expected a folder with an embedding model: of sentence-transformers, or a BERT with its tokenizer"
IDENTITY = ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin", "*.py")


@dataclass(frozen=True)
class ModelFolder:
    """Where the model is, where its transformer, and the class that modules.json names for it; "" without that file."""

    folder: Path
    transformer: Path
    reference: str = ""


def read_folder(folder: Path, trust_remote_code: bool = False) -> ModelFolder:
    """Look at a model folder without loading it. Raises UserError for one that gives no sentence embeddings."""
    if not files.is_folder(folder):
        raise UserError(f"the model folder {folder} does not exist; {WANTED}")
    listed = os.path.lexists(folder / "modules.json")
    modules = list_modules(folder) if listed else [("", folder)]
    if listed:
        check_modules(folder, modules, trust_remote_code)
    found = ModelFolder(folder, modules[0][1], modules[0][0])
    check_transformer(found)
    for path in identifying(found):
        files.open_regular(path, "the model's file", COPY).close()
    return found


def list_modules(folder: Path) -> list[tuple[str, Path]]:
    """(class, folder) of every module that modules.json lists; the folders lie within the model's."""
    path = folder / "modules.json"
    modules = files.read_json(path, "the list of modules", COPY)
    listed = []
    for module in modules if isinstance(modules, list) else [modules]:
        kind, place = (module.get(key) if isinstance(module, dict) else None for key in ("type", "path"))
        if not isinstance(kind, str) or not isinstance(place, str) or "\0" in place:
            raise UserError(
                f'{path}: found {files.shown(module)}, expected a list of objects with the texts "type" and "path"; '
                f"{COPY}"
            )
        if not files.same_or_inside(folder / place, folder):
            raise UserError(f"{path}: the module {files.shown(place)} lies outside of the model's folder; {COPY}")
        listed.append((kind, folder / place))
    return listed


def check_modules(folder: Path, modules: list[tuple[str, Path]], trusted: bool) -> None:
    """Raise UserError for modules that are no text encoder's, and for settings that the library would misread."""
    foreign = [kind for kind, _ in modules if not kind.startswith(LIBRARY)]
    if foreign and not trusted:
        raise UserError(
            f"{folder} consists of modules with code of its own ({files.plain(foreign[0])}), which is not run; use "
            "another embedding model, or pass --trust_remote_code true if you trust that code"
        )
    kinds = [kind.rsplit(".", 1)[-1] for kind, _ in modules]
    known = foreign or (kinds[:1] == ["Transformer"] and "Pooling" in kinds and set(kinds) <= set(MODULES))
    if not kinds or not known:
        raise UserError(
            f"{folder} consists of {', '.join(kinds) or 'nothing'}; expected Transformer and Pooling, then Dense or "
            "Normalize or nothing: use another embedding model"
        )
    for pattern in ("config_*.json", "sentence_*_config.json"):
        for path in [path for place in {folder, modules[0][1]} for path in place.glob(pattern)]:
            files.read_object(path, "the settings", COPY)
    for kind, place in zip(kinds, (place for _, place in modules), strict=True):
        if kind in ("Pooling", "Dense"):
            settings = files.read_object(place / "config.json", f"the {kind} module's settings", COPY)
            check_pooling(place, settings) if kind == "Pooling" else check_activation(place, settings, trusted)


def check_pooling(folder: Path, settings: dict[str, Any]) -> None:
    """Raise UserError for a pooling that is unknown, or for none."""
    mode = settings.get("pooling_mode")
    flags = [name for key, name in POOLINGS.items() if settings.get(key) is True]
    modes = [mode] if isinstance(mode, str) else mode or flags
    if not isinstance(modes, list) or not modes or not all(name in POOLINGS.values() for name in modes):
        raise UserError(
            f"{folder}: the pooling is {files.shown(modes)}, expected some of {', '.join(POOLINGS.values())}; {COPY}"
        )


def check_activation(folder: Path, settings: dict[str, Any], trusted: bool) -> None:
    """Raise UserError for a dense layer's activation that is none of torch's: the library takes Tanh in its place."""
    named = settings.get("activation_function", "torch.nn.Tanh")
    if not (isinstance(named, str) and (named.startswith("torch.nn.") or trusted)):
        raise UserError(f"{folder}: activation_function is {files.shown(named)}, expected a class of torch.nn; {COPY}")


def check_transformer(found: ModelFolder) -> None:
    """Raise UserError for a transformer that is missing, has no weights or generates text."""
    path = found.transformer / "config.json"
    config = files.read_object(path, "the settings", COPY) if os.path.lexists(path) else {}
    kind, names = config.get("model_type"), config.get("architectures") or []
    if not kind or not isinstance(kind, str) or not isinstance(names, list):
        raise UserError(f"{found.transformer} holds no model (no config.json with a model_type); {WANTED}")
    names = [str(name) for name in names]
    if config.get("is_encoder_decoder") and not (found.reference and kind in ENCODERS_OF):
        raise UserError(f"{found.folder} is an encoder-decoder ({', '.join(names) or kind}); {WANTED}")
    generates = any(name.endswith(("ForCausalLM", "LMHeadModel", "ConditionalGeneration")) for name in names)
    if not found.reference and (generates or config.get("is_decoder")):
        raise UserError(f"{found.folder} is a model that generates text ({', '.join(names)}); {WANTED}")
    weights = [path for end in ("*.safetensors", "*.bin") for path in found.transformer.glob(end)]
    if not any(path.suffix == ".safetensors" or path.stat().st_size > 4096 for path in weights):
        raise UserError(f"{found.transformer} holds no weights (model.safetensors or pytorch_model.bin); {WANTED}")


def identifying(model: ModelFolder) -> list[Path]:
    """The files that decide what the vectors are, sorted; weights that are there twice count once."""
    found = sorted({path for pattern in IDENTITY for path in model.folder.rglob(pattern) if not path.is_dir()})
    if any(path.suffix == ".safetensors" for path in found):
        found = [path for path in found if path.suffix != ".bin" or path.parent != model.transformer]
    return found


def identity(model: ModelFolder, dtype: str) -> str:
    """A name for what decides the vectors: the contents of every file that may, and the precision."""
    total = hashlib.sha256(f"sentence-transformers {dtype}".encode())
    for path in identifying(model):
        with files.open_regular(path, "the model's file") as file:
            total.update(str(path.relative_to(model.folder)).encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:32]
