"""What old remote-code checkpoints (ChatGLM 1, 2, 3, Baichuan2) need under current transformers.

The classes that a checkpoint ships are patched in place, before `from_pretrained` runs them. Each patch is a function
named after the symptom that it cures; it looks at what a class lacks, not at its name or version, and returns whether
it was needed. Patching and not subclassing: transformers saves the file of an object's class beside the weights, and
that must stay the vendor's file. Nothing here touches a class of transformers itself.
"""

import dis
import functools
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.dynamic_module_utils import get_class_from_dynamic_module

Patch = Callable[[type], bool]
CURED = "_llmops_cured"
MODEL_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


def auto_map(folder: Path, file: str = "config.json") -> dict[str, Any]:
    """Which of the folder's own classes serve which Auto class; empty for a native checkpoint."""
    path = folder / file
    return json.loads(path.read_text(encoding="utf-8")).get("auto_map", {}) if path.is_file() else {}


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


def cure(cls: type, patches: tuple[Patch, ...]) -> tuple[str, ...]:
    """Apply the patches that a class needs, once; their names."""
    if CURED not in cls.__dict__:
        setattr(cls, CURED, tuple(patch.__name__ for patch in patches if patch(cls)))
    return getattr(cls, CURED)


# --- looking at a class ----------------------------------------------------------------------------------------------


def parameters_of(function: Callable[..., Any]) -> list[str]:
    """Names of a function's parameters."""
    return list(inspect.signature(function).parameters)


def names_used(function: Any) -> set[str]:
    """Global and attribute names that a function's own code refers to."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set(code.co_names) if code else set()


def is_own(cls: type) -> bool:
    """Whether a class comes from the checkpoint's files and not from a library."""
    return not cls.__module__.startswith(("transformers.", "torch.", "builtins"))


def own_modules(cls: type) -> list[Any]:
    """The files that a model class and its bases stand in."""
    return [sys.modules[name] for name in dict.fromkeys(c.__module__ for c in cls.__mro__ if is_own(c))]


def own_classes(cls: type) -> list[type]:
    """Every class defined in these files."""
    files = own_modules(cls)
    names = {module.__name__ for module in files}
    found = (c for module in files for c in vars(module).values() if isinstance(c, type) and c.__module__ in names)
    return list(dict.fromkeys(found))


def own_definition(cls: type, name: str) -> type | None:
    """The class, among those of the checkpoint's file, from which `cls` has the attribute; None if it has it not so."""
    return next((c for c in cls.__mro__ if name in c.__dict__ and is_own(c)), None)


def classes_built_by(cls: type) -> list[type]:
    """The class, the models that its `__init__` makes, and every plain module class of the file."""
    used = names_used(cls.__init__)  # type: ignore[misc]
    return [c for c in own_classes(cls) if c is cls or c.__name__ in used or not issubclass(c, PreTrainedModel)]


def own_base(cls: type) -> type:
    """The deepest model class of the checkpoint's file that all its models share."""
    return [c for c in cls.__mro__ if issubclass(c, PreTrainedModel) and is_own(c)][-1]


def after_init(cls: type, action: Callable[[Any], None]) -> None:
    """Run an action on every object of a class once it is built."""
    build = cls.__init__  # type: ignore[misc]

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        build(self, *args, **kwargs)
        action(self)

    cls.__init__ = __init__  # type: ignore[misc]


def around_forward(cls: type, around: Callable[[Any, dict[str, Any], Callable[..., Any]], Any]) -> None:
    """Let `around(self, arguments by name, the forward so far)` stand for a class's forward."""
    inner = cls.forward  # type: ignore[attr-defined]
    names = parameters_of(inner)[1:]

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args, strict=False))
        return around(self, kwargs, functools.partial(inner, self))

    cls.forward = forward  # type: ignore[attr-defined]


# --- tokenizers ------------------------------------------------------------------------------------------------------


