"""The picture of accuracy against training time: few arms, names that can be read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmarks.compare.frontier import SHOWN, draw_frontier, draw_panel, frontier, points_of
from benchmarks.compare.methods_page import Report
from benchmarks.compare.tasks import TASKS
from benchmarks.compare.unit import Result

ACCURACIES = {"full": 0.95, "bare": 0.949, "defaults": 0.948, "published-as-bare": 0.9}
TIMES = {"full": 10.0, "bare": 7.5, "defaults": 9.5, "published-as-bare": 7.0, "small-as-bare": 6.5}


def results(arms: dict[str, float]) -> list[Result]:
    return [
        Result("digits", seed, arm, None, [8], y + 0.002 * seed, 0.1, [], TIMES[arm], full_cpu=10)
        for arm, y in arms.items()
        for seed in (0, 1, 2)
    ]


def report(arms: dict[str, float]) -> Report:
    return Report([TASKS["digits"], TASKS["delay"]], results(arms), "a command", {"torch": "2"})


def test_the_frontier_has_what_nothing_beats() -> None:
    points = points_of(report({**ACCURACIES, "small-as-bare": 0.91}), TASKS["digits"])
    assert [point.name for point in frontier(points)] == [
        "small from scratch", "CompreSSMCallback()", "full",
    ]  # fmt: skip


def test_names_do_not_lie_on_each_other() -> None:
    figure = Figure(figsize=(4.1, 3.4), dpi=110)
    axes = figure.subplots()
    points = points_of(report({**ACCURACIES, "small-as-bare": 0.899}), TASKS["digits"])
    assert len(points) == len(SHOWN)
    draw_panel(axes, points)
    figure.canvas.draw()
    # Letters as high as they are drawn, in the middle of where they are put.
    middles = sorted(axes.transData.transform((0, name.xyann[1]))[1] for name in axes.texts)
    height = max(Text.get_window_extent(name).height for name in axes.texts)
    assert len(middles) == len(points)
    assert all(upper - lower > height for lower, upper in pairwise(middles))
    assert middles[-1] + height / 2 < axes.get_window_extent().y1


def test_tasks_without_results_get_no_panel(tmp_path: Path) -> None:
    path = draw_frontier(report(ACCURACIES), tmp_path / "pictures" / "x.png")
    assert path.read_bytes().startswith(b"\x89PNG")
