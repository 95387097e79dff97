"""A suite with what the command line changed: what is missing is trained in several processes."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.command import check_least, one_of, prepare
from benchmarks.common.workers import run_units
from benchmarks.compare.store import Store, missing_jobs
from benchmarks.compare.suites import SUITES, Suite, without_missing
from benchmarks.compare.tasks import CompareTask
from benchmarks.compare.unit import FULL, Job, Result, jobs_of, run_unit
from benchmarks.train.trainer import warm_up


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        suite: Which tasks, arms and seeds.
        tasks: Only these; all of the suite if empty.
        arms: Only these and the full model; all of the suite if empty.
        seeds: Those of the suite if empty.
        workers: Processes, one task and seed each; one for each core if not given.
        output: Folder of results, page and pictures.
        page: Another path for the page; None for inside `output`.
    """

    suite: str = one_of("cpu", SUITES)
    tasks: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    workers: int = max(1, os.cpu_count() or 1)
    output: Path = Path("results/compare")
    page: Path | None = None

    def __post_init__(self) -> None:
        suite = SUITES[self.suite]
        known = {"--tasks": [task.name for task in suite.tasks], "--arms": suite.arms()}
        for flag, names in (("--tasks", self.tasks), ("--arms", self.arms)):
            for name in names:
                if name not in known[flag]:
                    raise ValueError(
                        f"{flag}: expected some of {', '.join(known[flag])}, got {name}"
                    )
        check_least("--workers", 1, [self.workers])


@dataclass(frozen=True)
class Unit:
    """What one process does at a time: some arms of a task and seed."""

    task: str
    seed: int
    arms: tuple[str, ...]
    suite: str


@dataclass
class Comparison:
    """A suite with what the command line changed, and its files."""

    settings: Settings
    console: Console
    tasks: list[CompareTask] = field(default_factory=list)

    def __post_init__(self) -> None:
        tasks, notes = without_missing(self.suite.tasks)
        wanted = self.settings.tasks
        self.tasks = [task for task in tasks if not wanted or task.name in wanted]
        for note in notes:
            self.console.print(note)

    @property
    def suite(self) -> Suite:
        return SUITES[self.settings.suite]

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.settings.seeds or self.suite.seeds

    @functools.cached_property
    def arms(self) -> list[str]:
        wanted = self.settings.arms
        return [a for a in self.suite.arms() if not wanted or a in wanted or a == FULL]

    @property
    def store(self) -> Store:
        return Store(self.settings.output / self.settings.suite)

    def units(self) -> Iterator[tuple[Unit, list[Job]]]:
        """What is still to be done."""
        for seed in self.seeds:
            for task in self.tasks:
                jobs = missing_jobs(jobs_of(task, self.arms), self.store.load(task, seed))
                if jobs:
                    arms = tuple(dict.fromkeys(job.arm.name for job in jobs))
                    yield Unit(task.name, seed, arms, self.suite.name), jobs

    def results(self) -> list[Result]:
        """All that is there of these tasks, arms and seeds."""
        return [
            result
            for task in self.tasks
            for seed in self.seeds
            for result in self.store.load(task, seed)
            if result.arm in self.arms
        ]

    def run(self) -> None:
        """Train what is missing, with a progress bar."""
        todo = list(self.units())
        if not todo:
            self.console.print("Everything is there already.")
            return
        tasks = {task.name: task for task in self.tasks}
        steps = sum(tasks[unit.task].steps * training(jobs) for unit, jobs in todo)
        units = [unit for unit, _ in todo]
        workers = self.settings.workers
        for unit, results in run_units(work, units, steps, workers, self.console):
            self._keep(results, unit, tasks)

    def _keep(self, results: list[Result], unit: Unit, tasks: dict[str, CompareTask]) -> None:
        self.store.save(tasks[unit.task], unit.seed, results)
        full = next(r for r in results if r.arm == FULL)
        self.console.log(
            f"{unit.task}, seed {unit.seed}: {len(results)} results, full {full.accuracy:.3f}"
        )


def training(jobs: Iterable[Job]) -> int:
    """Jobs that report steps."""
    return sum(not (job.arm.one_training and job.arm.needs) for job in jobs)


def work(unit: Unit, news: Any) -> list[Result]:
    """In a process of its own: all arms of one unit, side by side."""
    task = {task.name: task for task in SUITES[unit.suite].tasks}[unit.task]
    seen: dict[str, int] = {}

    def report(job: str, step: int) -> None:
        news.put(step - seen.get(job, 0))
        seen[job] = step

    prepare()
    warm_up(*task.build(seed=0))
    return run_unit(task, unit.seed, jobs_of(task, unit.arms), report)