def special_tokens_before_vocabulary(cls: Any) -> bool:
    """The tokenizer does not load, or its special tokens get wrong ids.

    transformers 5 registers special tokens inside the base class's `__init__`; old classes read their vocabulary
    only after it. What cannot be registered yet is registered when the object is complete.
    """
    add = cls._add_tokens

    @functools.wraps(add)
    def _add_tokens(self: Any, new_tokens: Any, special_tokens: bool = False) -> int:
        if self.__dict__.get("_llmops_building") and not has_vocabulary(self):
            return 0
        return add(self, new_tokens, special_tokens=special_tokens)

    build = cls.__init__

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        self._llmops_building = True
        build(self, *args, **kwargs)
        self._llmops_building = False
        known = self._added_tokens_encoder
        add(self, [token for token in self.all_special_tokens if token not in known], special_tokens=True)

    if not reads_vocabulary_late(cls):
        return False
    cls._add_tokens, cls.__init__ = _add_tokens, __init__
    return True


def reads_vocabulary_late(cls: Any) -> bool:
    """Whether a class's `__init__` calls the base class before it sets what its `vocab_size` reads."""
    if not isinstance(getattr(cls, "vocab_size", None), property):
        return False
    lines = inspect.getsource(inspect.unwrap(cls.__init__))
    base = re.search(r"super\(.*?\)\.__init__\(", lines)
    places = [lines.find(f"self.{name} =") for name in names_used(cls.vocab_size.fget)]
    return base is not None and any(place > base.start() for place in places)


def has_vocabulary(tokenizer: Any) -> bool:
    """Whether the object is so far built that it can tell its vocabulary's size."""
    try:
        return type(tokenizer).vocab_size.fget(tokenizer) >= 0
    except AttributeError:
        return False


def padding_side_not_accepted(cls: Any) -> bool:
    """`_pad() got an unexpected keyword argument 'padding_side'`: these classes pad on the left and nowhere else."""
    pad = cls._pad
    if "padding_side" in parameters_of(pad):
        return False

    @functools.wraps(pad)
    def _pad(self: Any, *args: Any, padding_side: str | None = None, **kwargs: Any) -> Any:
        return pad(self, *args, **kwargs)

    cls._pad = _pad
    return True


def ids_without_a_name(cls: Any) -> bool:
    """A token added later gets an id that is taken, because `get_vocab` calls several ids by the same empty name.

    The special tokens' ids get the names of the tokens, the other nameless ids a name that no text contains.
    """
    if own_definition(cls, "get_vocab") is None or own_definition(cls, "get_command") is None:
        return False
    get = cls.get_vocab

    @functools.wraps(get)
    def get_vocab(self: Any) -> dict[str, int]:
        vocabulary = get(self)
        if len(vocabulary) < self.vocab_size or "" in vocabulary:
            vocabulary.pop("", None)
            taken = set(vocabulary.values())
            for name in ("unk", "eos", "bos", "pad"):
                token, index = getattr(self, f"{name}_token"), getattr(self, f"{name}_token_id")
                if token and index is not None and index not in taken:
                    vocabulary[str(token)] = index
                    taken.add(index)
            vocabulary.update({f"<|unnamed_{i}|>": i for i in range(self.vocab_size) if i not in taken})
        return vocabulary

    cls.get_vocab = get_vocab
    return True


def saved_without_bos_setting(cls: Any) -> bool:
    """A saved and reloaded tokenizer puts a bos before every text: save_pretrained leaves out add_bos_token."""
    names = {"add_bos_token", "add_eos_token"} & set(parameters_of(cls.__init__))
    if not names:
        return False
    save = cls.save_pretrained

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        files = save(self, save_directory, *args, **kwargs)
        path = Path(save_directory) / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.update({name: getattr(self, name) for name in sorted(names)})
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return files

    cls.save_pretrained = save_pretrained
    return True


TOKENIZER_PATCHES: tuple[Patch, ...] = (
    special_tokens_before_vocabulary,
    padding_side_not_accepted,
    ids_without_a_name,
    saved_without_bos_setting,
)


# --- configurations --------------------------------------------------------------------------------------------------


def names_of_today_missing(cls: Any) -> bool:
    """`no attribute num_hidden_layers`, `no attribute use_cache`: the library expects names that old classes lack."""
    wanted = parameters_of(cls.__init__)
    renamed = {"num_hidden_layers": "num_layers", "max_position_embeddings": "seq_length"}
    renamed = {new: old for new, old in renamed.items() if new not in wanted and old in wanted}
    if "use_cache" in wanted and not renamed:
        return False
    cls.attribute_map = {**cls.attribute_map, **renamed}
    if "use_cache" not in wanted:
        cls.use_cache = True  # transformers 5 swallows the setting; on the class it is found and not written to files
    return True


