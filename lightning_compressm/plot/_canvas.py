"""What all pictures share: size, colours, panels, names, and labels that keep apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DISCARDED",
    "FONT",
    "GREY",
    "KEPT",
    "LINES",
    "label_ends",
    "log_axis",
    "new_figure",
    "panels",
    "short",
    "spread",
]

# Okabe and Ito's colours, which colour-blind people can tell apart; yellow is too pale for a line.
KEPT, DISCARDED, GREY = "#0072B2", "#D55E00", "#7F7F7F"
LINES = (KEPT, DISCARDED, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
FONT = 8.5  # points; legible where a picture of 9 inches is shown 900 pixels wide
WIDTH = 9.0  # inches

T = TypeVar("T")


def new_figure(width: float = WIDTH, height: float = 4.0) -> Figure:
    """An empty figure of so many inches.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install 'lightning_compressm[plot]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, at least one."""
    count = max(count, 1)
    columns = count if count <= 3 else math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    figure = new_figure(6.4 if columns == 1 else WIDTH, 4.0 if rows == 1 else 0.4 + 2.2 * rows)
    return figure, [_panel(figure, rows, columns, i + 1) for i in range(count)]


def _panel(figure: Figure, *place: int) -> Axes:
    axes = figure.add_subplot(*place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT)
    return axes


def log_axis(axes: Axes) -> None:
    """Make y logarithmic, with few ticks: they are most of what drawing takes."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.margins(y=0.12)  # room for a label above the first value
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def short(name: str, most: int = 22) -> str:
    """A layer's name, its end if it is long."""
    name = name or "model"
    return name if len(name) <= most else f"…{name[-most + 1 :]}"


def label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]], **settings: Any) -> None:
    """Text to the right of lines, moved apart where it would overlap.

    Args:
        axes: with a linear y axis whose limits are final.
        labels: height at which a line ends, text and colour.
        settings: of the text.
    """
    low, high = axes.get_ylim()
    gap = (high - low) * 1.5 * FONT * axes.figure.dpi / 72 / axes.bbox.height
    ordered = sorted(labels)
    heights = [height for height, _, _ in ordered]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    over = max(0.0, heights[-1] - high) if heights else 0.0
    for i in reversed(range(len(heights))):  # what went out at the top pushes the others down
        top = high if i == len(heights) - 1 else heights[i + 1] - gap
        heights[i] = min(heights[i], top) if over else heights[i]
    for height, (_, text, colour) in zip(heights, ordered, strict=True):
        axes.annotate(
            text,
            (1.01, height),
            xycoords=("axes fraction", "data"),
            color=colour,
            fontsize=FONT,
            va="center",
            annotation_clip=False,
            **settings,
        )
