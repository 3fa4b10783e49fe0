"""Vectors of texts: from the cache where they are known, from the model where not.

The cache has a folder per model (named by its contents, see folder.identity) with files that are never changed:
each holds the vectors that one run added, and appears under its name when it is complete. A text's key is a hash of it,
and beside it stands a checksum of its vector.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmops import files
from llmops.console import RunStopped, UserError, log
from llmops.embedding.folder import ModelFolder, identity
from llmops.loading import cause

if TYPE_CHECKING:
    import numpy as np

    from llmops.embedding.encoder import Encoder

KEY_BYTES = 16
SUM_BYTES = 4  # CRC-32 of the vector, beside its key
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
        self.must_work = must_work
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
            held = read_kept(path)
            if held is None:
                continue
            names, sums, values = held
            if vectors is None:
                vectors = np.zeros((len(keys), values.shape[1]), np.float32)
            if values.shape[1] != vectors.shape[1]:
                log(f"{path} holds vectors of another width than the file before it and is passed over")
                continue
            place = {key: i for i, key in enumerate(names)}
            rows = [(k, place[key]) for k, key in enumerate(keys.tolist()) if not known[k] and key in place]
            for start in range(0, len(rows), SAVE_EVERY):
                ours, theirs = (np.array(side) for side in zip(*rows[start : start + SAVE_EVERY], strict=True))
                given = np.asarray(values[theirs])
                sound = checksums(given) == sums[theirs]
                if not sound.all():
                    log(f"{path}: {(~sound).sum()} vectors are damaged and are computed again")
                vectors[ours[sound]] = given[sound]
                known[ours[sound]] = True
        return vectors, known

    def save(self, keys: "np.ndarray", vectors: "np.ndarray") -> None:
        """Add vectors; the file of keys comes last, so what has keys is complete."""
        import numpy as np

        if self.folder is None:
            return
        name = hashlib.sha256(keys.tobytes()).hexdigest()[:32]
        raw = np.frombuffer(keys.tobytes(), np.uint8).reshape(len(keys), KEY_BYTES)
        sums = checksums(vectors).view(np.uint8).reshape(len(keys), SUM_BYTES)
        try:
            for kind, values in (("vectors", vectors), ("keys", np.concatenate([raw, sums], 1))):
                with files.writing(self.folder / f"{name}.{kind}.npy", "wb") as file:
                    np.save(file, values)
        except (RunStopped, UserError) as error:  # a full disk is no reason to lose what was computed
            if self.must_work:
                raise
            log(f"{error}; vectors are not kept")
            self.folder = None


def checksums(vectors: "np.ndarray") -> "np.ndarray":
    """CRC-32 of each vector, uint32 (n,)."""
    import zlib

    import numpy as np

    return np.fromiter((zlib.crc32(row) for row in np.ascontiguousarray(vectors)), np.uint32, len(vectors))


def read_kept(path: Path) -> "tuple[list[bytes], np.ndarray, np.ndarray] | None":
    """(keys, checksums (n,), vectors (n, d) float32) of a file of keys and the vectors beside it; None if damaged."""
    import numpy as np

    beside = path.with_name(path.name.replace(".keys.", ".vectors."))
    try:
        for one in (path, beside):
            files.open_regular(one, "the cache file").close()
        raw = np.load(path, allow_pickle=False)
        values = np.load(beside, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, UserError) as error:
        log(f"{path} cannot be read ({cause(error)}) and is passed over")
        return None
    good = raw.dtype == np.uint8 and raw.ndim == 2 and raw.shape[1] == KEY_BYTES + SUM_BYTES
    good = good and values.dtype == np.float32 and values.ndim == 2 and len(values) == len(raw) and values.shape[1] > 0
    if not good:
        log(f"{path} and its vectors do not fit together and are passed over")
        return None
    keys = np.ascontiguousarray(raw[:, :KEY_BYTES]).view(f"V{KEY_BYTES}").ravel().tolist()
    return keys, np.ascontiguousarray(raw[:, KEY_BYTES:]).view(np.uint32).ravel(), values


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
    from llmops.embedding.encoder import bar

    encoder = load()
    done, end = bar(len(missing))
    for start in range(0, len(missing), SAVE_EVERY):
        rows = missing[start : start + SAVE_EVERY]
        found = encoder.encode([texts[i] for i in rows], done)
        if vectors is None:
            vectors = np.zeros((len(texts), found.shape[1]), np.float32)
        elif vectors.shape[1] != found.shape[1]:
            raise UserError(
                f"{cache.folder} holds vectors of width {vectors.shape[1]} and the model gives {found.shape[1]}; "
                "delete that folder"
            )
        vectors[rows] = found
        cache.save(keys[rows], found)
    end()
    assert vectors is not None
    return vectors