def settings_wrapped_in_a_tuple(cls: Any) -> bool:
    """Gradient checkpointing is always on: a comma after an assignment made (False,), which counts as true."""

    def unwrap(config: Any) -> None:
        for name, value in list(vars(config).items()):
            inner = value
            while isinstance(inner, (tuple, list)) and len(inner) == 1:
                inner = inner[0]
            if isinstance(inner, bool) and inner is not value:
                setattr(config, name, inner)

    code = inspect.unwrap(cls.__init__).__code__
    if not any(step.opname == "BUILD_TUPLE" for step in dis.get_instructions(code)):
        return False
    after_init(cls, unwrap)
    return True


def dtype_unknown_to_old_releases(cls: Any) -> bool:
    """The saved config.json says `dtype`; the releases that the checkpoint comes from read `torch_dtype`."""

    def to_diff_dict(self: Any) -> dict[str, Any]:
        settings = super(cls, self).to_diff_dict()
        return settings | ({"torch_dtype": settings["dtype"]} if settings.get("dtype") else {})

    cls.to_diff_dict = to_diff_dict
    return True


CONFIG_PATCHES: tuple[Patch, ...] = (
    names_of_today_missing,
    settings_wrapped_in_a_tuple,
    dtype_unknown_to_old_releases,
)


# --- models: building, loading, saving -------------------------------------------------------------------------------


def weights_built_twice(cls: type) -> bool:
    """Loading needs the memory of a second, uninitialised model, and ZeRO 3 cannot cut what skip_init makes.

    transformers builds on the meta device, where nothing costs; `skip_init` would bring the weights back to the CPU.
    """
    modules = [module for module in own_modules(cls) if hasattr(module, "skip_init")]

    def skip_init(kind: type, *args: Any, **kwargs: Any) -> Any:
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        if torch.get_default_device().type == "meta" or is_deepspeed_zero3_enabled():
            return kind(*args, **kwargs)
        return torch.nn.utils.skip_init(kind, *args, **kwargs)

    for module in modules:
        module.skip_init = skip_init
    return bool(modules)


def max_length_read_while_building(cls: type) -> bool:
    """`ChatGLMConfig has no attribute max_length`. It is there only while the model is built: a lasting one is refused
    by save_pretrained as a setting of generation.
    """
    build = cls.__init__  # type: ignore[misc]
    if "max_length" not in names_used(build):
        return False

    @functools.wraps(build)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        lacking = not hasattr(config, "max_length")
        if lacking:
            config.max_length = config.seq_length
        build(self, config, *args, **kwargs)
        if lacking:
            del config.max_length

    cls.__init__ = __init__  # type: ignore[misc]
    return True


def half_precision_hard_coded(cls: type) -> bool:
    """Weights are float16 whatever was asked for: torch.half stands in the code. They are cast after building."""
    if not any("half" in names_used(c.__dict__.get("__init__")) for c in classes_built_by(cls)):
        return False

    def recast(model: Any) -> None:
        wanted = torch.get_default_dtype()  # from_pretrained sets it to the one asked for
        tensors = [*model.parameters(), *model.buffers()]  # ZeRO 3 casts the weights by itself, but no buffer
        if any(t.is_floating_point() and t.dtype != wanted for t in tensors):
            model.to(wanted)

    after_init(cls, recast)
    return True


def output_layer_not_found(cls: type) -> bool:
    """`get_output_embeddings` gives None, so LoRA on "every layer" takes the head and resizing leaves it out."""
    used = set().union(*(names_used(c.__dict__.get("__init__")) for c in classes_built_by(cls)))
    if own_definition(cls, "get_output_embeddings") or "output_layer" not in used:
        return False

    def get_output_embeddings(self: Any) -> Any:
        return self.base_model.output_layer

    def set_output_embeddings(self: Any, new_embeddings: Any) -> None:
        self.base_model.output_layer = new_embeddings

    cls.get_output_embeddings = get_output_embeddings  # type: ignore[attr-defined]
    cls.set_output_embeddings = set_output_embeddings  # type: ignore[attr-defined]
    return True


