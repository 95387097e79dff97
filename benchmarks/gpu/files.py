"""Where results go: a JSON and a Markdown file for each part, written again whenever there is more.

Nothing here needs more than Python: the command itself must not fail, whatever is missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TITLES = {
    "card": "The card",
    "tests": "Tests on the card",
    "speed": "Speed",
    "mnist": "Sequential MNIST",
}
RUNNING = "running"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with an empty line after it.

    Example:
        >>> print(table(["a", "b"], [["1", "2"]]), end="")
        | a | b |
        | --- | --- |
        | 1 | 2 |
        <BLANKLINE>
    """
    lines = (header, ["---"] * len(header), *rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def write(folder: Path, part: str, content: dict[str, Any], body: str) -> None:
    """Write both files of a part; one who reads them at the same time finds the old or the new."""
    text = f"# {TITLES[part]}\n\nStatus: {_words(content)}\n\n{body}"
    numbers = json.dumps({"part": part, **content}, indent=1, default=str) + "\n"
    for ending, whole in (("json", numbers), ("md", text.rstrip() + "\n")):
        path = folder / f"{part}.{ending}"
        partial = path.with_name(f".{path.name}")
        partial.write_text(whole, encoding="utf-8")
        partial.replace(path)


def read(folder: Path, part: str) -> dict[str, Any]:
    """What a part has written so far; nothing if it wrote nothing."""
    path = folder / f"{part}.json"
    content: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return content


def end(folder: Path, part: str, status: str, why: str, log: str) -> None:
    """Say how a part ended that could not say so itself, with the end of what it printed."""
    content = read(folder, part) | {"status": status, "why": why, "log": log}
    page = folder / f"{part}.md"
    if page.exists():
        head, _, body = page.read_text("utf-8").partition("Status: ")
        body = body.partition("\n\n")[2]
        assert head
    else:
        body = ""
    content.pop("part", None)
    write(folder, part, content, f"{body}\nThe end of its output:\n\n```text\n{log}\n```\n")


def _words(content: dict[str, Any]) -> str:
    why = content.get("why")
    return f"{content['status']}: {why}" if why else str(content["status"])
