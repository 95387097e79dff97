"""Means, spreads and paired differences of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, median, stdev

from benchmarks.compare.unit import Result

Value = Callable[[Result], float | None]
# Differences of less than so many standard errors are called noise.
SIGNIFICANT = 2.0


@dataclass(frozen=True)
class Difference:
    """One arm minus another, seed by seed.

    Attributes:
        mean: Over the seeds both have.
        error: Standard error of that mean; None with one seed.
        seeds: How many.
    """

    mean: float
    error: float | None
    seeds: int

    @property
    def verdict(self) -> str:
        """In words."""
        if self.error is None:
            return "one seed"
        if abs(self.mean) <= SIGNIFICANT * self.error or self.mean == 0:
            return "within noise"
        return "better" if self.mean > 0 else "worse"


def accuracy(result: Result) -> float:
    return result.accuracy


def after_cut(result: Result) -> float | None:
    """Test accuracy right after the last reduction."""
    return result.after_cut[-1] if result.after_cut else None


def time_to_full(result: Result) -> float | None:
    """Training time, that of a model it starts from included, over that of the full model."""
    return (result.cpu + result.borrowed) / result.full_cpu if result.full_cpu else None


def time_to_small(result: Result) -> float | None:
    """The same over that of the small model from scratch."""
    return (result.cpu + result.borrowed) / result.small_cpu if result.small_cpu else None


def analysis_share(result: Result) -> float:
    """Share of the training time that looking and reducing take."""
    return result.analysis / result.cpu if result.cpu else 0.0


def select(
    results: Iterable[Result], *, task: str | None = None, arm: str | None = None, size: int | None
) -> list[Result]:
    """Results of a size, by seed."""
    found = [
        r for r in results if r.size == size and task in (None, r.task) and arm in (None, r.arm)
    ]
    return sorted(found, key=lambda r: r.seed)


def difference(
    first: Iterable[Result], second: Iterable[Result], value: Value
) -> Difference | None:
    """First minus second, over the seeds that both have; None if there is none."""
    theirs = {r.seed: value(r) for r in second}
    pairs = [(value(r), theirs.get(r.seed)) for r in first]
    gaps = [a - b for a, b in pairs if a is not None and b is not None]
    if not gaps:
        return None
    error = stdev(gaps) / sqrt(len(gaps)) if len(gaps) > 1 else None
    return Difference(mean(gaps), error, len(gaps))


def values_of(results: Iterable[Result], value: Value) -> list[float]:
    """Without those that have none."""
    return [v for v in map(value, results) if v is not None]


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def median_and_range(values: Sequence[float]) -> str:
    """Median (smallest to largest)."""
    if not values:
        return ""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
