"""Chat models that are opened: tokenizer, chat format, weights on a device, adapters, answers; merging on the disk.

Every command opens models here and nowhere else. The heavy libraries are imported when something is opened.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmops import files
from llmops.console import UserError, log
from llmops.formats.chat_format import THINKING, ChatFormat
from llmops.imports import quick_imports
from llmops.loading import loading
from llmops.machine import cpu_kernels
from llmops.models.checkpoints import COPY, Checkpoint, check_files, recorded_thinking
from llmops.models.portable import TOKENIZER_FILES, make_portable

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmops.generation.generator import Generator

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MODEL_FILES = ("generation_config.json", "*.safetensors", "*.bin", "*.index.json")


class ChatModel:
    """A checkpoint that is opened. Its tokenizer and chat format are kept; weights are handed out, and not kept.

    Each part is read when it is first asked for, the tokenizer long before the weights, and what is wrong with its
    files is a UserError. `allow_special_tokens`: the text of a control token in a message becomes that token.
    `thinking`: what the template gets as `enable_thinking` and `thinking`; None: what the run that trained the model
    told it.
    """

    def __init__(
        self, checkpoint: Checkpoint, allow_special_tokens: bool = False, thinking: bool | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.allow_special_tokens = allow_special_tokens
        self.thinking = thinking

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, with a padding token."""
        return load_tokenizer(self.checkpoint)

    @cached_property
    def chat(self) -> ChatFormat:
        """How conversations are written."""
        return self.chat_with({})

    def chat_with(self, variables: Mapping[str, Any]) -> ChatFormat:
        """How conversations are written when the chat template is told `variables`."""
        family = self.checkpoint.family(bool(self.tokenizer.chat_template))
        thinking = recorded_thinking(self.checkpoint.trained) if self.thinking is None else self.thinking
        ends = self.checkpoint.end_tokens
        chat = ChatFormat(self.tokenizer, family, self.allow_special_tokens, thinking, variables, ends)
        if self.thinking is not None and not chat.knows_thinking:
            log(f"warning: enable_thinking changes nothing: {chat.name} names no variable {' or '.join(THINKING)}")
        return chat

    def weights(
        self, dtype: "torch.dtype", device: "torch.device | None" = None, attention: str | None = None
    ) -> "PreTrainedModel":
        """The causal language model of the folder, without adapters: what training begins with.

        With a GPU as `device` the weights go there one by one, and never all into the machine's memory.
        """
        return load_weights(self.checkpoint, dtype, device, attention)

    def empty(
        self, dtype: "torch.dtype", layers: int | None = None, device: "str | torch.device" = "meta"
    ) -> "PreTrainedModel":
        """A model of the checkpoint's shape with random weights; on the meta device it takes no memory.

        `layers`: that many decoder layers instead of its own number.
        """
        return build_empty(self.checkpoint, dtype, layers, device)

    def load(
        self, dtype: "torch.dtype", device: "torch.device | None" = None, merge: bool = False
    ) -> "PreTrainedModel | PeftModel":
        """The model with its adapters, in the base model's dtype; `merge`: added to its weights, as `merged` does."""
        base = self.checkpoint.base
        if base is not self.checkpoint:
            log(f"the adapter {self.checkpoint.folder} goes on {base.folder}")
        model: PreTrainedModel | PeftModel = load_weights(base, dtype, device)
        if self.checkpoint.adapter:
            warn_of_another_base(self.checkpoint.adapter, base.folder)
        for folder in self.checkpoint.adapters:
            model = put_adapter(model, folder)
        return merged(model) if merge else model

    def generator(
        self, dtype: "torch.dtype", device: "torch.device", batch_size: int, reuse_prefix: bool = True
    ) -> "Generator":
        """The model on `device`, its adapters merged, ready to answer `batch_size` prompts per pass."""
        from llmops.generation.generator import Generator
        from llmops.generation.packed import pack

        cpu_kernels.use(device, dtype)
        model: torch.nn.Module = self.load(dtype, device, merge=True)
        generator = Generator(model.to(device), self.tokenizer.pad_token_id or 0, batch_size, reuse_prefix)
        if generator.plain_because is None:
            pack(model)
        return generator

    def make_portable(self, folder: Path, ends: Sequence[int] = ()) -> None:
        """Mend the files of what was just saved in `folder`, trained or merged from this model.

        `ends`: the tokens that it learned to end an answer with.
        """
        known = self.checkpoint
        make_portable(folder, known.base.folder, known.tokenizer_folder, known.named_template, ends)

    def save_merged(
        self, target: Path, dtype: "torch.dtype", prompts: Sequence[list[int]], ends: Sequence[int] = ()
    ) -> float:
        """Merge the adapters into the base model, save it as `target`, check that the saved model answers alike.

        `ends`: the tokens that it learned to end an answer with.
        Returns the largest difference of logits over `prompts`, relative to the largest logit. No two models are in
        memory at once. The folder appears when it is complete. Raises UserError when the saved model's next tokens
        differ beyond rounding.
        """
        import shutil

        import torch

        model = self.load(dtype).eval()
        before = next_logits(model, prompts)
        staging = target.with_name(target.name + ".part")
        if staging.exists():
            shutil.rmtree(staging)
        model = merged(model)
        model.save_pretrained(staging)
        del model
        self.tokenizer.save_pretrained(staging)
        self.make_portable(staging, ends)
        for path in staging.glob("*.safetensors"):
            path.chmod(0o666 & ~files.current_umask())  # safetensors writes for the owner alone
        saved = Checkpoint(staging, trust_remote_code=self.checkpoint.trust_remote_code)
        after = next_logits(load_weights(saved, dtype).eval(), prompts)
        gaps = [(b - a).abs().max() / a.abs().max() for a, b in zip(before, after, strict=True)]
        worst = float(torch.stack(gaps).max())  # NaN where there is one
        bound = 1e-3 if dtype == torch.float32 else 5e-2
        if not worst <= bound:
            raise UserError(
                f"the merged model differs from base + adapter by {worst:.1e} (bound {bound:.0e}); it is left in "
                f"{staging}"
            )
        files.fsync_tree(staging)
        if target.exists():
            shutil.rmtree(target)
        os.rename(staging, target)
        files.fsync_entry(target.parent)
        return worst


