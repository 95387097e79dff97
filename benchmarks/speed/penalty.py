"""A training step with Hankel singular values as a penalty, over steps of a reduced block."""

from __future__ import annotations

from benchmarks.speed.results import Ratio, Row, Section
from benchmarks.speed.step import inputs_and_grad, make_block, training_step
from benchmarks.speed.suites import StepCase, Suite
from benchmarks.speed.timing import Measure, Report, interleave, local
from lightning_compressm import HankelRegularizer

NOTES = [
    "HSV regularisation (arXiv 2510.22951) adds the sum of all Hankel singular values, complex and "
    "with infinite horizon, to every loss, and needs all N states to the end. A reduction in "
    "training leaves steps of a block with fewer states; a tenth of the training comes before it.",
]


def measures_of(case: StepCase, threads: int) -> dict[str, Measure]:
    """Steps with the penalty and without it, and of each reduced block."""
    inputs, grad = inputs_and_grad(case)
    full, *left = case.states
    penalty = HankelRegularizer(1e-3, balance="complex")
    steps = {
        "penalty": training_step(make_block(case, full), inputs, grad, penalty),
        "plain": training_step(make_block(case, full), inputs, grad),
    }
    for states in left:
        steps[f"N={states}"] = training_step(make_block(case, states), inputs, grad)
    return {name: local(step, threads) for name, step in steps.items()}


def rows_of(case: StepCase, seconds: dict[str, list[float]]) -> list[Row]:
    group = f"{case.layer}, B={case.batch} L={case.length} H={case.width} ({case.name})"
    cells: dict[str, Ratio | str] = {
        "/ the same without": Ratio.of(seconds["penalty"], seconds["plain"])
    }
    for states in case.states[1:]:
        cells[f"/ N={states} without"] = Ratio.of(seconds["penalty"], seconds[f"N={states}"])
    return [Row(group, f"N={case.states[0]} with penalty", cells, seconds=seconds)]


def run(suite: Suite, threads: int, report: Report) -> list[Section]:
    """Measure all cases of a suite."""
    rows = []
    for case in suite.penalties:
        measures = measures_of(case, threads)
        found = interleave(measures, suite.rounds, lambda n, c=case: report(f"{c.name} {n}"))  # type: ignore[misc]
        rows += rows_of(case, found)
    return [Section("penalty", "Training step with HSV regularisation", threads, rows, NOTES)]
