"""The engine of the evaluation commands: tokenises first, then loads a model, answers, goes on where it stopped.

Answers depend on the model and the prompts only, not on the batch size.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from eval.answers import Answers, check_foreign
from eval.prompts import Fitter, Prepared, Request
from eval.rendering import Renderer
from eval.samples import Answer, Sample
from eval.thoughts import OPEN, after_thought, in_thought, told
from llmops.console import UserError, check_packages, has_gpu, log, progress
from llmops.imports import quick_imports
from llmops.machine import cpu_kernels, devices
from llmops.machine.kept import Record, fingerprint
from llmops.machine.locks import EVALUATION, lock
from llmops.machine.sharing import Processes
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint

if TYPE_CHECKING:
    from llmops.generation.generator import Generator


@dataclass(frozen=True)
class Settings:
    """How to run a model. `gpu_id` -1 is the CPU; without any GPU 0 is too. `batch_size` prompts go through at once.

    0 are as many as memory holds. `max_seq_len` 0 is what the data needs, up to what the model can. `enable_thinking`
    is auto, true or false.
    """

    model: str
    adapter: str = ""
    max_seq_len: int = 0
    batch_size: int = 0
    gpu_id: int = 0
    mode: str = "auto"
    dtype: str = "auto"
    cpu_kernels: str = "auto"
    chat_template: bool = True
    enable_thinking: str = "auto"
    reuse_prefix: bool = True
    trust_remote_code: bool = False
    output_path: str = ""


def check(settings: Settings) -> Checkpoint:
    """The model that is loaded, when everything that can be known before loading is right."""
    adapter = Path(settings.adapter) if settings.adapter else None
    checkpoint = Checkpoint(Path(settings.model), settings.mode, settings.trust_remote_code, adapter)
    if not checkpoint.is_whole and not checkpoint.is_adapter:
        raise UserError(f"{checkpoint.folder} holds no model; expected a checkpoint folder or an adapter's folder")
    if adapter and not Checkpoint(adapter).is_adapter:
        raise UserError(f"{adapter} holds no adapter; expected a folder with adapter_config.json")
    if settings.max_seq_len < 0:
        raise UserError(f"max_seq_len is {settings.max_seq_len}; expected a whole number from 1")
    if settings.batch_size < 0:
        raise UserError(f"batch_size is {settings.batch_size}; expected a whole number, 0 for what memory holds")
    if settings.gpu_id < -1:
        raise UserError(f"gpu_id is {settings.gpu_id}; expected a GPU's number, or -1 for the CPU")
    if settings.gpu_id > 0 and not has_gpu():
        raise UserError(f"gpu_id {settings.gpu_id} does not exist: no GPU is visible here; 0 and -1 run on the CPU")
    if settings.output_path:
        check_writable(Path(settings.output_path))
    check_packages("torch", "transformers")
    return checkpoint


def check_writable(folder: Path) -> None:
    """Raise UserError when files cannot be written into a folder; it is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # of a name that no other process has, on no machine
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"output_path {folder} cannot be written ({reason}); choose a folder you may write") from error


@contextmanager
def owned(
    output_path: str, names: Sequence[str], processes: Processes, others: Sequence[str] = (),
    exports: Sequence[str] = (),
) -> Iterator[None]:  # fmt: skip
    """Within this context nobody else evaluates into output_path, and what is replaced there an evaluation wrote."""
    with ExitStack() as stack:
        if output_path and processes.first:
            folder = Path(output_path)
            busy = f"another evaluation is writing into {folder}; wait for it, or choose another output_path"
            stack.enter_context(lock(folder / EVALUATION, busy))
            check_foreign(folder, names, others, exports)
        yield


