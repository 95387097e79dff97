"""What the callback costs a training step that it does not reduce anything in.

Run it as `python -m benchmarks.overhead`.

Every run is a real Trainer on one process. The first half of its steps lies inside the window, the
second half after it; the one look in between finds nothing worth removing, so that all steps are
alike. The callback's hooks and the steps are timed side by side, in every step, so that a busy
machine slows both down; a share is the median of the hooks' times over the median of the steps'.

A second run of each model drops half of the states in its one look: what look and swap take
together, in steps of the same run, and how much of that the callback's history accounts for.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.common.command import check_least, make_console, one_of, parse, prepare
from benchmarks.overhead.cuts import cut_table, measure_cuts
from benchmarks.overhead.models import EPOCH, SIZES
from benchmarks.overhead.steps import measure, table


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        sizes: Models to measure.
        seeds: How many.
        steps: Of each run.
        threads: Of the processor.
        target: Fail if the median share at medium size is higher, in percent.
    """

    sizes: tuple[str, ...] = one_of(tuple(SIZES), SIZES)
    seeds: int = 5
    steps: int = 200
    threads: int = 1
    target: float | None = None

    def __post_init__(self) -> None:
        check_least("--steps", 8 * EPOCH, [self.steps], ": each half needs steps to be timed")


def main(arguments: Iterable[str] | None = None) -> int:
    settings = parse(Settings, "overhead", __doc__, arguments)
    prepare(settings.threads)
    console = make_console()
    costs = measure(settings.sizes, settings.seeds, settings.steps, console)
    console.print(table(costs))
    console.print(cut_table(measure_cuts(settings.sizes, settings.seeds, settings.steps, console)))
    worst = max(
        (statistics.median(c.shares) for (size, _), c in costs.items() if size == "medium"),
        default=0.0,
    )
    missed = settings.target is not None and 100 * worst > settings.target
    if missed:
        console.print(f"above the target of {settings.target:g}%")
    return int(missed)
