"""Time several things in turn, so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

# Calls its argument so many times, and returns the seconds of one call.
Measure = Callable[[int], float]
Report = Callable[[str], None]

_SHORTEST = 0.1  # seconds: shorter stretches are repeated, clocks and caches are noisy
_LONG = 1.0  # seconds: beside this, what the first call does more is nothing
_MOST_CALLS = 50


@dataclass(frozen=True)
class Rounds:
    """How often everything is measured once.

    Attributes:
        least: At least so often; two or more, or there is no spread.
        most: At most so often.
        seconds: No new round beyond `least` after this time.
    """

    least: int
    most: int
    seconds: float


def stopwatch(threads: int) -> Callable[[], float]:
    """The clock to use: of the processor for one thread, where it is steadier; else on the wall."""
    return time.process_time if threads == 1 else time.perf_counter


def local(call: Callable[[], object], threads: int) -> Measure:
    """Measure a function of this process."""
    clock = stopwatch(threads)

    def measure(count: int) -> float:
        start = clock()
        for _ in range(count):
            call()
        return (clock() - start) / count

    return measure


def interleave(
    measures: Mapping[str, Measure], rounds: Rounds, report: Report = lambda _: None
) -> dict[str, list[float]]:
    """Measure each once a round, every round starting with another one.

    Args:
        measures: What to time, by name.
        rounds: How many rounds.
        report: Called with a name before it is measured.

    Returns:
        Seconds of one call by name, one number a round.
    """
    counts = {}
    for name, measure in measures.items():
        report(name)
        seconds = measure(1)  # the first call allocates, compiles and plans
        if seconds < _LONG:
            seconds = max(measure(1), 1e-6)
        counts[name] = min(_MOST_CALLS, math.ceil(_SHORTEST / seconds))
    found: dict[str, list[float]] = {name: [] for name in measures}
    names, start = list(measures), time.perf_counter()
    for number in range(rounds.most):
        if number >= rounds.least and time.perf_counter() - start > rounds.seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            report(name)
            found[name].append(measures[name](counts[name]))
    return found


@contextlib.contextmanager
def limited(threads: int) -> Iterator[None]:
    """Use so many threads and no more cores than that, here and in processes started inside."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads), _pinned(threads):
            yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _pinned(cores: int) -> Iterator[None]:
    if not hasattr(os, "sched_setaffinity"):  # only Linux has it
        yield
        return
    before = os.sched_getaffinity(0)
    # The last ones: interrupts and other people's processes tend to sit on the first.
    os.sched_setaffinity(0, sorted(before)[-cores:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
