"""Patches of configurations, and of how models are built, loaded and saved."""

import dis
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmops.legacy.inspection import (
    after_init,
    classes_built_by,
    names_used,
    own_base,
    own_classes,
    own_definition,
    own_modules,
    parameters_of,
)


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


def weights_built_twice(cls: type[Any]) -> bool:
    """Loading needs the memory of a second, uninitialised model, and ZeRO 3 cannot cut what skip_init makes.

    transformers builds on the meta device, where nothing costs; `skip_init` would bring the weights back to the CPU.
    """
    modules = [module for module in own_modules(cls) if hasattr(module, "skip_init")]

    def skip_init(kind: type[Any], *args: Any, **kwargs: Any) -> Any:
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        if torch.get_default_device().type == "meta" or is_deepspeed_zero3_enabled():
            return kind(*args, **kwargs)
        return torch.nn.utils.skip_init(kind, *args, **kwargs)

    for module in modules:
        module.skip_init = skip_init
    return bool(modules)


def max_length_read_while_building(cls: type[Any]) -> bool:
    """`ChatGLMConfig has no attribute max_length`. It is there only while the model is built: a lasting one is refused
    by save_pretrained as a setting of generation.
    """
    build = cls.__init__
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

    cls.__init__ = __init__
    return True


def half_precision_hard_coded(cls: type[Any]) -> bool:
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


def output_layer_not_found(cls: type[Any]) -> bool:
    """`get_output_embeddings` gives None, so LoRA on "every layer" takes the head and resizing leaves it out."""
    used = set().union(*(names_used(c.__dict__.get("__init__")) for c in classes_built_by(cls)))
    if own_definition(cls, "get_output_embeddings") or "output_layer" not in used:
        return False

    def get_output_embeddings(self: Any) -> Any:
        return self.base_model.output_layer

    def set_output_embeddings(self: Any, new_embeddings: Any) -> None:
        self.base_model.output_layer = new_embeddings

    cls.get_output_embeddings = get_output_embeddings
    cls.set_output_embeddings = set_output_embeddings
    return True


def head_no_longer_tied(cls: type[Any]) -> bool:
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


def post_init_never_called(cls: type[Any]) -> bool:
    """`no attribute all_tied_weights_keys`: what transformers 5 prepares in post_init is missing."""
    if any(
        "post_init" in names_used(c.__dict__.get("__init__")) for c in cls.__mro__ if c.__module__ == cls.__module__
    ):
        return False
    after_init(cls, lambda model: model.post_init())
    return True


def buffers_left_uninitialised(cls: type[Any]) -> bool:
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
    init = base._init_weights

    @functools.wraps(init)
    def _init_weights(self: Any, module: nn.Module) -> None:
        if isinstance(module, tuple(kinds)):
            fresh = built_again(module)
            for name, buffer in module.named_buffers(recurse=False):
                if not getattr(buffer, "_is_hf_initialized", False) and buffer.device.type != "meta":
                    buffer.copy_(fresh.get_buffer(name))
        init(self, module)

    base._init_weights = _init_weights
    return True


def tables_that_are_no_buffers(cls: type[Any]) -> bool:
    """Rotary tables that are plain attributes (Baichuan2-7B) stay on the meta device, where from_pretrained builds.

    Such modules hold no weights: they are built on the CPU. Their forward takes the tables to where it computes.
    """
    kinds = [
        c for c in own_classes(cls)
        if issubclass(c, nn.Module) and not issubclass(c, PreTrainedModel)
        and "inv_freq" in names_used(c.__dict__.get("__init__"))
        and "register_buffer" not in names_used(c.__dict__.get("__init__"))
    ]  # fmt: skip
    for kind in kinds:
        build_on_the_cpu(kind)
    return bool(kinds)


def build_on_the_cpu(kind: type[Any]) -> None:
    """Let the objects of a module class be built on the CPU, wherever the model around them is built."""
    build = kind.__init__

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        with torch.device("cpu"):
            build(self, *args, **kwargs)

    kind.__init__ = __init__


def remember_arguments(kind: type[Any]) -> None:
    """Let the objects of a module class keep the arguments they were built with."""
    build = kind.__init__

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        build(self, *args, **kwargs)
        self._llmops_arguments = (args, kwargs)

    kind.__init__ = __init__


def built_again(module: Any, **changes: Any) -> nn.Module:
    """A second module, built on the CPU with the same arguments, but for `changes` to those that it was given."""
    args, kwargs = module._llmops_arguments
    given = {name: value for name, value in changes.items() if name in kwargs}
    with torch.device("cpu"):
        return type(module)(*args, **{**kwargs, **given, **({"device": None} if "device" in kwargs else {})})


def rotary_angles_in_bfloat16(cls: type[Any]) -> bool:
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


def loss_not_divided(cls: type[Any]) -> bool:
    """The Trainer's loss is N times too high with N gradient accumulation steps.

    A forward with **kwargs counts as one that divides by num_items_in_batch; these swallow it.
    """
    forward = cls.forward
    takes_all = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
    used = names_used(forward) | set(parameters_of(forward))
    if hasattr(cls, "accepts_loss_kwargs") or not takes_all or {"loss_function", "num_items_in_batch"} & used:
        return False
    cls.accepts_loss_kwargs = False
    return True
