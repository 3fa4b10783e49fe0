"""Vectors of texts: from the cache where they are known, from the model where not.

The cache has a folder per model (named by its contents, see model_folder.identity) with files that are never changed:
each holds the vectors that one run added, and appears under its name when it is complete. A text's key is a hash of it.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval.similar.model_folder import ModelFolder, identity
from llmops.console import UserError, log

if TYPE_CHECKING:
    import numpy as np

    from eval.similar.encoder import Encoder

KEY_BYTES = 16
SAVE_EVERY = 20_000  # texts: what a run that is killed loses at most


def default_cache() -> Path:
    """Where vectors are kept unless --cache_dir says otherwise."""
    home = Path(os.environ.get("HOME") or tempfile.gettempdir())  # a container's user may have none
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "llmops" / "embeddings"


def keys_of(texts: Sequence[str]) -> "np.ndarray":
    """(n,) array of 16-byte keys."""
    import numpy as np

    digests = [hashlib.blake2b(t.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest() for t in texts]
    return np.frombuffer(b"".join(digests), dtype=f"V{KEY_BYTES}")


class Cache:
    """The known vectors of one model."""

    def __init__(self, folder: Path, model: ModelFolder, dtype: str, must_work: bool) -> None:
        self.folder: Path | None = folder / identity(model, dtype)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            message = f"the cache folder {folder} cannot be written ({error.strerror})"
            if must_work:
                raise UserError(f"{message}; pass another --cache_dir") from error
            log(f"{message}; vectors are not kept")
            self.folder = None

    def load(self, keys: "np.ndarray") -> "tuple[np.ndarray | None, np.ndarray]":
        """(vectors (n, d) with those known in place or None, which rows are known)."""
        import numpy as np

        known = np.zeros(len(keys), bool)
        vectors = None
        for path in sorted(self.folder.glob("*.keys.npy")) if self.folder else []:
            try:
                held = np.load(path).view(f"V{KEY_BYTES}").ravel()
                values = np.load(path.with_name(path.name.replace(".keys.", ".vectors.")), mmap_mode="r")
            except (OSError, ValueError, EOFError) as error:
                log(f"{path} cannot be read ({error}) and is passed over")
                continue
            if vectors is None:
                vectors = np.zeros((len(keys), values.shape[1]), np.float32)
            if values.shape != (len(held), vectors.shape[1]):
                log(f"{path} does not fit its vectors and is passed over")
                continue
            place = {key: i for i, key in enumerate(held.tolist())}
            rows = [(k, place[key]) for k, key in enumerate(keys.tolist()) if not known[k] and key in place]
            for start in range(0, len(rows), SAVE_EVERY):
                ours, theirs = (list(side) for side in zip(*rows[start : start + SAVE_EVERY], strict=True))
                vectors[ours] = values[theirs]
                known[ours] = True
        return vectors, known

    def save(self, keys: "np.ndarray", vectors: "np.ndarray") -> None:
        """Add vectors; the file of keys comes last, so what has keys is complete."""
        import numpy as np

        if self.folder is None:
            return
        name = hashlib.sha256(keys.tobytes()).hexdigest()[:32]
        raw = np.frombuffer(keys.tobytes(), np.uint8).reshape(len(keys), KEY_BYTES)
        for kind, values in (("vectors", vectors), ("keys", raw)):
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".part-", delete=False) as file:
                np.save(file, values)
                file.flush()
                os.fsync(file.fileno())
            Path(file.name).replace(self.folder / f"{name}.{kind}.npy")


def embed(texts: Sequence[str], cache: Cache, load: "Callable[[], Encoder]") -> "np.ndarray":
    """Unit vectors (n, d) float32 of different texts; `load` makes the encoder and is called only when needed."""
    import numpy as np

    keys = keys_of(texts)
    vectors, known = cache.load(keys)
    missing = np.nonzero(~known)[0]
    log(f"{len(texts) - len(missing)} of {len(texts)} texts are in the cache")
    if not len(missing):
        assert vectors is not None
        return vectors
    from eval.similar.encoder import bar

    encoder = load()
    done, end = bar(len(missing))
    for start in range(0, len(missing), SAVE_EVERY):
        rows = missing[start : start + SAVE_EVERY]
        found = encoder.encode([texts[i] for i in rows], done)
        if vectors is None:
            vectors = np.zeros((len(texts), found.shape[1]), np.float32)
        vectors[rows] = found
        cache.save(keys[rows], found)
    end()
    assert vectors is not None
    return vectors
