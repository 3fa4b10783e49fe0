"""Where a job's model and data are: a folder, a file, a model of the local Hugging Face cache, an address of the web.

The cache's layout is huggingface_hub's: HF_HOME/hub/models--OWNER--NAME/refs/main holds the name of a folder in
snapshots/. Nothing is fetched that was not named: data by its address, a model by its hub id with FETCH=true.
"""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from job.calls import ATTEMPT_SECONDS, CallFailed, asking, attempt, is_address, opener, persist, shown_address
from llmops import files
from llmops.console import RunStopped, UserError

HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
WEIGHTS = ("*.safetensors", "*.bin")
FETCH_SECONDS = 300.0  # of pauses, when a file is not there at once
CHUNK = 1 << 20


def hub_cache(environment: Mapping[str, str]) -> Path:
    """The folder of the local Hugging Face cache, by the variables that huggingface_hub reads."""
    if environment.get("HF_HUB_CACHE"):
        return Path(environment["HF_HUB_CACHE"])
    home = environment.get("HF_HOME")
    if home:
        return Path(home) / "hub"
    cache = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # also where there is no home
    return Path(cache) / "huggingface" / "hub"


def cached_model(name: str, environment: Mapping[str, str]) -> Path | None:
    """The folder of a model in the cache, if it is there with a config.json and weights."""
    folder = hub_cache(environment) / f"models--{name.replace('/', '--')}"
    reference = folder / "refs" / "main"
    if files.is_file(reference):
        candidates = [folder / "snapshots" / Path(files.read_text(reference, "the cache's reference").strip()).name]
    else:
        candidates = sorted((folder / "snapshots").glob("*"), key=os.path.getmtime, reverse=True)
    for snapshot in candidates:
        if files.is_file(snapshot / "config.json") and any(p for w in WEIGHTS for p in snapshot.glob(w)):
            return snapshot
    return None


def find_model(variable: str, text: str, environment: Mapping[str, str], fetch: Callable[[str], Path] | None) -> str:
    """The folder of a model that is given as a folder or as a hub id, `builtin:` names as they are.

    `fetch` gets a model from the hub; None where nobody asked for that. Raises UserError where it is nowhere.
    """
    if not text or text.startswith("builtin:") or files.is_folder(Path(text)):
        return text
    if not HUB_ID.fullmatch(text) or ".." in text:
        raise UserError(f"{variable} is {files.plain(text, 200)}, which is no folder and no hub id; check the path")
    found = cached_model(text, environment)
    if found:
        return str(found)
    if fetch is None:
        raise UserError(
            f"{variable} is {text}, which is no folder and not in the cache {hub_cache(environment)}; mount the model "
            "or that cache (HF_HOME), or set FETCH=true to fetch it from the hub"
        )
    return str(fetch(text))


def find_data(
    variable: str, text: str, folder: Path, stopped: threading.Event, tell: Callable[[str], None], allowed: bool,
    goes_on: bool,
) -> str:  # fmt: skip
    """The path of data that is given as a path or as an address; what an address names is fetched into `folder`.

    With `goes_on` a file that an earlier start fetched is taken as it is: a training needs the data that it began with.
    Raises UserError, also when it is not `allowed`, and RunStopped when the file does not come.
    """
    if not is_address(text):
        return text
    shown = shown_address(text)
    if not allowed:
        raise UserError(f"{variable} is the address {shown} and FETCH is false; set FETCH=auto, or give a path")
    digest = hashlib.sha256(shown.encode()).hexdigest()[:12]
    suffix = Path(urlsplit(text).path).suffix.lower()
    target = folder / f"{variable.lower()}-{digest}{suffix if suffix in KINDS else '.jsonl'}"
    if goes_on and files.is_file(target):
        tell(f"{variable}: {target} is there from an earlier start")
        return str(target)
    what = f"{variable}: {shown} does not come"
    try:
        size = persist(lambda: fetch_file(text, target, stopped), FETCH_SECONDS, stopped, tell, what)
    except CallFailed as failed:
        cure = "check the address and who may read it" if not failed.again else "check the network, start again"
        raise RunStopped(f"{what} ({failed}); {cure}") from failed
    tell(f"{variable}: {size:,} bytes from {shown}")
    return str(target)


def fetch_file(address: str, target: Path, stopped: threading.Event) -> int:
    """Write what an address holds; the file appears when it is complete. Its size.

    Raises CallFailed, also when `stopped` is set on the way.
    """

    def work() -> int:
        size = 0
        with opener(redirects=True).open(asking("GET", address, {}), timeout=ATTEMPT_SECONDS) as answer:
            expected = answer.headers.get("Content-Length")
            with files.writing(target, "wb") as stream:
                while chunk := attempt(lambda: answer.read1(CHUNK)):  # its errors are not those of the file
                    if stopped.is_set():
                        raise CallFailed("the job was asked to end", False)
                    stream.write(chunk)
                    size += len(chunk)
                if expected and expected.isdecimal() and size != int(expected):
                    raise CallFailed(f"it broke off after {size:,} of {int(expected):,} bytes", True)
        return size

    return attempt(work)