def load_tokenizer(checkpoint: Checkpoint) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint folder, with a padding token."""
    with quick_imports():
        from transformers import AutoTokenizer

    folder, trusted = checkpoint.tokenizer_folder, checkpoint.trust_remote_code
    checkpoint.check_trust()
    check_files(folder, TOKENIZER_FILES)
    if trusted:
        with loading(f"the tokenizer's code in {folder}"):
            from llmops.legacy import patches

            patches.prepare_tokenizer(folder)
    with loading(f"the tokenizer of {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trusted, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {folder} has no end token, so answers would never end; set eos_token in its "
            f"tokenizer_config.json or {COPY}"
        )
    known = checkpoint.config.get("vocab_size")
    if tokenizer.pad_token_id is None or (isinstance(known, int) and tokenizer.pad_token_id >= known):
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def causal_class(checkpoint: Checkpoint) -> Any:
    """The Auto class for the causal model of a folder; what the folder's own classes lack is put right before."""
    with quick_imports():
        from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel  # noqa: F401

    checkpoint.check_trust()
    if not checkpoint.trust_remote_code:
        return AutoModelForCausalLM
    from llmops.legacy import patches

    with loading(f"the model's code in {checkpoint.folder}"):
        patches.prepare_model(checkpoint.folder)
    return patches.auto_model_class(checkpoint.folder)


def load_weights(
    checkpoint: Checkpoint, dtype: "torch.dtype", device: "torch.device | None" = None, attention: str | None = None
) -> "PreTrainedModel":
    """What `ChatModel.weights` says. `.bin` weights load with weights_only; nothing is fetched."""
    folder = checkpoint.folder
    auto_class = causal_class(checkpoint)
    check_files(folder, MODEL_FILES)
    with loading(f"the model in {folder}"):
        model, found = auto_class.from_pretrained(
            str(folder),
            dtype=dtype,
            trust_remote_code=checkpoint.trust_remote_code,
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


def build_empty(
    checkpoint: Checkpoint, dtype: "torch.dtype", layers: int | None, device: "str | torch.device"
) -> "PreTrainedModel":
    """What `ChatModel.empty` says."""
    import torch
    from transformers import AutoConfig

    folder, trusted = checkpoint.folder, checkpoint.trust_remote_code
    auto_class = causal_class(checkpoint)
    with loading(f"the model's configuration in {folder}"):
        settings = AutoConfig.from_pretrained(str(folder), trust_remote_code=trusted, local_files_only=True)
        if layers:
            text = settings.get_text_config()
            text.num_hidden_layers = layers
            kinds = getattr(text, "layer_types", None)
            if kinds:  # a model may have fewer layers than are asked for
                text.layer_types = [kinds[i % len(kinds)] for i in range(layers)]
    with loading(f"the model's configuration in {folder}"), torch.device(device):
        return auto_class.from_config(settings, trust_remote_code=trusted, dtype=dtype)


def warn_of_another_base(adapter: Path, base: Path) -> None:
    """Say that an adapter was trained on a folder of another name: its tensors may fit all the same."""
    settings = files.read_object(adapter / "adapter_config.json", "the adapter's settings", COPY)
    name = settings.get("base_model_name_or_path")
    if isinstance(name, str) and Path(name).name not in (base.name, files.real(base).name):
        log(
            f"warning: the adapter {adapter} was trained on {files.plain(name, 200)} and goes on {base}; where that is "
            "another model, its answers mean nothing"
        )


def put_adapter(model: "PreTrainedModel | PeftModel", folder: Path) -> "PeftModel":
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
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
        adapted = PeftModel.from_pretrained(model, str(folder), local_files_only=True, autocast_adapter_dtype=False)
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        may_be = set(get_peft_model_state_dict(adapted, save_embedding_layers=True))
        given = set(load_peft_weights(str(folder), device="cpu", local_files_only=True))
    if not hasattr(adapted, "merge_and_unload"):
        kind = files.plain(str(settings.get("peft_type")))
        raise UserError(
            f"the adapter {folder} is of the kind {kind}, which adds to the prompt and not to the weights, so it "
            "cannot be merged or answered with here; expected LoRA or another kind that changes weights"
        )
    missing, strange = wanted - given, given - wanted - may_be
    if missing or strange:
        raise UserError(
            f"the adapter {folder} does not fit its model: {len(missing)} of its tensors are missing and "
            f"{len(strange)} belong to no layer, such as {min(missing | strange)}; {cure}"
        )
    return adapted


def merged(model: "PreTrainedModel | PeftModel") -> "PreTrainedModel":
    """The model with its adapter added to its weights, for answering: half the kernels per token. No copy is made."""
    unload: Any = getattr(model, "merge_and_unload", None)
    return cast("PreTrainedModel", unload() if unload else model)


def next_logits(model: "torch.nn.Module", prompts: Sequence[list[int]]) -> "list[torch.Tensor]":
    """The logits [V] after each prompt, in fp32."""
    import torch

    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0, -1].float() for ids in prompts]
