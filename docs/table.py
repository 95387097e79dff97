"""Write the generated tables into the pages that show them: `make table`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from lightning_compressm.families import support_table

ROOT = Path(__file__).parents[1]


def matrix_table() -> str:
    """How many cells of the test matrix hold each value."""
    from tests.callbacks.matrix.cells import (
        AVERAGES,
        AXES,
        averaged_cells,
        cells,
        processes,
        wanted_pairs,
    )

    ones = sum(processes(cell) == 1 for cell in cells())
    every = (*cells(), *averaged_cells())
    lines = [
        f"{len(cells())} runs, {ones} of them in one process and {len(cells()) - ones} in two, "
        f"hold all {len(wanted_pairs())} pairs of these values that can be combined. Further "
        f"{len(averaged_cells())} hold the two averages with every other value.\n\n",
        "| | | runs | in one process | in two |\n",
        "| --- | --- | --- | --- | --- |\n",
    ]
    axes = {**AXES, "around": AXES["around"] + AVERAGES}
    for axis, values in axes.items():
        for value in values:
            held = [processes(cell) for cell in every if cell[axis] == value]
            counts = f"{len(held)} | {held.count(1)} | {held.count(2)}"
            lines.append(f"| {axis if value == values[0] else ''} | {value} | {counts} |\n")
    return "".join(lines)


def obstacle_table() -> str:
    """What can't be combined, and why."""
    from tests.callbacks.matrix.cells import AVERAGES, AXES, obstacle

    axes = {**AXES, "around": AXES["around"] + AVERAGES}
    values = [(axis, value) for axis in axes for value in axes[axis]]
    known: dict[frozenset[tuple[str, str]], str] = {}
    for size in (2, 3):
        for chosen in combinations(values, size):
            reason = obstacle(dict(chosen)) if len(dict(chosen)) == size else None
            if reason and not any(part <= set(chosen) for part in known):
                known[frozenset(chosen)] = reason
    lines = ["| together | why not |\n", "| --- | --- |\n"]
    for part, reason in known.items():
        together = " + ".join(value for axis, value in values if (axis, value) in part)
        lines.append(f"| {together} | {reason} |\n")
    return "".join(lines)


def refusal_table() -> str:
    """What is refused, with the messages of real runs."""
    from tests.callbacks.refused import REFUSED

    lines = ["| what | message |\n", "| --- | --- |\n"]
    for refused in REFUSED:
        with tempfile.TemporaryDirectory() as folder:
            error, _ = refused.provoke(Path(folder))
        message = str(error).replace("|", "\\|").replace("*", "\\*")
        lines.append(f"| {refused.what} | {type(error).__name__}: {message} |\n")
    return "".join(lines)


# Page -> name of a place in it -> what belongs there.
PLACES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"families": support_table},
    "docs/supported.md": {"families": support_table},
    "docs/training.md": {
        "matrix": matrix_table,
        "obstacles": obstacle_table,
        "refused": refusal_table,
    },
}


def split(text: str, name: str) -> tuple[str, str, str]:
    """What comes before a generated part, the part, and what comes after it."""
    before, rest = text.split(f"<!-- {name}:begin -->\n")
    shown, after = rest.split(f"<!-- {name}:end -->")
    return f"{before}<!-- {name}:begin -->\n", shown, f"<!-- {name}:end -->{after}"


def main() -> None:
    for page, places in PLACES.items():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        for name, make in places.items():
            before, _, after = split(text, name)
            text = f"{before}{make()}{after}"
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
