"""Checkpoint folders: what they are, their tokenizer, their model, their adapter; loading and merging."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops import chat_formats, files
from llmops.chat_formats import ChatFormat, Family
from llmops.console import UserError, log
from llmops.loading import loading

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COPY = "copy the checkpoint again"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "chat_template.jinja",
)  # fmt: skip
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MODEL_FILES = ("generation_config.json", "*.safetensors", "*.bin", "*.index.json")
SIZES = ("hidden_size", "num_hidden_layers", "num_layers", "num_attention_heads", "vocab_size")
LENGTHS = ("max_position_embeddings", "seq_length", "model_max_length", "max_sequence_length")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and not a whole model."""
    return os.path.isfile(folder / "adapter_config.json")


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a whole model."""
    return os.path.isfile(folder / "config.json")


def base_folder(folder: Path) -> Path:
    """The base model that an adapter's adapter_config.json names; a whole model is its own base.

    When that is not there, the folder of the same name beside the adapter: a mount that moved has both.
    """
    if not is_adapter(folder):
        return folder
    path = folder / "adapter_config.json"
    name = files.read_object(path, "the adapter's settings", COPY).get("base_model_name_or_path")
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise UserError(
            f"{path}: base_model_name_or_path is {files.shown(name)}, expected the folder of the base model; write it "
            f"there or {COPY}"
        )
    base = Path(name)
    moved = files.real(folder).parent / base.name
    for candidate in (base, moved):
        if is_whole(candidate) and not is_adapter(candidate):
            return candidate
    raise UserError(
        f"the adapter {folder} was trained on {files.plain(name, 200)}, which is not there, nor is {moved}; put "
        "the base model at one of these places"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, or of an adapter's base model; what this project reads of it is checked."""
    path = base_folder(folder) / "config.json"
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


def model_length(config: dict[str, Any]) -> int | None:
    """How many positions a checkpoint was made for, by its config.json; None when that does not say."""
    lengths = [config[name] for name in LENGTHS if type(config.get(name)) is int]
    return max(lengths, default=None)


def check_trust(folder: Path, trust_remote_code: bool) -> None:
    """Code that a checkpoint ships runs only when the user says so."""
    if "auto_map" in read_config(folder) and not trust_remote_code:
        raise UserError(
            f"{folder} ships its own Python code (the .py files beside the weights), and its model and tokenizer exist "
            "nowhere else; such code runs with your rights and can read, change and send whatever you can: read it, "
            "and pass --trust_remote_code true if you trust it"
        )


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint folder, with a padding token."""
    from transformers import AutoTokenizer

    check_trust(folder, trust_remote_code)
    check_files(folder, TOKENIZER_FILES)
    if trust_remote_code:
        with loading(f"the tokenizer's code in {folder}"):
            from llmops import legacy

            legacy.prepare_tokenizer(folder)
    with loading(f"the tokenizer of {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {folder} has no end token, so answers would never end; set eos_token in its "
            f"tokenizer_config.json or {COPY}"
        )
    known = read_config(folder).get("vocab_size")
    if tokenizer.pad_token_id is None or (isinstance(known, int) and tokenizer.pad_token_id >= known):
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_chat_format(
    folder: Path, mode: str = "auto", trust_remote_code: bool = False, allow_special_tokens: bool = False
) -> tuple["PreTrainedTokenizerBase", ChatFormat]:
    """The tokenizer of a checkpoint folder and how its conversations are written.

    `allow_special_tokens`: the text of a control token in a message becomes that token.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code)
    family = choose_family(folder, mode, bool(tokenizer.chat_template))
    return tokenizer, ChatFormat(tokenizer, family, allow_special_tokens)


def check_files(folder: Path, patterns: Sequence[str]) -> None:
    """Raise UserError that names a file of a checkpoint that cannot be read, or is no JSON object where it should be.

    The libraries name none, and pass over some of them: a generation_config.json with the end tokens, for one.
    """
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if path.suffix == ".json":
            files.read_object(path, "the checkpoint's file", COPY)
        else:
            files.open_regular(path, "the checkpoint's file", COPY).close()


