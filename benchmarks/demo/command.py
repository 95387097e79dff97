"""Train classifiers three ways and compare: full size, compressed in training, small.

Run it from the checkout: `python -m benchmarks.demo`. It takes a few minutes on two CPU cores.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

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
    total = sum(settings.steps_of(task) for task in settings.tasks)
    with Progress(*columns, console=console) as progress:
        everything = progress.add_task(
            "everything", total=total * len(ARMS) * len(settings.seeds), states=""
        )
        bars = {arm: progress.add_task(arm, total=1, states="") for arm in ARMS}
        done = 0
        for task in settings.tasks:
            warm_up(*build(TASKS[task], seed=0))
            steps = settings.steps_of(task)
            for seed in settings.seeds:
                progress.update(everything, states=f"{task}, seed {seed}")
                for bar in bars.values():
                    progress.update(bar, total=steps, completed=0, states="")
                report = partial(_report, progress, bars, everything, done)
                runs += run_seed(task, seed, settings, report)
                done += steps * len(ARMS)
        for bar in bars.values():
            progress.remove_task(bar)
        progress.update(everything, completed=done, states="")
    return runs


def _report(
    progress: Progress,
    bars: dict[str, TaskID],
    everything: TaskID,
    done: int,
    arm: str,
    step: int,
    states: int,
) -> None:
    progress.update(bars[arm], completed=step, states=f"{states} states")
    now = sum(progress.tasks[progress.task_ids.index(bar)].completed for bar in bars.values())
    progress.update(everything, completed=done + now)


def main(arguments: Iterable[str] | None = None) -> int:
    settings = parse(Settings, "demo", __doc__, arguments)
    console = make_console()
    prepare()
    start = time.perf_counter()
    console.print(
        f"{' and '.join(settings.tasks)} on the CPU (torch {torch.__version__}, one thread): "
        f"{len(ARMS)} arms, {len(settings.seeds)} seeds each"
    )
    runs = run_all(settings, console)
    seconds = time.perf_counter() - start
    for path in write_report(runs, settings, seconds, console):
        console.print(f"Wrote {path}")
    return 0
