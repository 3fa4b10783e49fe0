"""Texts to unit vectors with a sentence embedding model, the same that sentence-transformers gives.

Written on transformers instead of sentence-transformers, which spends half of its time on what can be left out:
- on the CPU the linear layers run in oneDNN (torch.utils.mkldnn), which uses AVX-512 on every maker's processors, where
  torch's own path is twice as slow on some;
- short sequences take the plain attention: the fused one starts too much for a matrix of 16 by 16;
- batches have as many tokens as keep the caches busy, of texts of about one length.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from eval.similar.model_folder import DenseLayer, ModelFolder
from llmops.console import RunStopped, UserError, log, progress
from llmops.loading import loading

if TYPE_CHECKING:
    import numpy as np
    import torch

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32768}
PLAIN_ATTENTION_UP_TO = 64  # tokens
CURE = "copy the folder again, or pass --trust_remote_code true if you trust the code in it"
UNLIMITED = 10**6  # tokenizers without a limit give a number like 10**30


class Encoder:
    """A loaded model. `device`: cpu or cuda:N. `dtype`: fp32, bf16 or fp16, of the weights."""

    def __init__(self, folder: ModelFolder, device: str, dtype: str, trust_remote_code: bool) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.folder, self.device = folder, torch.device(device)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        more: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        with loading(f"the embedding model {folder.folder}", CURE):
            self.tokenizer = AutoTokenizer.from_pretrained(folder.transformer, **more)
            self.model, found = AutoModel.from_pretrained(
                folder.transformer, dtype=self.dtype, output_loading_info=True, **more
            )
        self.dense = [load_dense(layer).to(self.device, self.dtype) for layer in folder.dense]
        self.check_widths()
        lost = [name for name in found["missing_keys"] if "pooler" not in name and "position_ids" not in name]
        if lost:
            raise UserError(
                f"{folder.folder}: its weights lack {len(lost)} of the model's tensors, such as {sorted(lost)[0]}; "
                "copy the folder again"
            )
        self.model.eval().to(self.device)
        self.max_length = self.longest()
        self.vocabulary = self.model.get_input_embeddings().weight.shape[0]
        self.tokens_per_batch = TOKENS_PER_BATCH[self.device.type]
        self.plain = False
        if self.device.type == "cpu" and dtype == "fp32" and torch.backends.mkldnn.is_available():
            from torch.utils.mkldnn import to_mkldnn

            self.model = to_mkldnn(self.model)

    def check_widths(self) -> None:
        """Raise UserError for a dense layer that does not take what comes out of the one before it."""
        config = self.model.config
        width = getattr(config, "hidden_size", 0) * len(self.folder.pooling)
        for layer, dense in zip(self.folder.dense, self.dense, strict=True):
            weight = next(parameter for parameter in dense.parameters() if parameter.dim() == 2)
            if width and weight.shape[1] != width:
                raise UserError(
                    f"the dense layer {layer.folder} takes {weight.shape[1]} numbers and gets {width}; copy the folder "
                    "again"
                )
            width = weight.shape[0]

    def longest(self) -> int:
        """Tokens of a text that are read: as sentence-transformers has it, never more than the model's positions."""
        config = self.model.config
        limits = [self.folder.max_length, int(getattr(config, "max_position_embeddings", 0) or 0)]
        limits.append(int(min(self.tokenizer.model_max_length, UNLIMITED)))
        if limits[0]:
            limits = limits[:1] if not limits[1] else limits[:2]
        return min(limit for limit in limits if limit > 0)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, cut at the model's limit."""
        given = [self.folder.prompt + (text.lower() if self.folder.lowercase else text) for text in texts]
        found = self.tokenizer(given, truncation=True, max_length=self.max_length, return_attention_mask=False)
        highest, known = max(max(ids, default=0) for ids in found["input_ids"]), self.vocabulary
        if highest >= known:
            raise UserError(
                f"{self.folder.folder}: the tokenizer writes the token {highest} and the model knows {known}, from 0; "
                "copy the folder again"
            )
        return found["input_ids"]

    def encode(self, texts: Sequence[str], done: Callable[[int], None] | None = None) -> "np.ndarray":
        """Unit vectors (n, d) float32 in the order of the texts."""
        import numpy as np
        import torch

        ids = self.tokenize(texts)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        vectors: np.ndarray | None = None
        position = 0
        with torch.inference_mode():
            while position < len(order):
                size = max(1, self.tokens_per_batch // max(1, len(ids[order[position]])))
                rows = order[position : position + size]
                try:
                    found = self.batch([ids[i] for i in rows])
                except torch.OutOfMemoryError as error:
                    if size == 1:
                        raise RunStopped(
                            f"the GPU's memory does not suffice for one text of {len(ids[rows[0]])} tokens; pass "
                            "--gpu_id -1 or another --dtype"
                        ) from error
                    torch.cuda.empty_cache()
                    self.tokens_per_batch //= 2
                    log(f"GPU memory ran out: {self.tokens_per_batch} tokens per batch from here")
                    continue
                if vectors is None:
                    vectors = np.empty((len(ids), found.shape[1]), np.float32)
                vectors[rows] = found
                position += len(rows)
                if done:
                    done(len(rows))
        assert vectors is not None
        if not np.isfinite(vectors).all():
            raise UserError(
                f"{self.folder.folder} gives vectors that are no numbers; try --dtype fp32 or another model"
            )
        return vectors

    def batch(self, ids: list[list[int]]) -> "np.ndarray":
        """Vectors of texts of about one length."""
        import torch

        width = max(1, *map(len, ids))
        if (width <= PLAIN_ATTENTION_UP_TO) != self.plain:
            self.plain = not self.plain
            self.model.set_attn_implementation("eager" if self.plain else "sdpa")
        pad = self.tokenizer.pad_token_id or 0
        tokens = torch.tensor([row + [pad] * (width - len(row)) for row in ids], device=self.device)
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        vectors = torch.cat([pool(hidden.float(), mask.float().unsqueeze(-1), mode) for mode in self.folder.pooling], 1)
        for layer in self.dense:
            vectors = layer(vectors.to(self.dtype))
        return torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy()


def pool(hidden: "torch.Tensor", mask: "torch.Tensor", mode: str) -> "torch.Tensor":
    """One vector per text of hidden (n, tokens, d) and mask (n, tokens, 1), padding at the end; modes as in
    sentence-transformers' Pooling."""
    import torch

    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        last = mask.sum(1).long().clamp(min=1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last[:, 0]]
    if mode == "max":
        return hidden.masked_fill(mask == 0, float("-inf")).max(1).values
    if mode == "weightedmean":
        mask = mask * torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=mask.dtype)[None, :, None]
    size = mask.sum(1).clamp(min=1e-9)
    return (hidden * mask).sum(1) / (size.sqrt() if mode == "mean_sqrt_len_tokens" else size)


def load_dense(layer: DenseLayer) -> "torch.nn.Module":
    """A Dense module of sentence-transformers."""
    import torch

    path = layer.folder / "model.safetensors"
    what = f"the dense layer {layer.folder}"
    with loading(what):
        if path.is_file():
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(layer.folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    weight, bias = weights.get("linear.weight"), weights.get("linear.bias")
    sound = isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.is_floating_point()
    sound = sound and (bias is None or bias.shape == weight.shape[:1])
    if not sound:
        raise UserError(f"{what} has no linear.weight (out, in) with its linear.bias (out); copy the folder again")
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return torch.nn.Sequential(linear, getattr(torch.nn, layer.activation)()).eval()


def bar(total: int) -> tuple[Callable[[int], None], Callable[[], None]]:
    """(report so many texts as encoded, end) of a progress bar with ETA on stderr."""
    steps = progress(range(total), "encoding", total, "texts")

    def done(count: int) -> None:
        for _ in range(count):
            next(steps, None)

    def end() -> None:
        next(steps, None)

    return done, end
