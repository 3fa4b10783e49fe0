"""eval/two_empirical_formulas.ipynb: the formulas as given, and the notebook runs from top to bottom."""

import re
from typing import Any

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

PATH = ROOT / "eval" / "two_empirical_formulas.ipynb"


def test_the_formulas_are_as_given(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: 7e9 * 2 / 5e10 * 2.5 * 10 = 7 GB; 1e9 * 7e9 * 8 / (312e12 * 0.3 * 86400) = 6.925 days."""
    names: dict[str, Any] = {}
    cell = next(cell for cell in nbformat.read(PATH, 4).cells if "def memory_usage" in cell.source)
    exec(cell.source, names)
    assert "7.00 GB" in capsys.readouterr().out
    assert names["memory_usage"](7e9, 10, 2) == pytest.approx(7.0)
    assert names["memory_usage"](7e9, 10) == pytest.approx(3.5)
    assert names["memory_usage"](13e9, 4, 2, overhead_factor=0.5, num_gpus=2) == pytest.approx(1.56)
    assert names["evaluation_duration"](1e9, 7e9, 312e12) == pytest.approx(6.9246, abs=1e-4)
    assert names["evaluation_duration"](1e9, 7e9, 312e12, 0.6, 4) == pytest.approx(6.9246 / 8, abs=1e-4)


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    """Every cell, in a kernel of its own; the measurements and both pictures are there."""
    notebook = nbformat.read(PATH, 4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": PATH.parent}}
    ).execute()
    texts = [o.text for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream"]
    table = next(text for text in texts if text.startswith("weights"))
    rows = re.findall(r"M +(\d+) +(training|evaluation) +([\d.]+) +([\d.]+) +(\d+) +(\d+)", table)
    assert len(rows) == 12
    for _, _, given, measured, _, speed in rows:
        assert float(measured) > 0
        assert float(given) < float(measured)  # small batches: the formula says far too little, as the text tells
        assert int(speed) > 0
    assert sum("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", [])) == 2
