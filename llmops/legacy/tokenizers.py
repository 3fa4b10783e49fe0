"""Patches of the tokenizers' symptoms."""

import functools
import inspect
import re
from pathlib import Path
from typing import Any

from llmops import files
from llmops.legacy.inspection import names_used, own_definition, parameters_of


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


def settings_not_saved(cls: Any) -> bool:
    """A saved and reloaded tokenizer gives other ids: what `save_pretrained` leaves out gets the default again.

    It leaves out add_bos_token (Baichuan2: a bos before every text), and what a class does not hand to its base, such
    as num_image_tokens (ChatGLM-6B of April 2023: every id shifted by 20,000).
    """
    names = [
        name for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if isinstance(parameter.default, bool | int)
    ]  # fmt: skip
    if not names:
        return False
    build, save = cls.__init__, cls.save_pretrained

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        bound = inspect.signature(build).bind(self, *args, **kwargs)
        bound.apply_defaults()
        self._llmops_settings = {name: bound.arguments[name] for name in names}
        build(self, *args, **kwargs)

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        saved = save(self, save_directory, *args, **kwargs)
        path = Path(save_directory) / "tokenizer_config.json"
        settings = files.read_object(path, "the saved tokenizer's settings")
        current = {name: getattr(self, name, value) for name, value in self._llmops_settings.items()}
        files.write_json(path, settings | current)
        return saved

    cls.__init__, cls.save_pretrained = __init__, save_pretrained
    return True


def end_token_without_a_name(cls: Any) -> bool:
    """No eos token, and None among the ids of a batch: the first ChatGLM2 and CodeGeeX2 know its id and do not name it.

    The id is that of the class's own `get_command("<eos>")`, the name that of its vocabulary.
    """
    if own_definition(cls, "get_command") is None or own_definition(cls, "eos_token") is not None:
        return False
    if '"<eos>"' not in inspect.getsource(inspect.unwrap(cls.__init__)):
        return False
    cls.eos_token = property(lambda self: self._convert_id_to_token(self.get_command("<eos>")))
    cls.eos_token_id = property(lambda self: self.get_command("<eos>"))
    return True


def ids_beyond_the_vocabulary(cls: Any) -> bool:
    """`piece id is out of range` while decoding: the model has more rows than the vocabulary has tokens.

    A model that was trained little can answer with such an id; it stands for no text.
    """
    if own_definition(cls, "_convert_id_to_token") is None:
        return False
    convert = cls._convert_id_to_token

    @functools.wraps(convert)
    def _convert_id_to_token(self: Any, index: int) -> str:
        return convert(self, index) if index < self.vocab_size else ""

    cls._convert_id_to_token = _convert_id_to_token
    return True


def vocabulary_file_forgotten(cls: Any) -> bool:
    """Saving fails: `save_vocabulary` copies `self.vocab_file`, which `__init__` was given and did not keep."""
    owner: Any = own_definition(cls, "save_vocabulary")
    if owner is None or "vocab_file" not in names_used(owner.save_vocabulary):
        return False
    build = cls.__init__
    if "vocab_file" not in parameters_of(build) or "self.vocab_file =" in inspect.getsource(inspect.unwrap(build)):
        return False

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        self.vocab_file = inspect.signature(build).bind(self, *args, **kwargs).arguments["vocab_file"]
        build(self, *args, **kwargs)

    cls.__init__ = __init__
    return True


def batches_only_by_calling(cls: Any) -> bool:
    """`no attribute batch_encode_plus` in the vendors' `model.chat`: the library calls it `__call__` now."""
    if hasattr(cls, "batch_encode_plus"):
        return False
    cls.batch_encode_plus = cls.__call__
    return True


def prompt_ended_twice(cls: Any) -> bool:
    """`tokenizer(text)` puts [gMASK] <sop> behind a text, and then the end once more (ChatGLM-6B of April 2023).

    `build_inputs_with_special_tokens` lengthens the list that it is given, and the library calls it again.
    """
    owner = own_definition(cls, "build_inputs_with_special_tokens")
    if owner is None or "token_ids_0 +=" not in inspect.getsource(owner.build_inputs_with_special_tokens):
        return False
    build = cls.build_inputs_with_special_tokens

    @functools.wraps(build)
    def build_inputs_with_special_tokens(
        self: Any, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return build(self, list(token_ids_0), None if token_ids_1 is None else list(token_ids_1))

    cls.build_inputs_with_special_tokens = build_inputs_with_special_tokens
    return True


def setting_given_twice(cls: Any) -> bool:
    """`multiple values for keyword argument 'clean_up_tokenization_spaces'`: what was saved does not load.

    The first CodeGeeX2 and ChatGLM2 of July 2023 hand their base a value of their own beside the one that was saved.
    """
    build = cls.__init__
    name = "clean_up_tokenization_spaces"
    if name in parameters_of(build) or f"{name}=" not in inspect.getsource(inspect.unwrap(build)):
        return False

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        kwargs.pop(name, None)
        build(self, *args, **kwargs)

    cls.__init__ = __init__
    return True
