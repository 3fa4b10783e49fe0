"""The picture of the intents that are most confused."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmops import pictures


def draw_confusions(rows: Sequence[dict[str, Any]], result: dict[str, Any], path: Path) -> None:
    """A confusion matrix of the intents in the most confused pairs: true intents in rows, predictions in columns."""
    names: dict[str, None] = {}
    for pair in result["most_confused"]:
        names.update(dict.fromkeys((pair["intent"], pair["predicted"])))
    shown = list(names)
    counts = Counter((row["reference"], row["intent"]) for row in rows)
    labels = pictures.prepare_labels(shown)
    import matplotlib.pyplot as plt

    size = max(4.5, 0.45 * len(shown) + 2.5)
    figure, axes = plt.subplots(figsize=(size, size), dpi=120, layout="constrained")
    matrix = [[counts[true, predicted] for predicted in shown] for true in shown]
    mistakes = max(counts[pair["intent"], pair["predicted"]] for pair in result["most_confused"])
    axes.imshow([[n if i != j else 0 for j, n in enumerate(row)] for i, row in enumerate(matrix)], cmap="Reds",
                vmin=0, vmax=mistakes)  # fmt: skip
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            if count:
                color = "#2e7d5b" if i == j else "white" if count > 0.6 * mistakes else "#333333"
                axes.text(j, i, str(count), ha="center", va="center", fontsize=9, color=color)
    axes.set_xticks(range(len(shown)), labels, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true intent")
    axes.set_title(f"The {len(result['most_confused'])} most confused pairs of {len(rows)} questions, accuracy "
                   f"{result['accuracy']:.1%}", fontsize=10)  # fmt: skip
    pictures.save(figure, path)
