"""What a checkpoint's class has and lacks, and how its methods are wrapped."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME


def parameters_of(function: Callable[..., Any]) -> list[str]:
    """Names of a function's parameters."""
    return list(inspect.signature(function).parameters)


def names_used(function: Any) -> set[str]:
    """Global and attribute names that a function's own code refers to."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set(code.co_names) if code else set()


def is_own(cls: type[Any]) -> bool:
    """Whether a class comes from the checkpoint's files and not from a library."""
    return cls.__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME)


def own_modules(cls: type[Any]) -> list[Any]:
    """The files that a model class and its bases stand in."""
    return [sys.modules[name] for name in dict.fromkeys(c.__module__ for c in cls.__mro__ if is_own(c))]


def own_classes(cls: type[Any]) -> list[type[Any]]:
    """Every class defined in these files."""
    files = own_modules(cls)
    names = {module.__name__ for module in files}
    found = (c for module in files for c in vars(module).values() if isinstance(c, type) and c.__module__ in names)
    return list(dict.fromkeys(found))


def own_definition(cls: type[Any], name: str) -> type[Any] | None:
    """The class, among those of the checkpoint's file, from which `cls` has the attribute; None if it has it not so."""
    return next((c for c in cls.__mro__ if name in c.__dict__ and is_own(c)), None)


def classes_built_by(cls: type[Any]) -> list[type[Any]]:
    """The class, the models that its `__init__` makes, and every plain module class of the file."""
    used = names_used(cls.__init__)
    return [c for c in own_classes(cls) if c is cls or c.__name__ in used or not issubclass(c, PreTrainedModel)]


def own_base(cls: type[Any]) -> type[Any]:
    """The deepest model class of the checkpoint's file that all its models share."""
    return [c for c in cls.__mro__ if issubclass(c, PreTrainedModel) and is_own(c)][-1]


def after_init(cls: type[Any], action: Callable[[Any], None]) -> None:
    """Run an action on every object of a class once it is built."""
    build = cls.__init__

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        build(self, *args, **kwargs)
        action(self)

    cls.__init__ = __init__


def around_forward(cls: type[Any], around: Callable[[Any, dict[str, Any], Callable[..., Any]], Any]) -> None:
    """Let `around(self, arguments by name, the forward so far)` stand for a class's forward."""
    inner = cls.forward
    names = parameters_of(inner)[1:]

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args, strict=False))
        return around(self, kwargs, functools.partial(inner, self))

    cls.forward = forward


def has_two_positions(cls: type[Any]) -> bool:
    """Whether a model's tokens have two positions: that of the mask token, and that within the answer."""
    make = getattr(cls, "get_position_ids", None)
    return make is not None and "mask_positions" in parameters_of(make)
