"""All sections as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.speed.results import Ratio, Row, Section

COLUMNS = 2
# Told apart by people with colour blindness (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw(sections: Sequence[Section], path: Path) -> None:
    """Save a panel for every section that has more than one ratio to show."""
    shown = [s for s in sections if sum(len(points(row)) for row in s.rows) > 1]
    lines = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(9 * COLUMNS, 4.5 * max(1, lines)), layout="constrained")
    for index, section in enumerate(shown):
        axes = figure.add_subplot(lines, COLUMNS, index + 1)
        against = all(row.states is not None for row in section.rows)
        (_curves if against else _bars)(axes, section)
        axes.set_title(f"{section.title}, CPU, {section.threads} thread(s)", fontsize=10)
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def points(row: Row) -> list[tuple[str, Ratio]]:
    """Every ratio of a row that was measured, with its heading."""
    found = ((name, cell) for name, cell in row.cells.items() if isinstance(cell, Ratio))
    return [(name, cell) for name, cell in found if cell.values]


def _curves(axes: Any, section: Section) -> None:
    """The first ratio of each row against N, one line a group; of others where they are few."""
    curves: dict[str, list[tuple[int, Ratio]]] = {}
    own_lines = section.part == "analysis"
    for row in section.rows:
        assert row.states is not None
        for name, ratio in points(row) if own_lines else points(row)[:1]:
            key = name if own_lines else _curve_of(row)
            curves.setdefault(key, []).append((row.states, ratio))
    for index, (name, curve) in enumerate(curves.items()):
        curve.sort(key=lambda point: point[0])
        ratios = [ratio for _, ratio in curve]
        spread = [
            [r.median - min(r.values) for r in ratios],
            [max(r.values) - r.median for r in ratios],
        ]
        axes.errorbar(
            [states for states, _ in curve],
            [r.median for r in ratios],
            spread,
            marker="o",
            capsize=3,
            label=name,
            color=COLORS[index % len(COLORS)],
            linestyle=("-", "--", ":")[index // len(COLORS) % 3],
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("states N")
    heading = points(section.rows[0])[0][0]
    axes.set_ylabel("ratio" if own_lines else f"this {heading}")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))  # over no curve


def _curve_of(row: Row) -> str:
    """What stays the same along a curve: the group, and what a label says but for N."""
    rest = row.label.removeprefix(f"N={row.states}").lstrip(", ")
    return f"{rest}, {row.group}" if rest else row.group


def _bars(axes: Any, section: Section) -> None:
    rows = [row for row in section.rows if points(row)][::-1]
    for place, row in enumerate(rows):
        ratio = points(row)[0][1]
        spread = [[ratio.median - min(ratio.values)], [max(ratio.values) - ratio.median]]
        # Points, not bars: on a logarithmic scale the length of a bar says nothing.
        axes.errorbar([ratio.median], [place], xerr=spread, fmt="o", capsize=3, color=COLORS[0])
        if ratio.target is not None:
            axes.plot([ratio.target] * 2, [place - 0.4, place + 0.4], color=COLORS[1], lw=2)
    axes.set_yticks(range(len(rows)), [f"{row.label}\n{row.group}" for row in rows], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlim(min(1, axes.get_xlim()[0]))
    _plain_numbers(axes.xaxis)
    axes.set_xlabel(f"{points(rows[0])[0][0]} (bar: target)")


def _plain_numbers(axis: Any) -> None:
    """Label 1, 2, 5, 10, ... as such, not as powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