def head_no_longer_tied(cls: type) -> bool:
    """A file without lm_head loads as NaN: transformers 4 tied it to the embedding by default, 5 does not."""
    if not own_definition(cls, "get_output_embeddings") or own_definition(cls, "_tied_weights_keys"):
        return False

    def name_the_pair(model: Any) -> None:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if not isinstance(head, nn.Linear) or not getattr(model.config, "tie_word_embeddings", True):
            return
        names = {id(module): name for name, module in model.named_modules()}
        model.config.tie_word_embeddings = True
        model._tied_weights_keys = {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"}

    after_init(cls, name_the_pair)
    return True


def post_init_never_called(cls: type) -> bool:
    """`no attribute all_tied_weights_keys`: what transformers 5 prepares in post_init is missing."""
    if any(
        "post_init" in names_used(c.__dict__.get("__init__")) for c in cls.__mro__ if c.__module__ == cls.__module__
    ):
        return False
    after_init(cls, lambda model: model.post_init())
    return True


def buffers_left_uninitialised(cls: type) -> bool:
    """Garbage where the file has no inv_freq, or where a buffer is not saved at all, and the loss is many times higher.

    Such modules remember how they were built, and what was not loaded is taken from a second one built the same way.
    """
    kinds = [
        c for c in own_classes(cls)
        if issubclass(c, nn.Module) and not issubclass(c, PreTrainedModel)
        and "register_buffer" in names_used(c.__dict__.get("__init__"))
    ]  # fmt: skip
    if not kinds:
        return False
    for kind in kinds:
        remember_arguments(kind)
    base = own_base(cls)
    init = base._init_weights  # type: ignore[attr-defined]

    @functools.wraps(init)
    def _init_weights(self: Any, module: nn.Module) -> None:
        if isinstance(module, tuple(kinds)):
            fresh = built_again(module)
            for name, buffer in module.named_buffers(recurse=False):
                if not getattr(buffer, "_is_hf_initialized", False) and buffer.device.type != "meta":
                    buffer.copy_(fresh.get_buffer(name))
        init(self, module)

    base._init_weights = _init_weights  # type: ignore[attr-defined]
    return True


def remember_arguments(kind: type) -> None:
    """Let the objects of a module class keep the arguments they were built with."""
    build = kind.__init__  # type: ignore[misc]

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        build(self, *args, **kwargs)
        self._llmops_arguments = (args, kwargs)

    kind.__init__ = __init__  # type: ignore[misc]


def built_again(module: Any, **changes: Any) -> nn.Module:
    """A second module, built on the CPU with the same arguments, but for `changes` to those that it was given."""
    args, kwargs = module._llmops_arguments
    given = {name: value for name, value in changes.items() if name in kwargs}
    with torch.device("cpu"):
        return type(module)(*args, **{**kwargs, **given, **({"device": None} if "device" in kwargs else {})})


def rotary_angles_in_bfloat16(cls: type) -> bool:
    """Positions fall together in bf16, which counts to 256, and a half-precision table turns queries into float32.

    Angles are computed in float32 from unrounded frequencies and cast at the end. fp32 and fp16 stay as they were.
    """
    kinds = [
        c for c in own_classes(cls)
        if issubclass(c, nn.Module) and "inv_freq" in names_used(c.__dict__.get("forward"))
        and hasattr(c, "__init__") and "register_buffer" in names_used(c.__dict__.get("__init__"))
    ]  # fmt: skip
    for kind in kinds:
        inner = kind.forward

        @functools.wraps(inner)
        def forward(self: Any, *args: Any, _inner: Callable[..., Any] = inner, **kwargs: Any) -> Any:
            stored = self.inv_freq
            if stored.dtype != torch.bfloat16:
                return _inner(self, *args, **kwargs)
            if "_llmops_exact" not in self.__dict__:
                self.__dict__["_llmops_exact"] = built_again(self, dtype=torch.float32).get_buffer("inv_freq").float()
            self._buffers["inv_freq"] = self._llmops_exact = self._llmops_exact.to(stored.device)
            try:
                table = _inner(self, *args, **kwargs)
            finally:
                self._buffers["inv_freq"] = stored
            if isinstance(table, tuple):
                return tuple(part.to(stored.dtype) for part in table)
            return table.to(stored.dtype)

        kind.forward = forward
    return bool(kinds)


def loss_not_divided(cls: type) -> bool:
    """The Trainer's loss is N times too high with N gradient accumulation steps.

    A forward with **kwargs counts as one that divides by num_items_in_batch; these swallow it.
    """
    forward = cls.forward  # type: ignore[attr-defined]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
    used = names_used(forward) | set(parameters_of(forward))
    if hasattr(cls, "accepts_loss_kwargs") or not takes_all or {"loss_function", "num_items_in_batch"} & used:
        return False
    cls.accepts_loss_kwargs = False  # type: ignore[attr-defined]
    return True


# --- models: gradient checkpointing ----------------------------------------------------------------------------------


def nothing_is_recomputed(cls: type) -> bool:
    """Gradient checkpointing is refused, ignored, or runs in the reentrant way that LoRA and ZeRO stumble over.

    The old protocol was `_set_gradient_checkpointing(module, value)`, or a gradient_checkpointing_enable that does
    nothing. Now the layers themselves recompute, with the function and the settings that the library hands over.
    """
    owner = own_definition(cls, "_set_gradient_checkpointing")
    blocked = own_definition(cls, "gradient_checkpointing_enable")
    old = owner is not None and "value" in parameters_of(owner.__dict__["_set_gradient_checkpointing"])
    names = set(getattr(cls, "_no_split_modules", None) or ())
    kinds = tuple(c for c in own_classes(cls) if c.__name__ in names)
    if not kinds or (not old and blocked is None):
        return False
    for kind in kinds:
        recompute_when_asked(kind)

    def _set_gradient_checkpointing(
        self: Any,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = torch.utils.checkpoint.checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        self._llmops_recomputes = enable
        layers = [module for module in self.modules() if isinstance(module, kinds)]
        for i, layer in enumerate(layers):
            layer.gradient_checkpointing = enable and i % every_n_layers == 0
            layer._gradient_checkpointing_func = gradient_checkpointing_func

    if blocked is not None:
        del blocked.gradient_checkpointing_enable
    cls._set_gradient_checkpointing = _set_gradient_checkpointing  # type: ignore[attr-defined]

    def no_cache_while_recomputing(self: Any, inputs: dict[str, Any], forward: Callable[..., Any]) -> Any:
        if self.training and getattr(self, "_llmops_recomputes", False):
            inputs["use_cache"] = False
        return forward(**inputs)

    around_forward(cls, no_cache_while_recomputing)
    return True


def recompute_when_asked(kind: Any) -> None:
    """Let a layer class run under the checkpointing function that was set on it, while training."""
    inner = kind.forward

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and self.gradient_checkpointing):
            return inner(self, *args, **kwargs)
        return self._gradient_checkpointing_func(functools.partial(inner, self, **kwargs), *args)

    kind.forward = forward
    kind.gradient_checkpointing = False


# --- models: generation ----------------------------------------------------------------------------------------------


class TupleCache(tuple):
    """Keys and values of old models, one pair per layer, with what the model needs to know to go on from them.

    `length`: tokens seen, padding included. `hidden`: bool [rows, length], padding. `anchor` and `block`, int64
    [rows]: ChatGLM-6B's two positions of the next token.
    """

    length: int
    hidden: torch.Tensor
    anchor: torch.Tensor | None = None
    block: torch.Tensor | None = None
    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self.length

    def rows(self, index: torch.Tensor, pairs: tuple[Any, ...]) -> "TupleCache":
        """The cache of the chosen rows, of which `pairs` are the keys and values."""
        chosen = TupleCache(pairs)
        chosen.length, chosen.hidden = self.length, self.hidden[index]
        chosen.anchor = None if self.anchor is None else self.anchor[index]
        chosen.block = None if self.block is None else self.block[index]
        return chosen


def generate_is_gone(cls: type) -> bool:
    """`no attribute generate`: models no longer inherit it."""
    if issubclass(cls, GenerationMixin):
        return False
    cls.__bases__ = (*cls.__bases__, GenerationMixin)
    return True


def cache_is_a_tuple(cls: type) -> bool:
    """Generation fails, or is wrong, because the library hands over a Cache object to models that keep tuples.

    The library makes no cache for them, and what they return is handed back to them. Also cured: a token's position
    when there is a cache and no position_ids, and a first step that is not told from the next.
    """
    reorder = getattr(cls, "_reorder_cache", None)
    if reorder is None or any("Cache" in vars(m) or "DynamicCache" in vars(m) for m in own_modules(cls)):
        return False
    accepted = set(parameters_of(cls.forward))  # type: ignore[attr-defined]
    two_positions = has_two_positions(cls)

    def _prepare_cache_for_generation(self: Any, *args: Any, **kwargs: Any) -> None:
        """No cache: the first forward makes one."""

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: torch.Tensor,
        past_key_values: TupleCache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        length = input_ids.shape[1]
        seen = past_key_values.length if past_key_values else 0
        # under ZeRO 3 a process that has finished goes on in step with the others: its cache outgrows its tokens
        tokens = input_ids[:, min(seen, length - 1) :]
        total = seen + tokens.shape[1]
        inputs = {
            "input_ids": tokens,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask[:, :total] if attention_mask is not None else None,
            "position_ids": position_ids[..., :total][..., -tokens.shape[1] :] if position_ids is not None else None,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        return {name: value for name, value in inputs.items() if name in accepted}

    def _reorder_cache(past: TupleCache, beam_idx: torch.Tensor) -> TupleCache:
        return past.rows(beam_idx, reorder(past, beam_idx))

    def keep_tuples(self: Any, inputs: dict[str, Any], forward: Callable[..., Any]) -> Any:
        past = inputs.get("past_key_values")
        if isinstance(past, Cache) or not past:
            if past is not None and len(past) and past.get_seq_length():
                raise TypeError(f"{type(self).__name__} goes on from a cache that it returned, not from another one")
            past = inputs["past_key_values"] = None
        if inputs.get("return_dict") is None:
            inputs["return_dict"] = self.config.return_dict
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None or (past is not None and not isinstance(past, TupleCache)):
            return forward(**inputs)
        seen = past.length if past else 0
        hidden = hidden_columns(ids, mask, past)
        if "position_ids" in accepted and not two_positions and inputs.get("position_ids") is None:
            inputs["position_ids"] = ((~hidden).cumsum(-1) - 1).clamp(min=0)[:, seen:]
        output = forward(**inputs)
        if getattr(output, "past_key_values", None) is not None:
            cache = TupleCache(output.past_key_values)
            cache.length, cache.hidden = seen + ids.shape[1], hidden
            output.past_key_values = cache
        return output

    cls._prepare_cache_for_generation = _prepare_cache_for_generation  # type: ignore[attr-defined]
    cls.prepare_inputs_for_generation = prepare_inputs_for_generation  # type: ignore[attr-defined]
    cls._update_model_kwargs_for_generation = GenerationMixin._update_model_kwargs_for_generation  # type: ignore[attr-defined]
    cls._reorder_cache = staticmethod(_reorder_cache)  # type: ignore[attr-defined]
    around_forward(cls, keep_tuples)
    return True


def hidden_columns(ids: torch.Tensor, mask: torch.Tensor | None, past: TupleCache | None) -> torch.Tensor:
    """Which columns, of those in the cache and of the new ones, are padding: bool [rows, columns]."""
    new = ids.shape[1]
    if mask is None:
        now = torch.zeros_like(ids, dtype=torch.bool)
    elif mask.dim() == 4:  # bool, true where attention is blocked
        now = mask[:, 0, -1, -new:].expand(ids.shape)
    else:
        now = mask[:, -new:] == 0
    return now if past is None else torch.cat([past.hidden.to(now.device), now], dim=1)


def logits_at_every_position(cls: type) -> bool:
    """Memory for logits that nobody reads: the forward has no logits_to_keep.

    The head's input is cut to the positions asked for: the last N, or those of an index tensor.
    """
    forward = cls.forward  # type: ignore[attr-defined]
    if "logits_to_keep" in parameters_of(forward) or "input_ids" not in parameters_of(forward):
        return False

    def at_chosen_positions(self: Any, inputs: dict[str, Any], forward: Callable[..., Any]) -> Any:
        wanted, ids = inputs.pop("logits_to_keep", None), inputs.get("input_ids")
        if wanted is None or (isinstance(wanted, int) and wanted == 0) or inputs.get("labels") is not None:
            return forward(**inputs)
        index = slice(-wanted, None) if isinstance(wanted, int) else wanted
        shape = tuple(ids.shape)
        head = self.get_output_embeddings()
        if shape[0] == shape[1] or head is None:  # which axis of the head's input is which cannot be told
            output = forward(**inputs)
            output.logits = output.logits[:, index]
            return output

        def cut(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = arguments[0]
            hidden = hidden[:, index] if tuple(hidden.shape[:2]) == shape else hidden[index]
            return (hidden, *arguments[1:])

        hook = head.register_forward_pre_hook(cut)
        try:
            return forward(**inputs)
        finally:
            hook.remove()

    around_forward(cls, at_chosen_positions)
    signature = inspect.signature(forward)
    extra = inspect.Parameter("logits_to_keep", inspect.Parameter.KEYWORD_ONLY, default=None)
    known = list(signature.parameters.values())
    place = len(known) - (known[-1].kind is inspect.Parameter.VAR_KEYWORD)
    cls.forward.__signature__ = signature.replace(parameters=[*known[:place], extra, *known[place:]])  # type: ignore[attr-defined]
    return True


# --- ChatGLM-6B: a prompt that is read in both directions, and two positions per token -----------------------------


def has_two_positions(cls: type) -> bool:
    """Whether a model's tokens have two positions: that of the mask token, and that within the answer."""
    make = getattr(cls, "get_position_ids", None)
    return make is not None and "mask_positions" in parameters_of(make)


def masks_only_in_four_dimensions(cls: type) -> bool:
    """A 2-D attention mask crashes, and generate refuses the 4-D masks that the tokenizer makes.

    Masks and positions are made from the token ids and a 2-D mask, padding on either side. The prompt up to `<sop>`
    is visible to every token; the answer is causal. The cache keeps what the next token's positions need.
    """
    if not has_two_positions(cls):
        return False

    def make_masks(self: Any, inputs: dict[str, Any], forward: Callable[..., Any]) -> Any:
        ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        past = inputs.get("past_key_values")
        if ids is None or not getattr(self, "position_encoding_2d", True):
            return forward(**inputs)
        hidden = hidden_columns(ids, mask, past or None)
        if past:
            anchor, block = past.anchor, past.block
            made, blocked = go_on_from(anchor, block, hidden, ids.shape[1])
        else:
            made, blocked, anchor, block = read_prompt(ids, hidden, self.config)
        inputs["attention_mask"] = mask if mask is not None and mask.dim() == 4 else blocked
        inputs["position_ids"] = positions if positions is not None and positions.dim() == 3 else made
        output = forward(**inputs)
        cache = getattr(output, "past_key_values", None)
        if isinstance(cache, TupleCache):
            cache.anchor, cache.block = anchor, block + (ids.shape[1] if past else 0)
        return output

    @functools.wraps(GenerationMixin.generate)
    def generate(self: Any, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            kwargs["attention_mask"] = (~mask[:, 0, -1]).long()
        positions = kwargs.get("position_ids")
        if positions is not None and positions.dim() == 3:
            del kwargs["position_ids"]
        return GenerationMixin.generate(self, inputs, *args, **kwargs)

    cls.generate = generate  # type: ignore[attr-defined]
    around_forward(cls, make_masks)
    return True


def read_prompt(
    ids: torch.Tensor, hidden: torch.Tensor, config: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions [rows, 2, T], blocked attention [rows, 1, T, T], and the anchor and block of the next token [rows].

    Raises ValueError for a row without `<sop>` or without a mask token.
    """
    column = torch.arange(ids.shape[1], device=ids.device)
    start = (~hidden).int().argmax(1)
    sop = first_column(ids, config.bos_token_id)
    gmask, single = first_column(ids, config.gmask_token_id), first_column(ids, config.mask_token_id)
    place = torch.where(gmask >= 0, gmask, single)
    if (sop < 0).any() or (place < 0).any():
        raise ValueError("every row must hold [gMASK] (or [MASK]) and <sop>: the prompt ends with them")
    in_prompt = column < sop[:, None]
    anchor = place - start
    position = torch.where(in_prompt, (column - start[:, None]).clamp(min=0), anchor[:, None])
    block = torch.where(in_prompt, 0, column - sop[:, None] + 1)
    seen = (column[:, None] >= column) | in_prompt[:, None, :]
    return torch.stack([position, block], 1), ~(seen & ~hidden[:, None, :])[:, None], anchor, ids.shape[1] - sop + 1


def first_column(ids: torch.Tensor, token: int) -> torch.Tensor:
    """Where each row has a token first; -1 where it has none."""
    found = ids == token
    return torch.where(found.any(1), found.int().argmax(1), -1)


def go_on_from(
    anchor: torch.Tensor, block: torch.Tensor, hidden: torch.Tensor, new: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [rows, 2, new] and blocked attention [rows, 1, new, columns] of tokens that follow a cache."""
    step = torch.arange(new, device=hidden.device)
    positions = torch.stack([anchor[:, None].expand(-1, new), block[:, None] + step], 1)
    column = torch.arange(hidden.shape[1], device=hidden.device)
    ahead = column > (hidden.shape[1] - new + step)[:, None]
    return positions, (hidden[:, None, :] | ahead)[:, None]


# --- Baichuan2-13B: ALiBi and a head that normalises its weight -----------------------------------------------------


def alibi_buffer_of_every_position(cls: type) -> bool:
    """2.7 GB at the first evaluation: a mask for every head and every pair of 4,096 positions is made and kept.

    It is made for the length at hand, and while decoding for the new tokens only. Distances are counted from the
    query, which gives the same softmax and is more exact in bf16.
    """
    kinds = [c for c in own_classes(cls) if issubclass(c, PreTrainedModel) and "get_alibi_mask" in c.__dict__]
    for kind in kinds:
        kind.get_alibi_mask = get_alibi_mask
        around_forward(kind, mask_of_new_tokens)
    return bool(kinds)


def get_alibi_mask(self: Any, tensor: torch.Tensor, seq_length_with_past: int) -> torch.Tensor:
    """ALiBi (Press et al. 2022) with the causal mask, [heads, new tokens, seq_length_with_past] in tensor's dtype."""
    length = seq_length_with_past
    rows = getattr(self, "_llmops_rows", None) or length
    key = (rows, length, tensor.dtype, tensor.device)
    kept = self.__dict__.get("_llmops_alibi")
    if kept is None or kept[0] != key:
        column = torch.arange(length, device=tensor.device)
        distance = (column - column[length - rows :, None]).float()
        ahead = distance > 0
        mask = torch.empty(self.n_head, rows, length, dtype=tensor.dtype, device=tensor.device)
        for head, slope in zip(mask, alibi_slopes(self.n_head), strict=True):
            head.copy_((distance * slope).masked_fill_(ahead, float("-inf")))
        kept = self.__dict__["_llmops_alibi"] = (key, mask)
    return kept[1]


def alibi_slopes(heads: int) -> list[float]:
    """One slope per head: a geometric series for a power of two, filled up from the next finer one otherwise."""
    whole = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    return slopes + [2 ** (-8 * (i + 0.5) / whole) for i in range(heads - whole)]


def mask_of_new_tokens(self: Any, inputs: dict[str, Any], forward: Callable[..., Any]) -> Any:
    """With a cache, hand over the mask of the new tokens' rows only."""
    ids = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    past, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
    new = ids.shape[1]
    self.alibi_mask = None  # the class keeps the last one by length alone, whatever its dtype and device
    self._llmops_rows = new if past else None
    if past and mask is not None and mask.dim() == 2:
        column = torch.arange(mask.shape[1], device=mask.device)
        seen = column <= column[mask.shape[1] - new :, None]
        inputs["attention_mask"] = (seen & (mask[:, None, :] != 0)).long()
    return forward(**inputs)


def weight_changed_by_evaluating(cls: type) -> bool:
    """Evaluating in mid-training changes the weights that are saved: the head normalises its weight in place.

    The products are divided by the norms of the weight's rows instead: the same logits, and no second weight.
    """
    kinds = [
        c
        for c in own_classes(cls)
        if issubclass(c, nn.Module) and "first_flag" in names_used(c.__dict__.get("__init__"))
    ]
    for kind in kinds:
        kind.forward = divide_by_norms
    return bool(kinds)


def divide_by_norms(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """hidden_states times the weight with rows of norm 1; the weight is not written."""
    norms = torch.linalg.vector_norm(self.weight, dim=1, dtype=torch.float32).clamp_min(1e-12)
    products = nn.functional.linear(hidden_states, self.weight)
    return products / norms.to(products.dtype)


MODEL_PATCHES: tuple[Patch, ...] = (
    generate_is_gone,
    weights_built_twice,
    max_length_read_while_building,
    half_precision_hard_coded,
    head_no_longer_tied,
    output_layer_not_found,
    post_init_never_called,
    buffers_left_uninitialised,
    rotary_angles_in_bfloat16,
    loss_not_divided,
    alibi_buffer_of_every_position,
    weight_changed_by_evaluating,
    logits_at_every_position,
    nothing_is_recomputed,
    cache_is_a_tuple,
    masks_only_in_four_dimensions,
)