def choose_family(folder: Path, mode: str, has_template: bool | None = None) -> Family:
    """The family whose chat format a checkpoint folder gets; needs no tokenizer while `has_template` is not known."""
    base = base_folder(folder)
    check_files(base, ["tokenizer_config.json"])
    found = sorted([*base.glob("tokenizer_config.json"), *base.glob("tokenization_*.py")])
    text = "".join(files.read_bytes(path, "the checkpoint's file").decode("utf-8", "replace") for path in found)
    return chat_formats.choose_family(mode, read_config(folder), text, has_template)


def lora_defaults(folder: Path, mode: str = "auto") -> Sequence[str] | None:
    """LoRA layers of the mode, else of the checkpoint's family, or None for a family that is not in the table."""
    family = choose_family(folder, mode)
    if family.lora_layers:
        return family.lora_layers
    model_type = read_config(folder).get("model_type")
    return next((f.lora_layers for f in chat_formats.families().values() if model_type in f.model_types), None)


def choose_dtype(name: str) -> "torch.dtype":
    """bf16 where the device has it, otherwise fp32; or what was asked for."""
    import torch

    if name == "auto":
        real = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if real else "fp32"  # emulated, as on Turing, it is slower than fp32
    if name == "fp16" and not torch.cuda.is_available():
        raise UserError("--dtype fp16 needs a GPU; use --dtype fp32 (or bf16)")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def load_model(
    folder: Path, dtype: "torch.dtype", trust_remote_code: bool = False, attention: str | None = None,
    device: "torch.device | None" = None,
) -> "PreTrainedModel":  # fmt: skip
    """The causal language model of a checkpoint folder. `.bin` weights load with weights_only; nothing is fetched.

    With a GPU as `device` the weights go there one by one, and never all into the machine's memory.
    """
    auto_class = causal_class(folder, trust_remote_code)
    check_files(folder, MODEL_FILES)
    with loading(f"the model in {folder}"):
        model, found = auto_class.from_pretrained(
            str(folder),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attention,
            local_files_only=True,
            output_loading_info=True,
            **({"device_map": {"": device}} if device is not None and device.type != "cpu" else {}),
        )
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(trained & set(found["missing_keys"]))  # buffers (inv_freq) are computed while the model is built
    if missing:  # they would be random numbers
        raise UserError(
            f"the model in {folder} cannot be loaded: its weights lack {len(missing)} of the tensors that config.json "
            f"asks for, such as {missing[0]}; {COPY}"
        )
    strange = sorted(found["unexpected_keys"])
    if strange:
        log(f"warning: {len(strange)} tensors of {folder} belong to no part of the model, such as {strange[0]}")
    return model


