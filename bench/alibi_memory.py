"""Memory of Baichuan2-13B's attention mask: one layer of the real size, with the patches of llmops.legacy and without.

    python bench/alibi_memory.py CHECKPOINT [--tokens 512] [--dtype float32]

CHECKPOINT is any Baichuan2-13B folder (a tiny one of tests/make_vendor_checkpoints.py will do): only its code is used,
with 40 heads, width 5,120, 4,096 positions, one layer and 1,000 words. Prints one JSON object per row.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MIB = 2**20


def measure(folder: Path, tokens: int, dtype: str, patched: bool) -> dict[str, object]:
    """Resident memory before and at its peak in a forward pass in evaluation, and the buffers that stay; MiB."""
    import torch

    from llmops.legacy import patches

    names = patches.auto_map(folder)
    if patched:
        patches.prepare_model(folder)
    config = patches.load_class(names["AutoConfig"], folder).from_pretrained(str(folder))
    for name, value in {
        "num_attention_heads": 40, "hidden_size": 5120, "intermediate_size": 13696, "num_hidden_layers": 1,
        "model_max_length": 4096, "vocab_size": 1000,
    }.items():  # fmt: skip
        setattr(config, name, value)
    torch.set_default_dtype(getattr(torch, dtype))
    model = patches.load_class(names["AutoModelForCausalLM"], folder)(config).eval()
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(3, 1000, (1, tokens))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kept = sum(buffer.nbytes for buffer in model.buffers())
    return {
        "patched": patched, "dtype": dtype, "tokens": tokens,
        "weights_mib": sum(p.nbytes for p in model.parameters()) // MIB,
        "forward_adds_mib": (peak - before) // MIB, "buffers_kept_mib": kept // MIB,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Both rows, each in a process of its own, because a peak never falls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--row", choices=["patched", "vendor"], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.row:
        print(json.dumps(measure(options.checkpoint, options.tokens, options.dtype, options.row == "patched")))
        return 0
    for row in ("vendor", "patched"):
        command = [sys.executable, __file__, str(options.checkpoint), "--tokens", str(options.tokens), "--dtype"]
        done = subprocess.run(
            [*command, options.dtype, "--row", row], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        print(done.stdout.decode().strip().splitlines()[-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
