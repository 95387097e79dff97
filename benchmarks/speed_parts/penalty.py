"""A training step with Hankel singular values as a penalty, over steps of a reduced block."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.models import ResidualBlock
from benchmarks.speed_parts.results import Ratio, Row, Section
from benchmarks.speed_parts.step import training_step
from benchmarks.speed_parts.suites import PenaltyCase, Suite
from benchmarks.speed_parts.timing import Measure, Report, interleave, local
from lightning_compressm import HankelRegularizer
from lightning_compressm.nn import LRU

NOTES = [
    "HSV regularisation (arXiv 2510.22951) adds the sum of all Hankel singular values, complex and "
    "with infinite horizon, to every loss, and needs all N states to the end. A reduction in "
    "training leaves steps of a block with fewer states; a tenth of the training comes before it.",
]


def block_of(case: PenaltyCase, states: int) -> ResidualBlock:
    torch.manual_seed(0)
    return ResidualBlock(case.width, states, LRU, case.dropout)


def measures_of(case: PenaltyCase, threads: int) -> dict[str, Measure]:
    """Steps with the penalty and without it, and of each reduced block."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, case.length, case.width)
    inputs, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    plain = training_step(block_of(case, case.states), inputs, grad)
    penalized = training_step(
        block_of(case, case.states), inputs, grad, HankelRegularizer(1e-3, balance="complex")
    )
    steps: dict[str, Callable[[], None]] = {"penalty": penalized, "plain": plain}
    for states in case.left:
        steps[f"N={states}"] = training_step(block_of(case, states), inputs, grad)
    return {name: local(step, threads) for name, step in steps.items()}


def rows_of(case: PenaltyCase, seconds: dict[str, list[float]]) -> list[Row]:
    group = f"LRU, B={case.batch} L={case.length} H={case.width} ({case.name})"
    cells: dict[str, Ratio | str] = {
        "/ the same without": Ratio.of(seconds["penalty"], seconds["plain"])
    }
    for states in case.left:
        cells[f"/ N={states} without"] = Ratio.of(seconds["penalty"], seconds[f"N={states}"])
    return [Row(group, f"N={case.states} with penalty", cells, seconds=seconds)]


def run(suite: Suite, threads: int, report: Report) -> list[Section]:
    """Measure all cases of a suite."""
    rows = []
    for case in suite.penalties:
        measures = measures_of(case, threads)
        found = interleave(measures, suite.rounds, lambda n, c=case: report(f"{c.name} {n}"))  # type: ignore[misc]
        rows += rows_of(case, found)
    return [Section("penalty", "Training step with HSV regularisation", threads, rows, NOTES)]
