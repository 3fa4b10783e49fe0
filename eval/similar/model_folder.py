"""What a folder with an embedding model says about itself: sentence-transformers' layout, or a plain BERT.

Layout: sentence-transformers' modules.json, its modules' config.json, sentence_bert_config.json and
config_sentence_transformers.json. A folder without modules.json is an encoder with mean pooling, as it is there.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmops import files
from llmops.console import UserError

POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
KNOWN_MODULES = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")
ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU", "SiLU", "Sigmoid")
COPY = "copy the model folder again"
WANTED = "expected a folder with an embedding model: of sentence-transformers, or a BERT with its tokenizer"
IDENTITY = ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin", "*.py")


@dataclass(frozen=True)
class DenseLayer:
    """A linear layer after the pooling: its folder and its activation."""

    folder: Path
    activation: str


@dataclass(frozen=True)
class ModelFolder:
    """Where the transformer is and what comes after it. `max_length` 0: as the model's own config allows."""

    folder: Path
    transformer: Path
    pooling: tuple[str, ...] = ("mean",)
    dense: tuple[DenseLayer, ...] = ()
    max_length: int = 0
    lowercase: bool = False
    prompt: str = ""


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object of the folder; {} where the file is missing."""
    return files.read_object(path, "the settings", COPY) if os.path.lexists(path) else {}


def setting(values: dict[str, Any], key: str, kinds: tuple[type, ...], path: Path) -> Any:
    """A value of one of these kinds, None where it is missing or null. Raises UserError for one of another kind."""
    value = values.get(key)
    if value is None or type(value) in kinds:
        return value
    expected = " or ".join(kind.__name__ for kind in kinds)
    raise UserError(f"{path}: {key} is {files.shown(value)}, expected a JSON {expected}; {COPY}")


def read_folder(folder: Path) -> ModelFolder:
    """Look at a model folder without loading it. Raises UserError for one that gives no sentence embeddings."""
    if not files.is_folder(folder):
        raise UserError(f"the model folder {folder} does not exist; {WANTED}")
    listed = os.path.lexists(folder / "modules.json")
    found = read_modules(folder) if listed else ModelFolder(folder, folder)
    path = found.transformer / "config.json"
    config = read_settings(path)
    if not setting(config, "model_type", (str,), path):
        raise UserError(f"{found.transformer} holds no model (no config.json with a model_type); {WANTED}")
    names = [str(name) for name in setting(config, "architectures", (list,), path) or []]
    if config.get("is_encoder_decoder"):
        raise UserError(f"{folder} is an encoder-decoder ({', '.join(names) or config['model_type']}); {WANTED}")
    if not listed:
        generates = [name for name in names if name.endswith(("ForCausalLM", "LMHeadModel", "ConditionalGeneration"))]
        if generates or config.get("is_decoder"):
            raise UserError(f"{folder} is a model that generates text ({', '.join(names)}); {WANTED}")
    weights = [path for end in ("*.safetensors", "*.bin") for path in found.transformer.glob(end)]
    for path in weights:
        files.open_regular(path, "the weights' file", COPY).close()
    if not any(path.stat().st_size > 4096 or path.suffix == ".safetensors" for path in weights):
        raise UserError(f"{found.transformer} holds no weights (model.safetensors or pytorch_model.bin); {WANTED}")
    return found


def read_modules(folder: Path) -> ModelFolder:
    """The modules of a sentence-transformers folder, in order."""
    listed = list_modules(folder)
    unknown = [kind for kind, _ in listed if kind not in KNOWN_MODULES]
    if unknown or [kind for kind, _ in listed[:2]] != ["Transformer", "Pooling"]:
        found = ", ".join(kind for kind, _ in listed) or "nothing"
        raise UserError(
            f"{folder} consists of {found}; expected Transformer and Pooling, then Dense or Normalize or nothing: "
            "use another embedding model"
        )
    place = listed[0][1] / "sentence_bert_config.json"
    settings = read_settings(place)
    longest = setting(settings, "max_seq_length", (int,), place) or 0
    if longest < 0:
        raise UserError(f"{place}: max_seq_length is {longest}, expected a number of tokens; {COPY}")
    modes, prompt_stays = read_pooling(listed[1][1] / "config.json")
    prompt = read_prompt(folder / "config_sentence_transformers.json")
    if prompt and not prompt_stays:
        raise UserError(f"{folder} leaves its prompt out of the pooling, which is not known here; {WANTED}")
    return ModelFolder(
        folder, listed[0][1], modes, tuple(read_dense(path) for kind, path in listed if kind == "Dense"),
        longest, bool(setting(settings, "do_lower_case", (bool,), place)), prompt,
    )  # fmt: skip


def list_modules(folder: Path) -> list[tuple[str, Path]]:
    """(kind, folder) of every module that modules.json lists; the folders lie within the model's."""
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
        listed.append((kind.rsplit(".", 1)[-1], folder / place))
    return listed


def read_pooling(path: Path) -> tuple[tuple[str, ...], bool]:
    """(how token vectors become one, whether a prompt's tokens take part) of a Pooling module's config.json."""
    pooling = files.read_object(path, "the pooling's settings", COPY)
    mode = setting(pooling, "pooling_mode", (str, list), path)
    flags = [name for key, name in POOLINGS.items() if setting(pooling, key, (bool,), path)]
    modes = [mode] if isinstance(mode, str) else mode or flags
    if not all(isinstance(name, str) and name in POOLINGS.values() for name in modes):
        raise UserError(f"{path}: the pooling is {files.shown(modes)}, expected some of {', '.join(POOLINGS.values())}")
    if not modes:
        raise UserError(f"{path}: no pooling is chosen; expected one of {', '.join(POOLINGS)} to be true; {COPY}")
    return tuple(modes), setting(pooling, "include_prompt", (bool,), path) is not False


def read_prompt(path: Path) -> str:
    """The text that the model wants before every question; "" for none."""
    general = read_settings(path)
    name = setting(general, "default_prompt_name", (str,), path)
    prompts = setting(general, "prompts", (dict,), path) or {}
    if name is None:
        return ""
    if name not in prompts:
        raise UserError(f"{path}: default_prompt_name is {files.shown(name)}, which is none of its prompts; {COPY}")
    return setting(prompts, name, (str,), path) or ""


def read_dense(folder: Path) -> DenseLayer:
    """A Dense module's activation, when it is one that we know."""
    path = folder / "config.json"
    config = files.read_object(path, "the dense layer's settings", COPY)
    named = setting(config, "activation_function", (str,), path) or "torch.nn.modules.activation.Tanh"
    activation = named.rsplit(".", 1)[-1]
    inner = config.get("module_input_name", "sentence_embedding") == "sentence_embedding"
    if activation not in ACTIVATIONS or config.get("use_residual") or not inner:
        raise UserError(f"{folder}: a Dense layer of this kind is not known here; expected one of {ACTIVATIONS}")
    return DenseLayer(folder, activation)


def identity(model: ModelFolder, dtype: str) -> str:
    """A name for what decides the vectors: the contents of every file that may, and the precision."""
    found = sorted({path for pattern in IDENTITY for path in model.folder.rglob(pattern) if files.is_file(path)})
    if any(path.suffix == ".safetensors" for path in found):
        found = [path for path in found if path.suffix != ".bin" or path.parent != model.transformer]
    total = hashlib.sha256(dtype.encode())
    for path in found:
        with files.open_regular(path, "the model's file") as file:
            total.update(str(path.relative_to(model.folder)).encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:32]
