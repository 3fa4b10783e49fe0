"""Heat map of the intents that are confused most."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.similar.findings import Findings
from eval.similar.groups import gather
from llmops import pictures

if TYPE_CHECKING:
    import numpy as np

SHOWN = 20  # intents
LABEL_LENGTH = 24


def draw(found: Findings, path: Path) -> None:
    """Write a PNG: pairs of similar questions between each two of the most confused intents."""
    import numpy as np

    groups = gather(found)
    confused = list(dict.fromkeys(intent for group in groups for intent in group.intents))
    chosen = confused[:SHOWN]  # of the groups with the most pairs; what is confused stands side by side
    place = {intent: i for i, intent in enumerate(chosen)}
    counts = np.zeros((len(chosen), len(chosen)), int)
    merged = []
    for group in groups:
        if all(intent in place for intent in group.intents):
            i, j = sorted((place[intent] for intent in group.intents), reverse=True)
            counts[i, j] = len(group.rows)
            if group.merge:
                merged.append((j, i))
    names = [found.questions.intents[intent] for intent in chosen]
    labels = [name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 2] + ".." for name in names]
    paint(counts, merged, pictures.prepare_labels(labels), len(confused), path)


def paint(counts: "np.ndarray", merged: list[tuple[int, int]], labels: list[str], all_intents: int, path: Path) -> None:
    """Lower triangle of counts; the squares of intents that should be merged are framed."""
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    size = len(labels)
    side = max(5.0, 2.5 + 0.38 * size)
    figure, axes = plt.subplots(figsize=(side + 1, side), dpi=120, layout="constrained")
    if not size:
        axes.text(0.5, 0.5, "no confused intents", ha="center", va="center")
        axes.set_axis_off()
        pictures.save(figure, path)
        return
    shown = np.ma.masked_where(counts == 0, counts)
    many = counts.max() > 50
    image = axes.imshow(shown, cmap="YlOrRd", norm="log" if many else None, vmin=1)
    for i, j in zip(*counts.nonzero(), strict=True):
        shade: Any = image.norm(counts[i, j])
        dark = shade > 0.6
        axes.text(j, i, f"{counts[i, j]}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    for x, y in merged:
        axes.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#2a6fbb", linewidth=2))
    axes.set_xticks(range(size), labels, rotation=55, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(size), labels, fontsize=8)
    axes.set_xticks(np.arange(-0.5, size), minor=True)
    axes.set_yticks(np.arange(-0.5, size), minor=True)
    axes.grid(which="minor", color="#eeeeee", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    more = f", the {size} most confused of {all_intents} intents" if all_intents > size else ""
    title = f"Similar questions with different intents: pairs{more}\nblue frame: the intents are similar, too"
    axes.set_title(title, fontsize=9)
    ticks = None if many else MaxNLocator(integer=True)
    figure.colorbar(image, ax=axes, shrink=0.6, label="pairs", ticks=ticks)
    pictures.save(figure, path)
