"""Train classifiers three ways and compare: full size, compressed in training, small.

Run it from the checkout: `python -m benchmarks.demo`. It takes a few minutes on two CPU cores.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from benchmarks.common.command import make_console, parse, prepare
from benchmarks.common.workers import run_units
from benchmarks.demo.report import write_report
from benchmarks.demo.runs import ARMS, ArmRun, Settings, run_seed
from benchmarks.train.trainer import TASKS, TaskName, build, warm_up


@dataclass(frozen=True)
class Unit:
    """What one process does at a time: the three arms of a task and seed, in turns."""

    task: TaskName
    seed: int
    settings: Settings

    @property
    def steps(self) -> int:
        """Optimizer steps of all arms."""
        return len(ARMS) * self.settings.steps_of(self.task)


def run_all(settings: Settings, console: Console) -> list[ArmRun]:
    """Train every arm with every seed, with a progress bar; sorted by task and seed."""
    units = [Unit(task, seed, settings) for task in settings.tasks for seed in settings.seeds]
    steps = sum(unit.steps for unit in units)
    # The longest first, so that no process is left alone with it.
    longest = sorted(units, key=lambda unit: -unit.steps)
    found: dict[Unit, list[ArmRun]] = {}
    for unit, runs in run_units(work, longest, steps, settings.workers, console):
        found[unit] = runs
        said = ", ".join(f"{run.arm} {run.accuracy:.3f}" for run in runs)
        console.log(f"{unit.task}, seed {unit.seed}: {said}")
    return [run for unit in units for run in found[unit]]


def work(unit: Unit, news: Any) -> list[ArmRun]:
    """In a process of its own."""
    seen: dict[str, int] = {}

    def report(arm: str, step: int) -> None:
        news.put(step - seen.get(arm, 0))
        seen[arm] = step

    prepare()
    warm_up(*build(TASKS[unit.task], seed=0))
    return run_seed(unit.task, unit.seed, unit.settings, report)


def main(arguments: Iterable[str] | None = None) -> int:
    settings = parse(Settings, "demo", __doc__, arguments)
    console = make_console()
    prepare()
    start = time.perf_counter()
    console.print(
        f"{' and '.join(settings.tasks)} on the CPU (torch {torch.__version__}, one thread each): "
        f"{len(ARMS)} arms, {len(settings.seeds)} seeds each"
    )
    runs = run_all(settings, console)
    seconds = time.perf_counter() - start
    for path in write_report(runs, settings, seconds, console):
        console.print(f"Wrote {path}")
    return 0
