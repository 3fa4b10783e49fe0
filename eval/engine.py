"""The engine of the evaluation commands: loads a model, answers samples, keeps every answer, goes on where it stopped.

Answers depend on the model and the prompts only, not on the batch size. Each process appends its answers to a file of
its own; all such files are read when a run is started again, so nothing is answered twice.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.processes import Processes
from eval.rendering import Renderer
from eval.samples import Answer, Sample
from llmops import checkpoints, devices
from llmops.console import UserError, has_gpu, log, progress

if TYPE_CHECKING:
    import torch


WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "config.json", "adapter_config.json", "tokenizer*", "chat_template*")


@dataclass(frozen=True)
class Settings:
    """How to run a model. `gpu_id` -1 is the CPU; without any GPU 0 is too. `batch_size` prompts go through at once.

    0 are as many as memory holds.
    """

    model: str
    adapter: str = ""
    max_seq_len: int = 512
    batch_size: int = 0
    gpu_id: int = 0
    mode: str = "auto"
    dtype: str = "auto"
    chat_template: bool = True
    reuse_prefix: bool = True
    trust_remote_code: bool = False
    output_path: str = ""


@dataclass(frozen=True)
class Request:
    """A sample as tokens: its prompt, its choices or how many tokens it may generate; `key` names its answer."""

    prompt: list[int]
    choices: list[list[int]]
    max_new_tokens: int
    cut: bool
    key: str


def check(settings: Settings) -> Path:
    """The folder that is loaded, when everything that can be known before loading is right."""
    model = Path(settings.model)
    if not (model / "config.json").is_file() and not checkpoints.is_adapter(model):
        raise UserError(f"{model} holds no model; expected a checkpoint folder or an adapter's folder")
    folder = model
    if settings.adapter:
        folder = Path(settings.adapter)
        if not checkpoints.is_adapter(folder):
            raise UserError(f"{folder} holds no adapter; expected a folder with adapter_config.json")
    if settings.max_seq_len < 1:
        raise UserError(f"max_seq_len is {settings.max_seq_len}; expected a whole number from 1")
    if settings.batch_size < 0:
        raise UserError(f"batch_size is {settings.batch_size}; expected a whole number, 0 for what memory holds")
    if settings.gpu_id < -1:
        raise UserError(f"gpu_id is {settings.gpu_id}; expected a GPU's number, or -1 for the CPU")
    if settings.gpu_id > 0 and not has_gpu():
        raise UserError(f"gpu_id {settings.gpu_id} does not exist: no GPU is visible here; 0 and -1 run on the CPU")
    if settings.output_path:
        check_writable(Path(settings.output_path))
    return folder


def check_writable(folder: Path) -> None:
    """Raise UserError when files cannot be written into a folder; it is made if it is not there."""
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output_path {folder} cannot be written ({error.strerror}); choose a folder you may write"
        ) from error


def choose_device(gpu_id: int, processes: Processes) -> "torch.device":
    """The device of this process: the GPU asked for, one GPU per process when there are several, else the CPU."""
    import torch

    if gpu_id < 0:
        return torch.device("cpu")
    devices.check_gpu()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = processes.local_rank if processes.count > 1 else gpu_id
    if number >= torch.cuda.device_count():
        raise UserError(f"gpu_id {number} does not exist; this machine shows {torch.cuda.device_count()} GPUs, from 0")
    torch.cuda.set_device(number)  # else every process opens a context on GPU 0 as well
    return torch.device("cuda", number)


class Engine:
    """A loaded model that answers samples."""

    def __init__(self, settings: Settings, processes: Processes) -> None:
        folder = check(settings)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if not has_gpu():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            if "OMP_WAIT_POLICY" not in os.environ:  # as tune_cpu in llmops/environment.sh, which says why
                os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        import transformers

        from llmops.generation import Generator

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.settings = settings
        self.processes = processes
        device = choose_device(settings.gpu_id, processes)
        self.dtype = checkpoints.choose_dtype(settings.dtype if device.type == "cuda" else cpu_dtype(settings.dtype))
        self.renderer = Renderer(
            Path(settings.model), settings.mode, settings.chat_template, settings.trust_remote_code
        )
        model = load(settings, self.dtype, device)
        model.to(device)
        base = Path(settings.model)
        length = checkpoints.model_length(checkpoints.read_config(base))
        self.length = min(settings.max_seq_len, length or settings.max_seq_len)
        pad = self.renderer.tokenizer.pad_token_id or 0
        self.generator = Generator(model, pad, settings.batch_size, settings.reuse_prefix)
        if not settings.batch_size:
            self.generator.fit(self.length)
        self.fingerprint = fingerprint([folder, base, checkpoints.base_folder(base)], str(self.dtype))
        if processes.first:
            name = self.renderer.chat.name if self.renderer.chat else "plain text"
            because = self.generator.plain_because
            log(
                f"{settings.model} on {device}, {str(self.dtype).removeprefix('torch.')}, {name}"
                + (f"; every prompt computed anew, because {because}" if because else "")
            )

    def answer(self, name: str, samples: Sequence[Sample], limits: Sequence[int]) -> list[Answer]:
        """The answers to samples, in their order; `limits` are the most tokens that each may generate."""
        requests = [
            self._request(sample, limit)
            for sample, limit in zip(
                progress(samples, f"reading {name}", len(samples), "samples", not self.processes.first),
                limits,
                strict=True,
            )
        ]
        keys = [request.key for request in requests]
        done = {i: found for i, found in enumerate(map(self._kept(name).get, keys)) if found}
        if self.processes.count > 1:
            self.processes.gather({})  # everyone has read the files before anyone writes
        if done and self.processes.first:
            log(f"{name}: {len(done)} of {len(samples)} answers are in {self._folder()} already")
        first_of = {}
        for i, key in enumerate(keys):
            if i not in done:
                first_of.setdefault(key, i)  # equal prompts are answered once
        mine = self.processes.share(list(first_of.values()))
        answered = {}
        with self._appender(name) as append:
            todo = self._answers([requests[i] for i in mine], [samples[i] for i in mine])
            silent = not self.processes.first
            for k, (text, scores) in progress(todo, f"answering {name}", len(mine), "samples", silent):
                record = {"key": keys[mine[k]], "prediction": text, "loglikelihoods": scores}
                append(record)
                answered[mine[k]] = record
        found = {keys[i]: record for i, record in self.processes.gather(answered).items()}
        records = [done.get(i) or found[key] for i, key in enumerate(keys)]
        return [
            Answer(
                request.key,
                record["prediction"],
                self.renderer.tokenizer.decode(request.prompt),
                len(request.prompt),
                request.cut,
                tuple(record["loglikelihoods"]),
            )
            for record, request in zip(records, requests, strict=True)
        ]

    def finish(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write the per-sample file, with scores, and drop the files that the processes kept on the way."""
        if not self.settings.output_path or not self.processes.first:
            return
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_complete(self._folder() / f"{name}.jsonl", text)
        for part in self._folder().glob(f"{name}.process*.jsonl"):
            part.unlink()

    def _request(self, sample: Sample, limit: int) -> Request:
        """The tokens of a sample, cut where it is longer than allowed."""
        prompt, cut = self.renderer.prompt(sample), False
        choices = self.renderer.choices(sample, prompt)
        limit = 0 if choices else max(1, min(limit, self.length // 2))
        room = self.length - (max(map(len, choices)) if choices else limit)
        while len(prompt) > room:
            cut = True
            shorter = sample.without_first_turns()
            if shorter is None:
                prompt = self._cut_passage(sample, room)
                break
            sample = shorter
            prompt = self.renderer.prompt(sample)
        name = json.dumps([self.fingerprint, prompt, choices, limit, self.renderer.stop_ids])
        return Request(prompt, choices, limit, cut, hashlib.sha256(name.encode()).hexdigest()[:24])

    def _cut_passage(self, sample: Sample, room: int) -> list[int]:
        """The prompt with as much of the passage as fits."""
        bare = self.renderer.prompt(sample.shortened(0))
        if len(bare) > room:
            raise UserError(
                f"max_seq_len {self.length} is too small: a prompt has {len(bare)} tokens that cannot be cut and "
                f"{self.length - room} for the answer; give at least {len(bare) + self.length - room}"
            )
        low, high = 0, len(sample.passage)
        while high - low > 1:
            middle = (low + high) // 2
            if len(self.renderer.prompt(sample.shortened(middle))) <= room:
                low = middle
            else:
                high = middle
        return self.renderer.prompt(sample.shortened(low))

    def _answers(
        self, requests: Sequence[Request], samples: Sequence[Sample]
    ) -> Iterator[tuple[int, tuple[str, list[float]]]]:
        """(position, (text, log-likelihoods of the choices)) in the order of computation."""
        ranked = [k for k, request in enumerate(requests) if request.choices]
        free = [k for k, request in enumerate(requests) if not request.choices]
        contexts = [requests[k].prompt for k in ranked]
        for i, scores in self.generator.loglikelihoods(contexts, [requests[k].choices for k in ranked]):
            best = max(range(len(scores)), key=scores.__getitem__)
            yield ranked[i], (samples[ranked[i]].choices[best], [round(score, 6) for score in scores])
        prompts = [requests[k].prompt for k in free]
        limits = [requests[k].max_new_tokens for k in free]
        for i, generated in self.generator.generate(prompts, limits, self.renderer.stop_ids):
            yield free[i], (self.renderer.decode(generated.ids), [])

    def _folder(self) -> Path:
        return Path(self.settings.output_path) / "samples"

    def _kept(self, name: str) -> dict[str, dict[str, Any]]:
        """The answers of earlier runs, by key. A line that a killed run left unfinished is passed over."""
        kept: dict[str, dict[str, Any]] = {}
        if not self.settings.output_path:
            return kept
        for path in sorted(self._folder().glob(f"{name}*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                try:
                    record = json.loads(line.decode("utf-8"))
                except ValueError:
                    continue
                kept[record["key"]] = {k: record[k] for k in ("key", "prediction", "loglikelihoods")}
        return kept

    @contextmanager
    def _appender(self, name: str) -> Iterator[Any]:
        """A function that adds a record to this process's file, on disk before it returns."""
        if not self.settings.output_path:
            yield lambda record: None
            return
        self._folder().mkdir(parents=True, exist_ok=True)
        with open(self._folder() / f"{name}.process{self.processes.rank}.jsonl", "ab") as file:
            if file.tell():
                file.write(b"\n")  # a killed run may have left half a line

            def append(record: dict[str, Any]) -> None:
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                file.flush()

            yield append


def cpu_dtype(name: str) -> str:
    """float32 on the CPU unless something was asked for."""
    return "fp32" if name == "auto" else name


def load(settings: Settings, dtype: "torch.dtype", device: "torch.device") -> "torch.nn.Module":
    """The model with its adapter. An adapter folder is a model too; `adapter` goes on the model that is named."""
    model = checkpoints.load_trained(Path(settings.model), dtype, settings.trust_remote_code, device)
    if not settings.adapter:
        return model
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, settings.adapter, autocast_adapter_dtype=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the adapter {settings.adapter} does not fit {settings.model} ({checkpoints.first_line(error)})"
        ) from error


def fingerprint(folders: Sequence[Path], *more: str) -> str:
    """Names a model: the files of its folders with size and time of change. Another model has another one."""
    files = sorted({path.resolve() for folder in folders for pattern in WEIGHTS for path in folder.glob(pattern)})
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([stats, more]).encode()).hexdigest()[:24]


def write_complete(path: Path, text: str) -> None:
    """Write a file that appears under its name when it is complete."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
