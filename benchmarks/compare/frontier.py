"""One picture of what matters: accuracy against training time, few arms, named at the points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING

from benchmarks.compare.methods_page import Report
from benchmarks.compare.statistics import accuracy, select, time_to_full, values_of
from benchmarks.compare.tasks import CompareTask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind tell apart; no more arms than can be read.
SHOWN = {
    "full": ("full", "#000000"),
    "bare": ("CompreSSMCallback()", "#D55E00"),
    "defaults": ("CompreSSMCallback(0.05)", "#E69F00"),
    "published-as-bare": ("as published", "#0072B2"),
    "small-as-bare": ("small from scratch", "#009E73"),
}
LEAST_GAP = 0.09  # between two names, as a share of the panel's height


@dataclass(frozen=True)
class Point:
    """One arm of a task.

    Attributes:
        name: Beside the point.
        color: Of point and name.
        times: Training time / full, for each seed.
        accuracies: On the test set, for each seed.
    """

    name: str
    color: str
    times: tuple[float, ...]
    accuracies: tuple[float, ...]

    @property
    def x(self) -> float:
        """Median of the times."""
        return median(self.times)

    @property
    def y(self) -> float:
        """Mean of the accuracies."""
        return mean(self.accuracies)

    @property
    def error(self) -> float:
        """Standard error of that mean; 0 with one seed."""
        n = len(self.accuracies)
        return stdev(self.accuracies) / n**0.5 if n > 1 else 0.0


def points_of(report: Report, task: CompareTask) -> list[Point]:
    """The arms shown that this task has results of."""
    found = []
    for arm, (name, color) in SHOWN.items():
        runs = select(report.results, task=task.name, arm=arm, size=None)
        times = values_of(runs, time_to_full)
        if times:
            found.append(Point(name, color, tuple(times), tuple(values_of(runs, accuracy))))
    return found


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other is both faster and as accurate as, from the fastest on."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved upwards as little as needed for a gap between any two; in the same order.

    Example:
        >>> spread([0.5, 0.1, 0.45], 0.1)
        [0.55, 0.1, 0.45]
    """
    moved, last = [0.0] * len(heights), float("-inf")
    for place in sorted(range(len(heights)), key=heights.__getitem__):
        last = max(heights[place], last + gap)
        moved[place] = last
    return moved


def draw_frontier(report: Report, path: Path) -> Path:
    """A panel for each task, two in a row; readable at 900 pixels."""
    from matplotlib.figure import Figure

    tasks = [task for task in report.tasks if points_of(report, task)]
    rows = ceil(len(tasks) / 2)
    figure = Figure(figsize=(8.2, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).flat
    for axes, task in zip(panels, tasks, strict=False):
        draw_panel(axes, points_of(report, task))
        axes.set_title(task.title.split(",")[0].split(":")[0], fontsize="medium")
    for axes in list(panels)[len(tasks) :]:
        axes.set_axis_off()
    figure.supxlabel(f"training time / full (CPU, {len(report.seeds)} seeds)", fontsize="medium")
    figure.supylabel("test accuracy, ± standard error", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def draw_panel(axes: Axes, points: Sequence[Point]) -> None:
    """Points, their names, and the frontier as a grey line."""
    best = frontier(points)
    axes.plot([p.x for p in best], [p.y for p in best], color="#BBBBBB", linewidth=5, zorder=0)
    for point in points:
        axes.errorbar(point.x, point.y, yerr=point.error, fmt="o", color=point.color, capsize=3)
    least, most = min(p.y - p.error for p in points), max(p.y + p.error for p in points)
    height = (most - least) or 0.01
    left = min(p.x for p in points)
    axes.set_xticks([0.7, 0.8, 0.9, 1.0])
    axes.set_xlim(left - 0.05, 1.05 + 0.75 * (1.05 - left))  # room for names
    gap = LEAST_GAP * 1.4 * height
    names = spread([p.y for p in points], gap)
    axes.set_ylim(least - 0.1 * height, max(most, *names) + gap)
    for point, y in zip(points, names, strict=True):
        axes.annotate(
            point.name,
            (point.x, point.y),
            (1.1, y),
            color=point.color,
            fontsize="small",
            va="center",
            arrowprops={"arrowstyle": "-", "color": point.color, "linewidth": 0.5, "alpha": 0.5},
        )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
