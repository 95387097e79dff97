"""Tables that documentation can quote."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; line breaks inside a cell are kept.

    Example:
        >>> print(markdown_table(["a", "b"], [["1", "2"]]), end="")
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    cells = ([cell.replace("\n", "<br>") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def make_console() -> Console:
    """A console as wide as the terminal; wide enough for the tables where there is none."""
    return Console(width=None if sys.stdout.isatty() else 100)
