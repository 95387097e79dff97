"""A look with its swap, as a whole and in the callback's history."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common.tables import rich_table
from benchmarks.overhead.models import SIZES, train
from lightning_compressm import CompreSSMCallback


class Reducing(CompreSSMCallback):
    """Drops half of the states once, with a clock on the whole of it.

    Attributes:
        longest: seconds of the hook that looked and swapped.
        steps: seconds of each step, to the beginning of the next one.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(
            fraction=0.5, window=(0, steps // 2), every_n_steps=10 * steps, verbose=False
        )
        self.longest = 0.0
        self.steps: list[float] = []
        self._since = time.perf_counter()

    def on_train_batch_start(self, *arguments: Any) -> None:
        now = time.perf_counter()
        self.steps.append(now - self._since)
        self._since = now
        super().on_train_batch_start(*arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:
        start = time.perf_counter()
        super().on_train_batch_end(*arguments)
        self.longest = max(self.longest, time.perf_counter() - start)


@dataclass
class Cut:
    """A look with its swap, for each seed: seconds, the same in steps, and the history's share."""

    seconds: list[float] = field(default_factory=list)
    in_steps: list[float] = field(default_factory=list)
    accounted: list[float] = field(default_factory=list)


def measure_cuts(sizes: Sequence[str], seeds: int, steps: int, console: Console) -> dict[str, Cut]:
    """Reduce every model once with every seed."""
    cuts = {size: Cut() for size in sizes}
    runs = [(seed, size) for seed in range(seeds) for size in sizes]
    for seed, size in track(runs, "reducing", console=console, transient=True):
        callback = Reducing(steps)
        train(SIZES[size], seed, steps, callback)
        if not any(event["action"] == "reduce" for event in callback.history):
            raise AssertionError(f"expected a reduction, got {callback.history}")
        told = sum(event["seconds"] for event in callback.history)
        cuts[size].seconds.append(callback.longest)
        cuts[size].in_steps.append(callback.longest / statistics.median(callback.steps))
        cuts[size].accounted.append(told / callback.longest)
    return cuts


def cut_table(cuts: dict[str, Cut]) -> Table:
    """One line for each model, medians and spread over the seeds."""
    header = ("model", "look and swap", "in steps", "lowest to highest", "in the history")
    rows = [
        (
            size,
            f"{1e3 * statistics.median(cut.seconds):.1f} ms",
            f"{statistics.median(cut.in_steps):.1f}",
            f"{min(cut.in_steps):.1f} to {max(cut.in_steps):.1f}",
            f"{statistics.median(cut.accounted):.0%}",
        )
        for size, cut in cuts.items()
    ]
    return rich_table(header, rows, words=1, title="Half of the states dropped, once")
