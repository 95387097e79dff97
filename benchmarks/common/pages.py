"""Pages that several commands write to: each has a part of its own, between two marks."""

from __future__ import annotations

from pathlib import Path

MNIST = "mnist"  # on the page of results and in README, by `python -m benchmarks.mnist`


def part(name: str, text: str = "") -> str:
    """A part with its marks.

    Example:
        >>> print(part("speed", "Fast."))
        <!-- speed:begin -->
        Fast.
        <!-- speed:end -->
    """
    begin, end = _marks(name)
    return "\n".join(line for line in (begin, text.strip("\n"), end) if line)


def read_part(page: str, name: str) -> str:
    """What is between the marks.

    Raises:
        ValueError: If the page does not have each mark once.

    Example:
        >>> read_part(part("speed", "Fast."), "speed")
        'Fast.'
    """
    begin, end = _marks(name)
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"expected a page with one {begin} before one {end}; add both lines")
    return page.split(begin)[1].split(end)[0].strip("\n")


def with_part(page: str, name: str, text: str) -> str:
    """The page with another text between the marks.

    Raises:
        ValueError: If the page does not have each mark once.
    """
    old = read_part(page, name)
    head, _, rest = page.partition(_marks(name)[0])
    tail = rest.partition(_marks(name)[1])[2]
    return page if old == text.strip("\n") else head + part(name, text) + tail


def write_part(path: Path, name: str, text: str) -> None:
    """Put a text between the marks of a page; a page that is not there becomes this part alone."""
    page = path.read_text(encoding="utf-8") if path.exists() else part(name) + "\n"
    path.write_text(with_part(page, name, text), encoding="utf-8")


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
