"""Few cells that hold every possible pair of values; the same ones every time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations

Axes = Mapping[str, Sequence[str]]
Cell = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]
# Why a cell, or what of it is chosen so far, can't be; `None` if it can.
Obstacle = Callable[[Mapping[str, str]], str | None]


def complete(axes: Axes, start: Cell, obstacle: Obstacle) -> Cell:
    """The first possible cell that holds ``start``; empty if there is none."""
    if obstacle(start):
        return {}
    free = next((axis for axis in axes if axis not in start), None)
    if free is None:
        return start
    for value in axes[free]:
        if full := complete(axes, {**start, free: value}, obstacle):
            return full
    return {}


def pairs_of(cell: Mapping[str, str]) -> Iterator[Pair]:
    """All pairs of values in a cell, each in one order."""
    yield from combinations(sorted(cell.items()), 2)


def possible_pairs(axes: Axes, obstacle: Obstacle) -> list[Pair]:
    """Every pair of values that occurs in some possible cell."""
    found = []
    for one, two in combinations(sorted(axes), 2):
        for a in axes[one]:
            for b in axes[two]:
                if complete(axes, {one: a, two: b}, obstacle):
                    found.append(((one, a), (two, b)))
    return found


def cover(
    axes: Axes,
    obstacle: Obstacle,
    wanted: Sequence[Pair],
    cost: Mapping[str, float] | None = None,
) -> list[Cell]:
    """Possible cells that hold every pair of ``wanted``: greedily, the most new ones at a time.

    Where it makes no difference, the value that was used least, by ``cost`` (1 if not given).
    """
    left = dict.fromkeys(wanted)
    spent: Counter[tuple[str, str]] = Counter()
    cells: list[Cell] = []
    while left:
        seeds = list(left)[:: max(1, len(left) // 8)]
        candidates = [_grow(axes, obstacle, dict(seed), left, spent) for seed in seeds]
        best = max(candidates, key=lambda cell: sum(pair in left for pair in pairs_of(cell)))
        cells.append({axis: best[axis] for axis in axes})
        for axis, value in best.items():
            spent[axis, value] += (cost or {}).get(value, 1)
        for pair in pairs_of(best):
            left.pop(pair, None)
    return cells


def _grow(
    axes: Axes,
    obstacle: Obstacle,
    cell: Cell,
    left: Mapping[Pair, None],
    spent: Mapping[tuple[str, str], float],
) -> Cell:
    while len(cell) < len(axes):
        options = [
            (_gain(cell, axis, value, left), -spent[axis, value], axis, value)
            for axis in axes
            if axis not in cell
            for value in axes[axis]
            if complete(axes, {**cell, axis: value}, obstacle)
        ]
        _, _, axis, value = max(options)
        cell[axis] = value
    return cell


def _gain(cell: Cell, axis: str, value: str, left: Mapping[Pair, None]) -> int:
    """How many pairs that are still wanted a value makes with those chosen already."""
    new = (axis, value)
    return sum((min(new, old), max(new, old)) in left for old in cell.items())
