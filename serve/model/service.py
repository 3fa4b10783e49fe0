"""A model that is opened, its engine, and how requests become rows of it."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from llmops import files
from llmops.console import UserError, has_gpu, log
from llmops.conversations.records import Message, texts_in
from llmops.formats.chat_format import THINKING, ChatFormat
from llmops.generation.capacity import cache_bytes, free_memory, vocabulary_of
from llmops.generation.generator import Generator
from llmops.generation.packed import pack
from llmops.generation.passes import Passes
from llmops.intents.catalog import Catalog, load_catalog
from llmops.intents.questions import INTENTS_NAME
from llmops.machine import cpu_kernels, devices
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint, run_settings
from serve.answers import ApiError
from serve.metrics import Metrics
from serve.model.asked import Asked
from serve.model.engine import Engine
from serve.model.intents import Intents
from serve.model.lanes import Answer, BatchLane, Event, Lane
from serve.model.plain import PlainLane
from serve.model.prefixes import Room
from serve.model.sampling import Sampler
from serve.model.text import Detokenizer, token_bytes
from serve.settings import Limits, Model

T = TypeVar("T")
BASE, TUNED = "base", "tuned"
UNKNOWN = 1 << 40  # tokens that memory holds, where the configuration does not tell what one takes
LONGEST_TOKEN = 64  # characters of a token, on average over a prompt
MOST_FORMATS = 8  # chat formats with variables of their own that are kept


class Service:
    """What routes ask: models by name, prompts as token ids, answers."""

    def __init__(self, model: ChatModel, limits: Limits, metrics: Metrics, feedback: Path) -> None:
        self.model = model
        self.limits = limits
        self.metrics = metrics
        self.engine = Engine(limits, metrics)
        self.names: list[str] = []
        self.intents: Intents | None = None
        self.feedback = feedback
        self.length = model.checkpoint.length
        self.vocabulary = model.checkpoint.vocabulary
        self._formats: OrderedDict[tuple[tuple[str, str], ...], ChatFormat] = OrderedDict()
        self._render = ThreadPoolExecutor(1, "render")  # one at a time: tokenizers and templates keep state
        for name, about in (
            ("llmops_prompt_tokens_total", "Tokens of prompts."),
            ("llmops_cached_tokens_total", "Of these, tokens that were known from earlier prompts."),
            ("llmops_completion_tokens_total", "Tokens of answers."),
        ):
            metrics.counter(name, about)
        metrics.times("llmops_first_token_seconds", "From a request to the first token of its answer.")
        metrics.times("llmops_answer_seconds", "From a request to the end of its answer.")

    @property
    def alive(self) -> bool:
        """Whether the engine runs."""
        return self.engine.alive

    def close(self) -> bool:
        """End the engine; whether all went well until now."""
        self._render.shutdown()
        return self.engine.close()

    def listed(self) -> list[tuple[str, dict[str, Any]]]:
        """Names of the models with what is told of them."""
        length = {"max_model_len": self.length} if self.length else {}
        knows = {"intents": len(self.intents.catalog.intents)} if self.intents else {}
        return [(name, length | (knows if name == self.names[0] else {})) for name in self.names]

    def name_of(self, wanted: str) -> str:
        """A model's name; the first one's for "". Raises ApiError for a name that is not there."""
        if wanted and wanted not in self.names:
            raise ApiError(
                404, f"there is no model {files.shown(wanted)}; expected {' or '.join(self.names)}", "model",
                "model_not_found",
            )  # fmt: skip
        return wanted or self.names[0]

    async def prompt(self, messages: Sequence[Message], tools: Sequence[Any], variables: dict[str, Any]) -> list[int]:
        """A conversation as token ids. Raises ApiError for what the chat template refuses."""

        self._check_size(sum(map(len, texts_in(messages, tools))))

        def write() -> list[int]:
            return self._format(variables).prompt(messages, tools)

        try:
            return await self.in_order(write)
        except UserError as error:
            raise ApiError(400, str(error), "messages", "invalid_value") from error

    async def in_order(self, work: Callable[[], T]) -> T:
        """The result of some work of the one thread that renders and writes."""
        return await asyncio.get_running_loop().run_in_executor(self._render, work)

    async def encode(self, text: str) -> list[int]:
        """A text that is continued, as token ids, with what the tokenizer puts before a text."""
        self._check_size(len(text))

        def write() -> list[int]:
            chat = self.model.chat
            if chat.allow_special_tokens:
                return chat.tokenizer(text)["input_ids"]
            before = chat.tokenizer("")["input_ids"]
            end = chat.tokenizer.eos_token_id
            return [*(before[:-1] if before[-1:] == [end] else before), *chat.controls.encode_text(text)]

        return await self.in_order(write)

    def _check_size(self, characters: int) -> None:
        """Raise ApiError for a text that is too long in any tokenizer, before time goes into its tokens."""
        if self.length and characters > self.length * LONGEST_TOKEN:
            more = f"the prompt has {characters} characters, far more than the model's {self.length} tokens"
            raise ApiError(400, more, "messages", "context_length_exceeded")

    def _format(self, variables: dict[str, Any]) -> ChatFormat:
        """The chat format that is told some variables; those used last are kept."""
        if not variables:
            return self.model.chat
        named = [variables[name] for name in THINKING if name in variables]
        variables = dict.fromkeys(THINKING, named[0]) | variables if named else variables  # one by either name
        key = tuple(sorted((name, repr(value)) for name, value in variables.items()))  # 0 is not false to a template
        if key not in self._formats:
            self._formats[key] = self.model.chat_with(variables)
        self._formats.move_to_end(key)
        if len(self._formats) > MOST_FORMATS:
            self._formats.popitem(last=False)
        return self._formats[key]

    def answer(self, asked: Asked, ids: list[int], tell: Callable[[Event], None]) -> Answer:
        """The row of a prompt. Raises ApiError for a prompt that is empty, too long or of another tokenizer."""
        if not ids or (self.vocabulary and max(ids) >= self.vocabulary):
            raise ApiError(400, "the prompt is empty or has tokens that the model does not know", code="invalid_value")
        budget = min(lane.budget for lane in self.engine.lanes.values())
        room = min(self.length or budget, budget) - len(ids)
        wanted = min(asked.max_tokens or self.limits.tokens, self.limits.tokens)
        if room < 1 or (asked.max_tokens and wanted > room):
            more = f" and {wanted} of answer" if asked.max_tokens else ""
            raise ApiError(
                400, f"the prompt has {len(ids)} tokens{more}, more than the model's {room + len(ids)}", "messages",
                "context_length_exceeded",
            )  # fmt: skip
        return Answer(
            0, ids, min(wanted, room), sampler=Sampler(asked.sampling), tell=tell, pieces=asked.stream,
            detokenizer=Detokenizer(self.decode, asked.stop), deadline=time.monotonic() + self.limits.seconds,
        )  # fmt: skip

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens as text, control tokens left out."""
        return str(self.model.tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to a text."""
        return token_bytes(self.model.tokenizer, token)


def open_service(settings: Model, limits: Limits, feedback: Path) -> Service:
    """Open a model and start its engine. Raises UserError for what is wrong with its files."""
    import transformers

    devices.check_gpu()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    catalog = find_catalog(settings)
    mode = settings.mode or (catalog.mode if catalog else "auto")
    checkpoint = Checkpoint(settings.folder, mode, settings.trust_remote_code)
    model = ChatModel(checkpoint)
    stop_ids = model.chat.stop_ids()
    device = torch.device("cuda" if has_gpu() and torch.cuda.is_available() else "cpu")
    dtype = devices.choose_dtype(settings.dtype)
    cpu_kernels.settle(settings.kernels)
    cpu_kernels.use(device, dtype)
    both = checkpoint.is_adapter and settings.base_too
    loaded: torch.nn.Module = model.load(dtype, device, merge=not both)
    weights = loaded.to(device)
    adapter = Adapter(weights) if both else None
    passes = Passes(adapter.inner if adapter else weights, model.tokenizer.pad_token_id or 0, True)
    if passes.plain_because is None:
        pack(passes.model)
    service = Service(model, limits, Metrics(), feedback)
    service.vocabulary = vocabulary_of(passes.model)
    service.names = [TUNED, BASE] if adapter else [TUNED if is_tuned(checkpoint) else BASE]
    lane_class: type[Lane] = BatchLane if passes.plain_because is None else PlainLane
    memory = free_memory(device) // 2 // (len(service.names) if device.type == "cpu" else 1)
    budget = memory // cache_bytes(passes.model) if passes.plain_because is None else UNKNOWN
    room = Room(limits.prefix_bytes)
    lanes = {
        name: lane_class(
            passes, stop_ids, limits=limits, budget=budget, metrics=service.metrics, room=room,
            activate=partial(adapter.use, name == TUNED) if adapter else nothing,
        )
        for name in service.names
    }  # fmt: skip
    if catalog:
        service.intents = open_intents(catalog, settings, model, passes, lanes[service.names[0]].activate)
    service.engine.start(lanes, [service.intents] if service.intents else [])
    how = f"; answers batch by batch, because {passes.plain_because}" if passes.plain_because else ""
    log(f"{settings.folder}: {model.chat.name}, {dtype}, on {device.type}{how}")
    return service


def find_catalog(settings: Model) -> Catalog | None:
    """The intents file that was given, or the one of the model's folder; None where there is none that can be asked."""
    folder = settings.folder
    beside = next((p for p in (folder / INTENTS_NAME, folder.parent / INTENTS_NAME) if files.is_file(p)), None)
    path = settings.intents_file or beside
    if path is None or (path.parent != folder and not settings.intents_file and folder.name != "merged"):
        if settings.join_file:
            raise UserError(f"--join_file needs an intents.json, and {folder} has none; pass --intents_file")
        return None
    catalog = load_catalog(path)
    if settings.join_file and "linear" not in catalog.decision:
        raise UserError(
            f"--join_file needs weights in {path}: faq/score.sh --join true --keep_threshold true keeps them"
        )
    lacking = ""
    if catalog.wording is None:
        lacking = "the prompts of this data were made elsewhere, so a bare question cannot be asked"
    elif "linear" in catalog.decision and not settings.join_file:
        lacking = "it keeps weights for model and linear classifier together; pass --join_file"
    if lacking and settings.intents_file:
        raise UserError(f"--intents_file {path} cannot be served: {lacking}")
    if lacking:
        log(f"{path} is not served: {lacking}")
    return None if lacking else catalog


def open_intents(
    catalog: Catalog, settings: Model, model: ChatModel, passes: Passes, activate: Callable[[], None]
) -> Intents:
    """The FAQ side of a model."""
    retriever = None
    if catalog.retrieval:
        from llmops.intents.retrieval import orders_of, retriever_of

        orders_of(catalog)
        retriever = retriever_of(catalog, settings.embedding_model)
    generator = Generator(passes.model, passes.pad_id, model.chat.family.generation["batch_size"])
    joint = None
    if settings.join_file:
        from llmops.intents.joined import open_joint

        embedding = settings.embedding_model or catalog.retrieval.get("embedding_model", "")
        joint = open_joint(catalog, str(settings.join_file), embedding)
    with torch.inference_mode():
        return Intents(generator, catalog, model.chat, model.checkpoint.length, activate, retriever, joint)


def nothing() -> None:
    """What there is to do before a model's turn when there is only one."""


class Adapter:
    """Weights with an adapter that is on or off: base and tuned model in the memory of one."""

    def __init__(self, model: Any) -> None:
        self.inner = model.get_base_model()
        self._layers = model.base_model
        self._on = True

    def use(self, on: bool) -> None:
        """Make the weights those of the tuned model, or of its base."""
        if on != self._on:
            self._on = on
            switch = self._layers.enable_adapter_layers if on else self._layers.disable_adapter_layers
            switch()


def is_tuned(checkpoint: Checkpoint) -> bool:
    """Whether a folder is what training wrote: an adapter, or a model that a run's settings belong to."""
    folder = files.real(checkpoint.folder)
    return checkpoint.is_adapter or run_settings(folder) is not None
