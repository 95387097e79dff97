"""What a benchmark found: ratios with their spread, in rows, in sections; as tables and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.common.tables import rich_table

if TYPE_CHECKING:
    from rich.table import Table

Format = Literal["times", "percent"]


@dataclass(frozen=True)
class Ratio:
    """Ratios of two times (or sizes), one of each round.

    Attributes:
        values: One ratio a round; empty where nothing could be measured.
        target: What the median has to reach; None where nothing was promised.
        at_most: The median has to stay below the target, not above it.
        format: "times" (3.1x) or "percent".
        missing: Why nothing could be measured.
    """

    values: tuple[float, ...]
    target: float | None = None
    at_most: bool = False
    format: Format = "times"
    missing: str = ""

    @classmethod
    def of(
        cls,
        above: Sequence[float],
        below: Sequence[float],
        target: float | None = None,
        at_most: bool = False,
        format: Format = "times",
    ) -> Ratio:
        """Divide round by round: both numbers of a ratio were measured side by side."""
        values = tuple(a / b for a, b in zip(above, below, strict=True))
        return cls(values, target, at_most, format)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one. What is missing reaches none."""
        if self.target is None:
            return None
        if not self.values:
            return False
        return self.median <= self.target if self.at_most else self.median >= self.target

    @property
    def text(self) -> str:
        """Median, smallest and largest ratio, and the target beside them."""
        shown = self.missing
        if self.values:
            shown = self._number(self.median)
            if len(self.values) > 1:
                low, high = (self._number(f(self.values)) for f in (min, max))
                shown += f" ({low.rstrip('x%')}-{high.rstrip('x%')})"
        if self.target is not None:
            sign, verdict = ("<" if self.at_most else ">="), ("met" if self.met else "MISSED")
            shown += f"; target {sign} {self._number(self.target)}: {verdict}"
        return shown

    def _number(self, value: float) -> str:
        if self.format == "percent":
            return f"{100 * value:.2g}%"
        return f"{value:.3g}x" if value < 100 else f"{value:.0f}x"

    def to_dict(self) -> dict[str, Any]:
        numbers: dict[str, Any] = {}
        if self.values:
            numbers = {"median": self.median, "low": min(self.values), "high": max(self.values)}
        if self.target is not None:
            numbers |= {"target": self.target, "at_most": self.at_most, "met": self.met}
        if self.missing:
            numbers["missing"] = self.missing
        return {"values": list(self.values), **numbers}


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        group: Rows that differ only in the number of states share it.
        label: What was measured.
        cells: By heading: a ratio or a word.
        states: N, where the picture shows the row against it.
        seconds: What was measured before dividing, by name (bytes where memory is measured).
    """

    group: str
    label: str
    cells: dict[str, Ratio | str]
    states: int | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        cells = {k: v.to_dict() if isinstance(v, Ratio) else v for k, v in self.cells.items()}
        return {
            "group": self.group,
            "label": self.label,
            "states": self.states,
            "cells": cells,
            "raw": self.seconds,
        }


@dataclass(frozen=True)
class Section:
    """A table with its title and what a reader has to know about it."""

    part: str
    title: str
    threads: int
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    @property
    def heading(self) -> str:
        """Title and how it was timed."""
        if self.part == "memory":
            return f"{self.title} (CPU)"
        how = "one thread, processor time"
        if self.threads > 1:
            how = f"{self.threads} threads, time on the clock"
        return f"{self.title} (CPU, {how})"

    def tables(self) -> list[Table]:
        """One for each group of rows."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.group, []).append(row)
        return [_table(group, rows) for group, rows in groups.items()]

    def to_dict(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "title": self.title,
            "threads": self.threads,
            "notes": self.notes,
            "rows": [row.to_dict() for row in self.rows],
        }


def missed(sections: Sequence[Section]) -> list[str]:
    """Name every target that was not reached, or not measured."""
    return [
        f"{row.group}, {row.label}, {heading}: {cell.text}"
        for section in sections
        for row in section.rows
        for heading, cell in row.cells.items()
        if isinstance(cell, Ratio) and cell.met is False
    ]


def _table(group: str, rows: Sequence[Row]) -> Table:
    headings = list(dict.fromkeys(name for row in rows for name in row.cells))
    lines = []
    for row in rows:
        cells = (row.cells.get(heading, "") for heading in headings)
        lines.append((row.label, *(c.text if isinstance(c, Ratio) else c for c in cells)))
    return rich_table(("", *headings), lines, words=1, title=group, title_justify="left")