def fixed_attention(model: "torch.nn.Module") -> str | None:
    """Why a model's attention cannot be replaced by ours, or None when it can.

    It must route attention through transformers' interface, with full attention in every layer.
    """
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention is not replaceable"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"it has layers of the kinds {', '.join(sorted(kinds - {'full_attention'}))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "its attention has a sliding window"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps its attention scores"
    return None


def causal_class(folder: Path, trust_remote_code: bool = False) -> Any:
    """The Auto class for the causal model of a folder; what the folder's own classes lack is put right before."""
    from transformers import AutoModelForCausalLM

    check_trust(folder, trust_remote_code)
    if not trust_remote_code:
        return AutoModelForCausalLM
    from llmops import legacy

    with loading(f"the model's code in {folder}"):
        legacy.prepare_model(folder)
    return legacy.auto_model_class(folder)


def linear_layers(model: "torch.nn.Module") -> list[str]:
    """Short names of the linear layers, without the output head; each once, in order of appearance."""
    import torch

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = [
        name.rpartition(".")[2] for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]  # fmt: skip
    return list(dict.fromkeys(names))


def choose_lora_layers(model: "torch.nn.Module", wanted: str, defaults: Sequence[str] | None) -> list[str]:
    """The LoRA layers: those asked for, else the family's, else every linear layer.

    Raises UserError for a name that fits no layer; it lists the names that exist.
    """
    existing = linear_layers(model)
    names = [name.strip() for name in wanted.split(",") if name.strip()] or list(defaults or existing)
    missing = [name for name in names if name not in existing]
    if missing:
        raise UserError(
            f"--lora_module_name: no layer is called {', '.join(missing)}; "
            f"this model's layers are {', '.join(existing)}"
        )
    return names


def load_trained(
    folder: Path, dtype: "torch.dtype", trust_remote_code: bool = False, device: "torch.device | None" = None
) -> "PreTrainedModel":
    """A whole model, or an adapter on the base model that its adapter_config.json names, in the base model's dtype."""
    if not is_adapter(folder):
        return load_model(folder, dtype, trust_remote_code, device=device)
    base = base_folder(folder)
    log(f"the adapter {folder} goes on {base}")
    return put_adapter(load_model(base, dtype, trust_remote_code, device=device), folder)


def put_adapter(model: "PreTrainedModel", folder: Path) -> "PreTrainedModel":
    """A model with an adapter on it. Raises UserError where the adapter is damaged or was made for another model."""
    import warnings

    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    check_files(folder, ["adapter_config.json", *ADAPTER_WEIGHTS])
    if not any(files.is_file(folder / name) for name in ADAPTER_WEIGHTS):
        raise UserError(f"the adapter {folder} has no weights ({' or '.join(ADAPTER_WEIGHTS)}); copy the folder again")
    settings = files.read_object(folder / "adapter_config.json", "the adapter's settings")
    if settings.get("megatron_config"):  # PEFT would import whatever module megatron_core names
        raise UserError(f"the adapter {folder} is one for Megatron (megatron_config is set), which is not known here")
    cure = f"check that it was trained on this model, or {COPY}"
    with loading(f"the adapter {folder}", cure), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # said below, as an error
        adapted = PeftModel.from_pretrained(model, str(folder), local_files_only=True, autocast_adapter_dtype=False)
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        may_be = set(get_peft_model_state_dict(adapted, save_embedding_layers=True))
        given = set(load_peft_weights(str(folder), device="cpu", local_files_only=True))
    missing, strange = wanted - given, given - wanted - may_be
    if missing or strange:
        raise UserError(
            f"the adapter {folder} does not fit its model: {len(missing)} of its tensors are missing and "
            f"{len(strange)} belong to no layer, such as {min(missing | strange)}; {cure}"
        )
    return adapted


def merged(model: "torch.nn.Module") -> "torch.nn.Module":
    """The model with its adapter added to its weights, for answering: half the kernels per token. No copy is made."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def merge_adapter(
    folder: Path, target: Path, dtype: "torch.dtype", prompts: Sequence[list[int]], trust_remote_code: bool = False
) -> float:
    """Merge the adapter in `folder` into its base model, save it as `target`, check that the saved model answers alike.

    Returns the largest difference of logits over `prompts`, relative to the largest logit. No two models are in memory
    at once. The folder appears when it is complete. Raises UserError when the saved model's next tokens differ beyond
    rounding.
    """
    import shutil

    import torch

    model = load_trained(folder, dtype, trust_remote_code).eval()
    with torch.no_grad():
        before = [model(torch.tensor([ids])).logits[0, -1].float() for ids in prompts]
    staging = target.with_name(target.name + ".part")
    if staging.exists():
        shutil.rmtree(staging)
    model = model.merge_and_unload()  # in the place of the weights; PEFT's layers are gone
    model.save_pretrained(staging)
    del model
    load_tokenizer(folder, trust_remote_code).save_pretrained(staging)
    merged = load_model(staging, dtype, trust_remote_code).eval()
    worst = 0.0
    with torch.no_grad():
        for ids, expected in zip(prompts, before, strict=True):
            found = merged(torch.tensor([ids])).logits[0, -1].float()
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    bound = 1e-3 if dtype == torch.float32 else 5e-2
    if not worst <= bound:
        raise UserError(
            f"the merged model differs from base + adapter by {worst:.1e} (bound {bound:.0e}); it is left in {staging}"
        )
    if target.exists():
        shutil.rmtree(target)
    os.rename(staging, target)
    return worst
