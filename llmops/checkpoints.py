"""Checkpoint folders: what they are, their tokenizer, their model, their adapter; loading and merging."""

import json
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops import chat_formats
from llmops.chat_formats import ChatFormat, Family
from llmops.console import UserError, log

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and not a whole model."""
    return (folder / "adapter_config.json").is_file()


def base_folder(folder: Path) -> Path:
    """The base model that an adapter's adapter_config.json names; a whole model is its own base.

    When that is not there, the folder of the same name beside the adapter: a mount that moved has both.
    """
    if not is_adapter(folder):
        return folder
    base = Path(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    moved = folder.resolve().parent / base.name
    for candidate in (base, moved):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(
        f"the adapter {folder} was trained on {base}, which is not there, nor is {moved}; "
        "put the base model at one of these places"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, or of an adapter's base model."""
    folder = base_folder(folder)
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / 'config.json'} is not JSON ({error}); copy the checkpoint again") from error


def model_length(config: dict[str, Any]) -> int | None:
    """How many positions a checkpoint was made for, by its config.json; None when that does not say."""
    names = ("max_position_embeddings", "seq_length", "model_max_length", "max_sequence_length")
    lengths = [config[name] for name in names if isinstance(config.get(name), int)]
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
    if trust_remote_code:
        from llmops import legacy

        legacy.prepare_tokenizer(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer of {folder} cannot be loaded ({first_line(error)})") from error
    if tokenizer.pad_token_id is None:
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


def choose_family(folder: Path, mode: str, has_template: bool | None = None) -> Family:
    """The family whose chat format a checkpoint folder gets; needs no tokenizer while `has_template` is not known."""
    base = base_folder(folder)
    files = sorted([*base.glob("tokenizer_config.json"), *base.glob("tokenization_*.py")])
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    return chat_formats.choose_family(mode, read_config(folder), text, has_template)


def lora_defaults(folder: Path, mode: str = "auto") -> Sequence[str] | None:
    """LoRA layers of the mode, else of the checkpoint's family, or None for a family that is not in the table."""
    family = choose_family(folder, mode)
    if family.lora_layers:
        return family.lora_layers
    model_type = read_config(folder).get("model_type")
    return next((f.lora_layers for f in chat_formats.FAMILIES.values() if model_type in f.model_types), None)


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
    with reading_weights(f"the model in {folder}"):
        return auto_class.from_pretrained(
            str(folder),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attention,
            local_files_only=True,
            **({"device_map": {"": device}} if device is not None and device.type != "cpu" else {}),
        )


def refused_pickle(error: pickle.UnpicklingError) -> str:
    """Why torch would not load a pickle: the code it asks for, or that it is none."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        return f"a file asks for {found[1]}, which weights do not need; nothing of it was run"
    return "a .bin file is damaged, or no weights file"


@contextmanager
def reading_weights(what: str) -> Iterator[None]:
    """Turn the errors of damaged and hostile weights into UserError. No code of a pickle runs: llmops/__init__.py."""
    from safetensors import SafetensorError

    try:
        yield
    except pickle.UnpicklingError as error:
        reason = refused_pickle(error)
        raise UserError(f"{what} cannot be loaded: {reason}; copy it again from a source you trust") from error
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):  # out of memory and such
            raise
        raise UserError(f"{what} cannot be loaded: a .bin file is damaged; copy it again") from error
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise UserError(f"{what} cannot be loaded ({first_line(error)})") from error


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
    from peft import PeftModel

    base = base_folder(folder)
    log(f"the adapter {folder} goes on {base}")
    if not any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
        raise UserError(f"the adapter {folder} has no weights ({' or '.join(ADAPTER_WEIGHTS)}); copy the folder again")
    model = load_model(base, dtype, trust_remote_code, device=device)
    with reading_weights(f"the adapter {folder}"):
        return PeftModel.from_pretrained(model, str(folder), local_files_only=True, autocast_adapter_dtype=False)


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


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for one-sentence errors."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
