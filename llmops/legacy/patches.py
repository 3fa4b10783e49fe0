"""What old remote-code checkpoints (ChatGLM 1, 2, 3, Baichuan2) need under current transformers.

The classes that a checkpoint ships are patched in place, before `from_pretrained` runs them. Each patch is a function
named after the symptom that it cures; it looks at what a class lacks, not at its name or version, and returns whether
it was needed. Patching and not subclassing: transformers saves the file of an object's class beside the weights, and
that must stay the vendor's file. Nothing here touches a class of transformers itself.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_class_from_dynamic_module

from llmops import files
from llmops.console import UserError
from llmops.legacy.alibi import (
    alibi_buffer_of_every_position,
    weight_changed_by_evaluating,
)
from llmops.legacy.building import (
    buffers_left_uninitialised,
    dtype_unknown_to_old_releases,
    half_precision_hard_coded,
    head_no_longer_tied,
    loss_not_divided,
    max_length_read_while_building,
    names_of_today_missing,
    output_layer_not_found,
    post_init_never_called,
    rotary_angles_in_bfloat16,
    settings_wrapped_in_a_tuple,
    tables_that_are_no_buffers,
    weights_built_twice,
)
from llmops.legacy.running import (
    cache_is_a_tuple,
    generate_is_gone,
    logits_at_every_position,
    nothing_is_recomputed,
    streaming_asks_for_what_is_gone,
)
from llmops.legacy.tokenizers import (
    batches_only_by_calling,
    end_token_without_a_name,
    ids_beyond_the_vocabulary,
    ids_without_a_name,
    padding_side_not_accepted,
    prompt_ended_twice,
    setting_given_twice,
    settings_not_saved,
    special_tokens_before_vocabulary,
    vocabulary_file_forgotten,
)
from llmops.legacy.two_positions import (
    masks_only_in_four_dimensions,
)

Patch = Callable[[type[Any]], bool]
CURED = "_llmops_cured"
MODEL_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")
TOKENIZER_PATCHES: tuple[Patch, ...] = (
    special_tokens_before_vocabulary,
    padding_side_not_accepted,
    end_token_without_a_name,
    ids_without_a_name,
    ids_beyond_the_vocabulary,
    settings_not_saved,
    vocabulary_file_forgotten,
    batches_only_by_calling,
    prompt_ended_twice,
    setting_given_twice,
)
CONFIG_PATCHES: tuple[Patch, ...] = (
    names_of_today_missing,
    settings_wrapped_in_a_tuple,
    dtype_unknown_to_old_releases,
)
MODEL_PATCHES: tuple[Patch, ...] = (
    generate_is_gone,
    weights_built_twice,
    max_length_read_while_building,
    half_precision_hard_coded,
    head_no_longer_tied,
    output_layer_not_found,
    post_init_never_called,
    buffers_left_uninitialised,
    tables_that_are_no_buffers,
    rotary_angles_in_bfloat16,
    loss_not_divided,
    alibi_buffer_of_every_position,
    weight_changed_by_evaluating,
    logits_at_every_position,
    nothing_is_recomputed,
    cache_is_a_tuple,
    streaming_asks_for_what_is_gone,
    masks_only_in_four_dimensions,
)


def auto_map(folder: Path, file: str = "config.json") -> dict[str, Any]:
    """Which of the folder's own classes serve which Auto class; empty for a native checkpoint."""
    path = folder / file
    if not files.is_file(path):
        return {}
    found = files.read_object(path, "the checkpoint's settings", "copy the checkpoint again").get("auto_map", {})
    if not isinstance(found, dict):
        raise UserError(f"{path}: auto_map is {files.shown(found)}, expected an object; copy the checkpoint again")
    return found


def auto_model_class(folder: Path) -> Any:
    """The Auto class that loads a causal model from this folder; the earliest checkpoints name it a Seq2Seq one."""
    import transformers

    names = auto_map(folder)
    return getattr(transformers, next((name for name in MODEL_CLASSES if name in names), MODEL_CLASSES[0]))


def prepare_tokenizer(folder: Path) -> tuple[str, ...]:
    """Patch the tokenizer class that a folder ships; the names of the symptoms that it had."""
    reference = auto_map(folder, "tokenizer_config.json").get("AutoTokenizer") or auto_map(folder).get("AutoTokenizer")
    if isinstance(reference, (list, tuple)):
        reference = reference[0]
    return cure(load_class(reference, folder), TOKENIZER_PATCHES) if reference else ()


def prepare_model(folder: Path) -> tuple[str, ...]:
    """Patch the configuration and model classes that a folder ships; the names of the symptoms that they had."""
    names = auto_map(folder)
    reference = next((names[name] for name in MODEL_CLASSES if name in names), None)
    cured: tuple[str, ...] = ()
    if "AutoConfig" in names:
        cured += cure(load_class(names["AutoConfig"], folder), CONFIG_PATCHES)
    if reference:
        cured += cure(load_class(reference, folder), MODEL_PATCHES)
    return cured


def load_class(reference: str, folder: Path) -> type:
    """The class that an auto_map entry names; transformers keeps it, so from_pretrained gets the same one."""
    return get_class_from_dynamic_module(reference, str(folder), local_files_only=True)


def cure(cls: type[Any], patches: tuple[Patch, ...]) -> tuple[str, ...]:
    """Apply the patches that a class needs, once; their names."""
    if CURED not in cls.__dict__:
        setattr(cls, CURED, tuple(patch.__name__ for patch in patches if patch(cls)))
    return getattr(cls, CURED)
