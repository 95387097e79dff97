"""Pictures of state dimensions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_compressm.plot._canvas import (
    FONT,
    GREY,
    KEPT,
    LINES,
    label_ends,
    new_figure,
    panels,
    short,
    spread,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_before_after", "plot_state_dims"]

MOST_BARS = 24

Event = Mapping[str, Any]
Course = tuple[tuple[int, int], ...]
"""(step, state dimension from there on), in order."""


def plot_state_dims(history: Iterable[Event], until: int | None = None) -> Figure:
    """State dimensions of layers over optimizer steps.

    Layers that go the same way share a line. If there are more than 7 ways, the lines are grey,
    and the largest layer, the smallest and the median at the end are labelled.

    Args:
        history: events in the order in which they happened, such as ``callback.history``.
        until: optimizer steps at the picture's end; ``None`` for a little after the last event.

    Returns:
        A matplotlib figure, not shown and not saved.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> event = {"layer": "lru", "step": 100, "old_state_dim": 64, "new_state_dim": 32}
        >>> [text.get_text() for text in plot_state_dims([event]).axes[0].texts]
        ['lru: 32']
    """
    courses = _courses(history)
    last = max((step for course in courses.values() for step, _ in course), default=0)
    end = max(until or 0, last + max(1, last // 10))
    alike: dict[Course, list[str]] = {}
    for name, course in courses.items():
        alike.setdefault(course, []).append(name)
    figure, (axes,) = panels(1)
    many = len(alike) > len(LINES)
    colours = [GREY] * len(alike) if many else LINES
    for colour, course in zip(colours, alike, strict=False):
        _draw_course(axes, course, end, color=colour, alpha=0.5 if many else 1.0)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, end)
    axes.set_xlabel("optimizer steps", fontsize=FONT + 1)
    axes.set_ylabel("state dimension", fontsize=FONT + 1)
    if many:
        _label_extremes(axes, courses, end)
    else:
        groups = zip(colours, alike.items(), strict=False)
        ends = [(c[-1][1], f"{_names(names)}: {c[-1][1]}", colour) for colour, (c, names) in groups]
        label_ends(axes, ends)
    return figure


def plot_before_after(history: Iterable[Event]) -> Figure:
    """State dimension of each layer before its first event and after its last one, as bars.

    Of more than 24 layers 23 are drawn, evenly chosen from the first to the last, and the mean of
    the others.

    Args:
        history: events in the order in which they happened, such as ``callback.history``.

    Returns:
        A matplotlib figure, not shown and not saved.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> event = {"layer": "lru", "step": 100, "old_state_dim": 64, "new_state_dim": 32}
        >>> [text.get_text() for text in plot_before_after([event]).axes[0].texts]
        ['64 → 32']
    """
    dims = {name: (c[0][1], c[-1][1]) for name, c in _courses(history).items()}
    bars = _bars(dims)
    figure = new_figure(height=1.0 + 0.26 * max(len(bars), 1))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    places = range(len(bars))
    axes.barh(places, [before for _, before, _ in bars], color="#D0D0D0", height=0.75)
    axes.barh(places, [after for _, _, after in bars], color=KEPT, height=0.45)
    for place, (_, before, after) in zip(places, bars, strict=True):
        text = f"{before:g} → {after:g}" if before != after else f"{before:g}"
        axes.annotate(text, (max(before, after), place), (4, 0), textcoords="offset points",
                      va="center", fontsize=FONT)  # fmt: skip
    axes.set_yticks(places, [name for name, _, _ in bars], fontsize=FONT)
    axes.tick_params(axis="x", labelsize=FONT)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.set_xlabel("state dimension, before (grey) and after (blue)", fontsize=FONT + 1)
    return figure


def _courses(history: Iterable[Event]) -> dict[str, Course]:
    """Layer name -> its state dimensions, from step 0 on."""
    courses: dict[str, Course] = {}
    for event in history:
        course = courses.get(event["layer"], ((0, event["old_state_dim"]),))
        if event["new_state_dim"] != course[-1][1]:
            course = (*course, (event["step"], event["new_state_dim"]))
        courses[event["layer"]] = course
    return courses


def _draw_course(axes: Axes, course: Course, end: int, **style: Any) -> None:
    steps, dims = zip(*course, (end, course[-1][1]), strict=True)
    axes.step(steps, dims, where="post", **style)


def _names(names: Sequence[str]) -> str:
    if len(names) <= 2:
        return ", ".join(short(name, 18) for name in names)
    return f"{short(names[0], 18)} and {len(names) - 1} more"


def _label_extremes(axes: Axes, courses: Mapping[str, Course], end: int) -> None:
    last = {name: course[-1][1] for name, course in courses.items()}
    labels = [(statistics.median(last.values()), f"median: {statistics.median(last.values()):g}")]
    for name in (max(last, key=last.__getitem__), min(last, key=last.__getitem__)):
        labels.append((last[name], f"{short(name, 18)}: {last[name]}"))
    steps = sorted({step for course in courses.values() for step, _ in course})
    middle = [statistics.median(_at(course, step) for course in courses.values()) for step in steps]
    axes.step([*steps, end], [*middle, middle[-1]], where="post", color=KEPT, linewidth=2.5)
    colours = (KEPT, GREY, GREY)
    label_ends(axes, [(y, text, c) for (y, text), c in zip(labels, colours, strict=True)])


def _at(course: Course, step: int) -> int:
    return next(dim for start, dim in reversed(course) if start <= step)


def _bars(dims: Mapping[str, tuple[int, int]]) -> list[tuple[str, float, float]]:
    shown = spread(list(dims), MOST_BARS if len(dims) <= MOST_BARS else MOST_BARS - 1)
    bars = [(short(name), float(dims[name][0]), float(dims[name][1])) for name in shown]
    others = [dims[name] for name in dims if name not in shown]
    if others:
        before, after = (round(statistics.mean(column), 1) for column in zip(*others, strict=True))
        bars.append((f"mean of {len(others)} others", before, after))
    return bars
