"""The committed page of all methods still says what the project claims: by its own figures."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
LINEAR = {"digits", "delay", "pathfinder", "listops"}
Difference = tuple[float, float]


def differences(page: str) -> dict[tuple[str, str], dict[str, Difference]]:
    """(task, states) -> other arm -> ours minus it and the standard error, in points."""
    section = page.split("## Ours against the others")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip(" |") for cell in row] for row in rows]
    table: dict[tuple[str, str], dict[str, Difference]] = {}
    for row in body:
        task, states = row[0].split(", ")
        cells = zip(header[1:], row[1:], strict=False)
        found = {arm: re.findall(r"[+-]?\d+\.\d+", cell) for arm, cell in cells}
        table[task, states] = {a: (float(f[0]), float(f[1])) for a, f in found.items() if f}
    return table


def test_not_below_the_published_recipe_on_linear_tasks() -> None:
    table = differences(PAGE.read_text(encoding="utf-8"))
    assert {task for task, _ in table} >= LINEAR
    for (task, states), others in table.items():
        if task in LINEAR:
            mean, error = others["CompreSSM as published"]
            assert mean > -2 * error, (task, states)


def test_better_than_small_from_scratch_on_two_tasks() -> None:
    table = differences(PAGE.read_text(encoding="utf-8"))
    small = {key: others["small from scratch"] for key, others in table.items()}
    assert len({task for (task, _), (mean, error) in small.items() if mean > 2 * error}) >= 2
