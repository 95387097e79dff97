"""Trainings side by side in processes of their own, with one progress bar for all."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from queue import Empty
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.common.processes import start

Unit = TypeVar("Unit")
Found = TypeVar("Found")


def run_units(
    work: Callable[[Unit, Any], Found],
    units: Sequence[Unit],
    steps: int,
    workers: int,
    console: Console,
) -> Iterator[tuple[Unit, Found]]:
    """Give each unit to a process; what it returns comes as soon as it is there.

    Args:
        work: Called in the process with a unit and a queue, into which it puts the steps that it
            has done since the last time.
        units: Anything that can be pickled.
        steps: Of all units together.
        workers: Processes at a time.
        console: Where the bar is drawn.
    """
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        TextColumn("{task.completed:>8.0f}/{task.total:.0f} steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=console) as progress,
        context.Manager() as manager,
        ProcessPoolExecutor(workers, context, start) as pool,
    ):
        bar = progress.add_task(f"{len(units)} trainings of arms", total=steps)
        news: Any = manager.Queue()
        running = {pool.submit(work, unit, news): unit for unit in units}
        pending = set(running)
        try:
            while pending:
                done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                progress.advance(bar, sum(_drain(news)))
                for future in done:
                    yield running[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        progress.update(bar, completed=steps)


def _drain(news: Any) -> Iterator[int]:
    """What has come in."""
    while True:
        try:
            yield news.get_nowait()
        except Empty:
            return
