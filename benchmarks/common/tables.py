"""Tables for the terminal, and tables that documentation can quote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


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


def rich_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int, **style: Any
) -> Table:
    """A table for the terminal.

    Args:
        header: Names of the columns.
        rows: Their cells.
        words: So many columns, the first ones, hold words; the others are aligned as numbers.
        style: Further arguments of `rich.table.Table`.
    """
    from rich.table import Table

    table = Table(**style)
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < words else "right")
    for row in rows:
        table.add_row(*row)
    return table