class Engine:
    """A model that answers samples. Its tokenizer is there at once, its weights when they are first asked for."""

    def __init__(self, settings: Settings, processes: Processes) -> None:
        checkpoint = check(settings)
        devices.tune_cpu()
        with quick_imports():
            import torch  # noqa: F401
            import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        cpu_kernels.settle(settings.cpu_kernels)
        self.settings = settings
        self.processes = processes
        self.device = devices.choose_device(settings.gpu_id, processes)
        on_gpu = self.device.type == "cuda"
        self.dtype = devices.choose_dtype(settings.dtype if on_gpu else cpu_dtype(settings.dtype))
        self.model = ChatModel(checkpoint, thinking=told(settings.enable_thinking))
        self.renderer = Renderer(self.model, settings.chat_template)
        name = fingerprint([checkpoint.folder, checkpoint.base.folder, *checkpoint.adapters], str(self.dtype))
        asked = settings.max_seq_len
        if checkpoint.length and asked > checkpoint.length:
            log(f"max_seq_len is {asked}; the model was made for {checkpoint.length} tokens: these count")
        self.fitter = Fitter(self.renderer, name, settings.max_seq_len, checkpoint.length)
        self.answers = Answers(Path(settings.output_path) if settings.output_path else None, processes.rank, name)

    @cached_property
    def generator(self) -> "Generator":
        """The loaded model."""
        settings = self.settings
        generator = self.model.generator(self.dtype, self.device, settings.batch_size, settings.reuse_prefix)
        if self.processes.first:
            name = self.renderer.chat.name if self.renderer.chat else "plain text"
            because = generator.plain_because
            log(
                f"{settings.model} on {self.device}, {str(self.dtype).removeprefix('torch.')}, {name}"
                + (f"; every prompt computed anew, because {because}" if because else "")
            )
        return generator

    def prepare(self, name: str, samples: Sequence[Sample], limit: int) -> Prepared:
        """Samples as tokens, before any weight is loaded; `limit` are the most tokens that an answer may have."""

        def watch(items: Sequence[Sample]) -> Iterator[Sample]:
            return progress(items, f"reading {name}", len(items), "samples", not self.processes.first)

        return self.fitter.prepare(name, samples, limit, watch)

    def answer(self, prepared: Prepared) -> list[Answer]:
        """The answers to prepared samples, in their order; each is kept as soon as it is known."""
        if not self.settings.batch_size:
            self.generator.fit(prepared.length)
        requests = prepared.requests
        keys = [request.key for request in requests]
        done = self.processes.from_first(lambda: self._done(prepared.name, keys))
        first_of: dict[str, int] = {}
        for i, key in enumerate(keys):
            if i not in done:
                first_of.setdefault(key, i)  # equal prompts are answered once
        mine = self.processes.share(list(first_of.values()))
        answered: dict[int, Record] = {}
        with self.answers.appender(prepared.name) as append:
            todo = self._compute([requests[i] for i in mine], [prepared.samples[i] for i in mine])
            silent = not self.processes.first
            for k, found in progress(todo, f"answering {prepared.name}", len(mine), "samples", silent):
                answered[mine[k]] = {"key": keys[mine[k]], "model": self.answers.model} | found
                append(answered[mine[k]])
                self.processes.look()
        fresh = {keys[i]: record for i, record in self.processes.gather(answered).items()}
        records = [done.get(i) or fresh[key] for i, key in enumerate(keys)]
        return [self._answer(record, request) for record, request in zip(records, requests, strict=True)]

    def how_far(self, prepared: Prepared | None) -> str:
        """What there is of the answers of a data set whose run ended early, in words."""
        folder = self.answers.folder
        if folder is None:
            return "its answers are lost, because no output_path was given"
        keys = {request.key for request in prepared.requests} if prepared else set()
        known = len(keys & self.answers.kept(prepared.name).keys()) if prepared else 0
        if not known:
            return "none of its answers was there yet"
        return f"{known} of {len(keys)} answers are in {folder}; the same command goes on there"

    def finish(self, name: str, rows: Sequence[Record]) -> None:
        """Write the per-sample file, with scores."""
        if self.processes.first:
            self.answers.finish(name, rows)

    def _done(self, name: str, keys: Sequence[str]) -> dict[int, Record]:
        """What earlier runs answered, by place; read by the first process alone, before anyone writes."""
        kept = self.answers.kept(name)
        done = {i: kept[key] for i, key in enumerate(keys) if key in kept}
        if done:
            log(f"{name}: {len(done)} of {len(keys)} answers are in {self.answers.folder} already")
        return done

    def _answer(self, record: Record, request: Request) -> Answer:
        prompt, whole = str(self.renderer.tokenizer.decode(request.prompt)), record["prediction"]
        opened = prompt.rstrip().endswith(OPEN) and not request.choices
        text = after_thought(whole, opened)
        return Answer(
            request.key, text, prompt, len(request.prompt), request.cut, tuple(record["loglikelihoods"]),
            tuple(map(len, request.choices)), request.lost, record["ended"], record["new_tokens"],
            whole if whole != text else "", in_thought(whole, opened),
        )  # fmt: skip

    def _compute(self, requests: Sequence[Request], samples: Sequence[Sample]) -> Iterator[tuple[int, Record]]:
        """(position, answer) in the order of computation."""
        ranked = [k for k, request in enumerate(requests) if request.choices]
        free = [k for k, request in enumerate(requests) if not request.choices]
        contexts = [requests[k].prompt for k in ranked]
        for i, scores in self.generator.loglikelihoods(contexts, [requests[k].choices for k in ranked]):
            best = max(range(len(scores)), key=scores.__getitem__)
            text = samples[ranked[i]].choices[best]
            yield ranked[i], made(text, [round(score, 6) for score in scores], True, 0)
        prompts = [requests[k].prompt for k in free]
        limits = [requests[k].max_new_tokens for k in free]
        for i, generated in self.generator.generate(prompts, limits, self.renderer.stop_ids):
            ended = generated.ended or self.renderer.ends_by_line(generated.ids)
            yield free[i], made(self.renderer.decode(generated.ids), [], ended, len(generated.ids))


def made(text: str, loglikelihoods: list[float], ended: bool, new_tokens: int) -> Record:
    """An answer as it is kept, without its key."""
    return {"prediction": text, "loglikelihoods": loglikelihoods, "ended": ended, "new_tokens": new_tokens}


def cpu_dtype(name: str) -> str:
    """float32 on the CPU unless something was asked for."""
    return "fp32" if name == "auto" else name
