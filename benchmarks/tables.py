"""Tables that documentation can quote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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
