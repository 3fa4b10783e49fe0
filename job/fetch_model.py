"""Get a model from the Hugging Face hub into the local cache, and print its folder. Only when a user asked for it.

python job/fetch_model.py OWNER/NAME
HF_ENDPOINT, HF_HOME and HF_TOKEN mean what they mean to huggingface_hub.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

for _name in ("HF_ENDPOINT", "HF_HOME", "HF_TOKEN"):  # set and empty is as if it was not set
    if not os.environ.get(_name):
        os.environ.pop(_name, None)
os.environ["HF_HUB_OFFLINE"] = "0"

from llmops.console import RunStopped, run_main, stdout_to_stderr


def fetch(name: str) -> Path:
    """The folder of a model that is in the cache now. Raises RunStopped where the hub does not give it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    unwanted = ["*.msgpack", "*.h5", "*.ot", "*.onnx", "*.gguf", "original/*"]
    token = os.environ.get("HF_TOKEN") or False
    try:
        return Path(snapshot_download(name, token=token, ignore_patterns=unwanted))
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cure = "check the name, HF_ENDPOINT and HF_TOKEN"
        raise RunStopped(f"the hub does not give {name} ({reason}); {cure}") from error


def main(argv: list[str]) -> int:
    """Fetch and print."""

    def body() -> int:
        with stdout_to_stderr():
            folder = fetch(argv[0])
        print(folder)
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
