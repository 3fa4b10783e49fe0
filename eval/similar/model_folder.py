"""What a folder with an embedding model says about itself: sentence-transformers' layout, or a plain BERT.

Layout: sentence-transformers' modules.json, its modules' config.json, sentence_bert_config.json and
config_sentence_transformers.json. A folder without modules.json is an encoder with mean pooling, as it is there.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the folder; {} where the file is missing."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); copy the model folder again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a JSON {type(found).__name__}, expected an object; copy the model folder again")
    return found


def read_folder(folder: Path) -> ModelFolder:
    """Look at a model folder without loading it. Raises UserError for one that gives no sentence embeddings."""
    if not folder.is_dir():
        raise UserError(f"the model folder {folder} does not exist; {WANTED}")
    found = read_modules(folder) if (folder / "modules.json").is_file() else ModelFolder(folder, folder)
    config = read_json(found.transformer / "config.json")
    if not config.get("model_type"):
        raise UserError(f"{found.transformer} holds no model (no config.json with a model_type); {WANTED}")
    names = [str(name) for name in config.get("architectures") or []]
    if config.get("is_encoder_decoder"):
        raise UserError(f"{folder} is an encoder-decoder ({', '.join(names) or config['model_type']}); {WANTED}")
    if found.transformer == folder and not (folder / "modules.json").is_file():
        generates = [name for name in names if name.endswith(("ForCausalLM", "LMHeadModel", "ConditionalGeneration"))]
        if generates or config.get("is_decoder"):
            raise UserError(f"{folder} is a model that generates text ({', '.join(names)}); {WANTED}")
    weights = [path for end in ("*.safetensors", "*.bin") for path in found.transformer.glob(end)]
    if not any(path.stat().st_size > 4096 or path.suffix == ".safetensors" for path in weights):
        raise UserError(f"{found.transformer} holds no weights (model.safetensors or pytorch_model.bin); {WANTED}")
    return found


def read_modules(folder: Path) -> ModelFolder:
    """The modules of a sentence-transformers folder, in order."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        listed = [(str(module["type"]).rsplit(".", 1)[-1], folder / module["path"]) for module in modules]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}/modules.json cannot be read ({error!r}); copy the model folder again") from error
    unknown = [kind for kind, _ in listed if kind not in KNOWN_MODULES]
    if unknown or [kind for kind, _ in listed[:2]] != ["Transformer", "Pooling"]:
        found = ", ".join(kind for kind, _ in listed) or "nothing"
        raise UserError(
            f"{folder} consists of {found}; expected Transformer and Pooling, then Dense or Normalize or nothing: "
            "use another embedding model"
        )
    pooling = read_json(listed[1][1] / "config.json")
    mode = pooling.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else mode or [name for key, name in POOLINGS.items() if pooling.get(key)]
    settings = read_json(listed[0][1] / "sentence_bert_config.json")
    general = read_json(folder / "config_sentence_transformers.json")
    prompt = (general.get("prompts") or {}).get(general.get("default_prompt_name")) or ""
    if not set(modes) <= set(POOLINGS.values()) or (prompt and pooling.get("include_prompt") is False):
        raise UserError(f"{folder} pools by {modes} or leaves out a prompt; expected one of {list(POOLINGS.values())}")
    return ModelFolder(
        folder, listed[0][1], tuple(modes) or ("mean",),
        tuple(read_dense(path) for kind, path in listed if kind == "Dense"),
        int(settings.get("max_seq_length") or 0), bool(settings.get("do_lower_case")), prompt,
    )  # fmt: skip


def read_dense(folder: Path) -> DenseLayer:
    """A Dense module's activation, when it is one that we know."""
    config = read_json(folder / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    inner = config.get("module_input_name", "sentence_embedding") == "sentence_embedding"
    if activation not in ACTIVATIONS or config.get("use_residual") or not inner:
        raise UserError(f"{folder}: a Dense layer of this kind is not known here; expected one of {ACTIVATIONS}")
    return DenseLayer(folder, activation)


def identity(model: ModelFolder, dtype: str) -> str:
    """A name for what decides the vectors: the contents of every file that may, and the precision."""
    files = sorted({path for pattern in IDENTITY for path in model.folder.rglob(pattern) if path.is_file()})
    if any(path.suffix == ".safetensors" for path in files):
        files = [path for path in files if path.suffix != ".bin" or path.parent != model.transformer]
    total = hashlib.sha256(dtype.encode())
    for path in files:
        with open(path, "rb") as file:
            total.update(str(path.relative_to(model.folder)).encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:32]
