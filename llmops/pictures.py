"""What all pictures share: a font that has the texts' characters, files that appear when they are complete."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmops import files
from llmops.console import UserError, log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG = b"\x89PNG\r\n\x1a\n"  # how a PNG begins
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Heiti SC", "Arial Unicode MS",
)  # fmt: skip


def prepare_labels(labels: Sequence[str]) -> list[str]:
    """Set up matplotlib without a display; the labels as they can be drawn here.

    Without an installed Chinese font, labels outside ASCII become numbers, and stderr says which is which.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    found = [name for name in CHINESE_FONTS if name in installed]
    matplotlib.rcParams["font.sans-serif"] = [*found, "DejaVu Sans"]
    matplotlib.rcParams["axes.unicode_minus"] = False
    if found or all(label.isascii() for label in labels):
        return list(labels)
    numbers = {label: f"{i}" for i, label in enumerate(labels, 1) if not label.isascii()}
    log(
        "no Chinese font is installed (Debian: fonts-wqy-microhei), so the picture shows numbers: "
        + ", ".join(f"{number} {label}" for label, number in numbers.items())
    )
    return [numbers.get(label, label) for label in labels]


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG that appears under its name when it is complete, and close the figure."""
    import matplotlib.pyplot as plt

    try:
        with files.writing(path, "wb") as stream:
            figure.savefig(stream, format="png")
    finally:
        plt.close(figure)


def refuse_other(path: Path) -> None:
    """Raise UserError for a target that is there and is no PNG: a picture replaces nothing but a picture."""
    if not path.exists():
        return
    with files.open_regular(path, "the picture's target") as stream:
        start = stream.read(8)
    if start and start != PNG:
        raise UserError(f"{path} is there and is no PNG; a picture would replace it: choose another name")
