"""What training, the FAQ scenario and evaluation share.

Every command imports this first, so here stands, once, how the libraries behave. What the environment says wins.
"""

import os

LIBRARY_DEFAULTS = {
    "HF_HUB_OFFLINE": "1",  # nothing is asked of the network; 0 allows it
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",  # a stored login is not sent along, should the network be allowed
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "true",
}

for _name, _value in LIBRARY_DEFAULTS.items():
    os.environ.setdefault(_name, _value)
# torch.load never runs code from a file, whatever a library asks for: DeepSpeed asks for weights_only=False
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # torch takes one of the two
