"""Texts to unit vectors with a sentence embedding model: sentence-transformers' modules, in batches of our own.

What `SentenceTransformer.encode` spends half of its time on is left out:
- on the CPU the matrices are multiplied by the fastest of torch's exact kernels (`llmops.machine.cpu_kernels`);
- short sequences take the plain attention: the fused one starts too much for a matrix of 16 by 16;
- batches have as many tokens as keep the caches busy, of texts of about one length.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmops.console import RunStopped, UserError, log, progress
from llmops.embedding.folder import COPY, LIBRARY, ModelFolder
from llmops.imports import quick_imports
from llmops.loading import loading
from llmops.machine import cpu_kernels

if TYPE_CHECKING:
    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32768}
TEXTS_AT_ONCE = 1024  # tokenized together
PLAIN_ATTENTION_UP_TO = 64  # tokens
CURE = "copy the folder again, or pass --trust_remote_code true if you trust the code in it"
Features = dict[str, Any]


class Encoder:
    """A loaded model. `device`: cpu or cuda:N. `dtype`: fp32, bf16 or fp16, of the weights."""

    def __init__(self, folder: ModelFolder, device: str, dtype: str, trust_remote_code: bool) -> None:
        import torch
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.folder, self.device = folder, torch.device(device)
        self.tokens_per_batch = TOKENS_PER_BATCH[self.device.type]
        number = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        with loading(f"the embedding model {folder.folder}", CURE):
            self.model = load_model(folder, device, number, trust_remote_code).eval()
            self.prompt = self.model.prompts.get(self.model.default_prompt_name or "")
        core: Any = self.model.transformers_model
        self.vocabulary = core.get_input_embeddings().weight.shape[0] if core is not None else 0
        self.core = core
        self.fused = core is not None and core.config._attn_implementation == "sdpa"
        self.attention = ""
        positions = int(getattr(core and core.config, "max_position_embeddings", 0) or 0)
        if positions > 0 and (self.model.max_seq_length or positions) > positions:
            self.model.max_seq_length = positions
        cpu_kernels.use(self.device, number)
        with loading(f"the embedding model {folder.folder}", CURE):
            self.encode(["."])  # modules that do not fit each other show here

    def encode(self, texts: Sequence[str], done: Callable[[int], None] | None = None) -> "np.ndarray":
        """Unit vectors (n, d) float32 in the order of the texts."""
        import numpy as np
        import torch

        order = sorted(range(len(texts)), key=lambda i: -len(texts[i].encode("utf-8", "surrogatepass")))
        vectors: np.ndarray | None = None
        with torch.inference_mode():
            for start in range(0, len(order), TEXTS_AT_ONCE):
                rows = np.array(order[start : start + TEXTS_AT_ONCE])
                features = self.model.preprocess([texts[i] for i in rows], prompt=self.prompt)
                self.check_tokens(features)
                for places, found in self.batches(features, len(rows)):
                    if vectors is None:
                        vectors = np.empty((len(texts), found.shape[1]), np.float32)
                    vectors[rows[places]] = found
                    if done:
                        done(len(places))
        assert vectors is not None
        if not np.isfinite(vectors).all():
            raise UserError(
                f"{self.folder.folder} gives vectors that are no numbers; try --dtype fp32 or another model"
            )
        return vectors

    def check_tokens(self, features: Features) -> None:
        """Raise UserError for tokens that the model does not know, which torch takes for a fault of ours."""
        highest = int(features["input_ids"].max()) if features["input_ids"].numel() else 0
        if self.vocabulary and highest >= self.vocabulary:
            raise UserError(
                f"{self.folder.folder}: the tokenizer writes the token {highest} and the model knows "
                f"{self.vocabulary}, from 0; copy the folder again"
            )

    def batches(self, features: Features, count: int) -> "Iterator[tuple[list[int], np.ndarray]]":
        """(rows, their vectors) of texts tokenized together, longest first; fewer at once where memory ends."""
        import torch

        mask = features["attention_mask"]
        lengths = mask.sum(1)
        order = torch.argsort(lengths, descending=True, stable=True).tolist()
        position = 0
        while position < count:
            width = max(1, int(lengths[order[position]]))
            places = order[position : position + max(1, self.tokens_per_batch // width)]
            columns = slice(0, width) if bool(mask[:, 0].all()) else slice(mask.shape[1] - width, None)
            cut = {
                key: value[places, columns] if isinstance(value, torch.Tensor) and value.shape == mask.shape else value
                for key, value in features.items()
            }
            try:
                found = self.batch(cut, width)
            except torch.OutOfMemoryError as error:
                if len(places) == 1:
                    raise RunStopped(
                        f"the GPU's memory does not suffice for one text of {width} tokens; pass --gpu_id -1 or "
                        "another --dtype"
                    ) from error
                torch.cuda.empty_cache()
                self.tokens_per_batch //= 2
                log(f"GPU memory ran out: {self.tokens_per_batch} tokens per batch from here")
                continue
            yield places, found
            position += len(places)

    def batch(self, features: Features, width: int) -> "np.ndarray":
        """Unit vectors (n, d) of texts of about one length, `width` tokens."""
        import torch

        from llmops.machine import fused_attention

        attention = "eager" if width <= PLAIN_ATTENTION_UP_TO else fused_attention.NAME
        if self.fused and attention != self.attention:
            self.attention = attention
            self.core.set_attn_implementation(attention)
        moved = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in features.items()}
        vectors = self.model(moved)["sentence_embedding"].float()[:, : self.model.truncate_dim]
        return torch.nn.functional.normalize(vectors, dim=1).cpu().numpy()


def load_model(
    folder: ModelFolder, device: str, dtype: "torch.dtype", trust_remote_code: bool
) -> "SentenceTransformer":
    """The folder as sentence-transformers loads it; raises UserError for a transformer whose weights are not all there.

    Nothing is downloaded, and code that the folder brings runs only when it is trusted.
    """
    with quick_imports():
        from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    class Whole(Transformer):
        """A transformer that says which tensors its files lack; the library makes them up."""

        def _load_model(self, *given: Any, **more: Any) -> Any:
            loaded: Any = super()._load_model(*given, output_loading_info=True, **more)
            model, found = loaded
            lost = [name for name in found["missing_keys"] if "pooler" not in name and "position_ids" not in name]
            if lost:
                raise UserError(
                    f"{folder.folder}: its weights lack {len(lost)} of the model's tensors, such as "
                    f"{sorted(lost)[0]}; {COPY}"
                )
            return model

    more: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    if folder.reference:
        whole = {folder.reference: Whole} if folder.reference.startswith(LIBRARY) else {}
        return SentenceTransformer._load_with_module_classes(
            str(folder.folder), whole, device=device, model_kwargs={"dtype": dtype}, **more
        )
    core = Whole(
        str(folder.folder), model_kwargs={"dtype": dtype, **more}, processor_kwargs=more, config_kwargs=dict(more)
    )
    return SentenceTransformer(modules=[core, Pooling(core.get_embedding_dimension(), "mean")], device=device)


def bar(total: int) -> tuple[Callable[[int], None], Callable[[], None]]:
    """(report so many texts as encoded, end) of a progress bar with ETA on stderr."""
    steps = progress(range(total), "encoding", total, "texts")

    def done(count: int) -> None:
        for _ in range(count):
            next(steps, None)

    def end() -> None:
        next(steps, None)

    return done, end
