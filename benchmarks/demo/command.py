"""Train a digits classifier three ways and compare: full size, compressed in training, small.

Run it from the checkout: `python -m benchmarks.demo`. It takes a few minutes on two CPU cores.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common.command import make_console, parse, prepare
from benchmarks.demo.report import write_report
from benchmarks.demo.runs import ARMS, ArmRun, Settings, run_seed
from benchmarks.train.trainer import TASKS, build, warm_up


def run_all(settings: Settings, console: Console) -> list[ArmRun]:
    """Train every arm with every seed, with a progress bar."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.completed:>5.0f}/{task.total:.0f} steps"),
        TextColumn("{task.fields[states]}"),
        TimeElapsedColumn(),
    )
    runs: list[ArmRun] = []
    with Progress(*columns, console=console) as progress:
        total = settings.steps * len(ARMS) * len(settings.seeds)
        everything = progress.add_task("all seeds", total=total, states="")
        bars = {arm: progress.add_task(arm, total=settings.steps, states="") for arm in ARMS}

        def report(arm: str, step: int, states: int) -> None:
            progress.update(bars[arm], completed=step, states=f"{states} states")
            done = sum(progress.tasks[bar].completed for bar in bars.values())
            progress.update(everything, completed=len(runs) * settings.steps + done)

        warm_up(*build(TASKS["digits"], seed=0))
        for seed in settings.seeds:
            progress.update(everything, states=f"seed {seed}")
            runs += run_seed(seed, settings, report)
            for bar in bars.values():
                progress.update(bar, completed=0, states="")
        for bar in bars.values():
            progress.remove_task(bar)
        progress.update(everything, completed=total, states="")
    return runs


def main(arguments: Iterable[str] | None = None) -> int:
    settings = parse(Settings, "demo", __doc__, arguments)
    console = make_console()
    prepare()
    start = time.perf_counter()
    console.print(
        f"Digits as 64-step sequences on the CPU (torch {torch.__version__}, one thread): "
        f"{len(ARMS)} arms, {len(settings.seeds)} seeds, {settings.steps} steps each"
    )
    runs = run_all(settings, console)
    seconds = time.perf_counter() - start
    for path in write_report(runs, settings, seconds, console):
        console.print(f"Wrote {path}")
    return 0
