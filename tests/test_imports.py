"""What a start imports, and what it leaves alone."""

import gc
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment

from llmops.imports import quick_imports
from train import muon

START = """
import gc, sys
from llmops.imports import quick_imports
from train.finetune import UNUSED, unused
assert unused() == UNUSED
with quick_imports(*unused()):
    from train import session
from train import muon
muon.compile_late()
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
print(*sorted({*UNUSED, "pandas", "torch._inductor.compile_fx"} & set(sys.modules)))
assert gc.isenabled() and gc.get_freeze_count() > 100_000
assert not unused()
import datasets, mlflow, scipy.optimize
"""


def test_a_training_imports_nothing_that_it_does_not_use() -> None:
    done = subprocess.run(
        [sys.executable, "-c", START], cwd=ROOT, env=environment() | {"DS_ACCELERATOR": "cpu"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == ""


def test_what_is_hidden_is_there_after_the_block_and_collecting_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with quick_imports("wave", "json"):
        assert not gc.isenabled()
        import json  # noqa: F401 - it was there before

        with pytest.raises(ImportError):
            import wave
    import wave  # noqa: F401

    assert gc.isenabled()
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_function_that_is_compiled_late_computes_the_same() -> None:
    with torch.compiler.set_stance("force_eager"):  # needs no C++ compiler
        assert muon.late(torch.add)(torch.ones(2), torch.ones(2), alpha=3).tolist() == [4, 4]


def test_scores_import_no_classifiers() -> None:
    code = (
        "import sys\nfrom eval import metrics\n"
        "assert metrics.bleu('a b c', ['a b c']) == 1 == metrics.rouge('甲乙', ['甲乙'])['rouge2']\n"
        "assert metrics.cmrc_tokens('甲b') == ['甲', 'b']\n"
        "print(*sorted({'sklearn', 'scipy'} & set(sys.modules)))\nimport sklearn"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == ""
