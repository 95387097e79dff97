"""Compare all ways to a small model: same tasks, same recipe, same seeds, side by side.

`python -m benchmarks.compare --suite smoke` shows in minutes that everything runs, `--suite cpu` is
the real thing. What is there already is not run again, so an interrupted comparison goes on, and a
new arm is all that a second call trains.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.common.tables import make_console
from benchmarks.compare.page import Report, make_page
from benchmarks.compare.pictures import draw_all
from benchmarks.compare.store import Store, missing_jobs, versions
from benchmarks.compare.suites import SUITES, Suite, without_missing
from benchmarks.compare.tasks import CompareTask
from benchmarks.compare.unit import FULL, Job, Result, jobs_of, run_unit, warm_up
from benchmarks.train.trainer import quiet, use_one_thread


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        suite: One of `SUITES`.
        tasks: Names; all of the suite if empty.
        arms: Names; all of the suite if empty. The full model always comes along.
        seeds: The suite's own if empty.
        workers: Processes, one task and seed each.
        output: Where results, page and pictures go.
        page: Another path for the page; None for inside `output`.
    """

    suite: str = "cpu"
    tasks: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    workers: int = max(1, os.cpu_count() or 1)
    output: Path = Path("results/compare")
    page: Path | None = None


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
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(),
            TextColumn("{task.completed:>8.0f}/{task.total:.0f} steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        context = multiprocessing.get_context("spawn")
        with (
            Progress(*columns, console=self.console) as progress,
            context.Manager() as manager,
            ProcessPoolExecutor(self.settings.workers, context, start) as pool,
        ):
            bar = progress.add_task(f"{len(todo)} trainings of arms", total=steps)
            news: Any = manager.Queue()
            running = {pool.submit(work, unit, news): unit for unit, _ in todo}
            pending = set(running)
            try:
                while pending:
                    done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                    progress.advance(bar, sum(drain(news)))
                    for future in done:
                        self._keep(future.result(), running[future], tasks)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            progress.update(bar, completed=steps)

    def _keep(self, results: list[Result], unit: Unit, tasks: dict[str, CompareTask]) -> None:
        self.store.save(tasks[unit.task], unit.seed, results)
        full = next(r for r in results if r.arm == FULL)
        self.console.log(
            f"{unit.task}, seed {unit.seed}: {len(results)} results, full {full.accuracy:.3f}"
        )


def training(jobs: Iterable[Job]) -> int:
    """Jobs that report steps."""
    return sum(not (job.arm.one_training and job.arm.needs_full) for job in jobs)


def start() -> None:
    """In every process, before it works."""
    quiet()
    use_one_thread()
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Without this, a worker trains on when its parent was killed, for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def work(unit: Unit, news: Any) -> list[Result]:
    """In a process of its own: all arms of one unit, side by side."""
    task = {task.name: task for task in SUITES[unit.suite].tasks}[unit.task]
    seen: dict[str, int] = {}

    def report(job: str, step: int) -> None:
        news.put(step - seen.get(job, 0))
        seen[job] = step

    warm_up(task)
    return run_unit(task, unit.seed, jobs_of(task, unit.arms), report)


def drain(news: Any) -> Iterator[int]:
    """What has come in."""
    while True:
        try:
            yield news.get_nowait()
        except Empty:
            return


def parse(arguments: Iterable[str] | None = None) -> Settings:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=(__doc__ or "").split("\n", 1)[0],
        epilog="; ".join(f"{suite.name}: {suite.about}" for suite in SUITES.values()),
    )
    parser.add_argument("--suite", choices=list(SUITES), default=default.suite)
    parser.add_argument("--tasks", nargs="+", default=[], help="only these (all of the suite)")
    parser.add_argument("--arms", nargs="+", default=[], help="only these (all of the suite)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="(those of the suite)")
    parser.add_argument("--workers", type=int, default=default.workers, help="(one for each core)")
    parser.add_argument("--output", type=Path, default=default.output, help="(%(default)s)")
    parser.add_argument("--page", type=Path, help="where the page goes (into the output folder)")
    options = parser.parse_args(None if arguments is None else list(arguments))
    suite = SUITES[options.suite]
    known = {"--tasks": [task.name for task in suite.tasks], "--arms": suite.arms()}
    for option, names in (("--tasks", options.tasks), ("--arms", options.arms)):
        for name in names:
            if name not in known[option]:
                parser.error(f"{option}: expected some of {', '.join(known[option])}, got {name}")
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    return Settings(
        options.suite,
        tuple(options.tasks),
        tuple(options.arms),
        tuple(options.seeds),
        options.workers,
        options.output,
        options.page,
    )


def command_of(settings: Settings) -> str:
    """What makes the same figures.

    Example:
        >>> command_of(Settings("cpu", seeds=(0, 1)))
        'python -m benchmarks.compare --suite cpu --seeds 0 1'
    """
    words = ["python -m benchmarks.compare --suite", settings.suite]
    for option in ("tasks", "arms", "seeds"):
        chosen = getattr(settings, option)
        words += [f"--{option}", *map(str, chosen)] if chosen else []
    return " ".join(words)


def write(comparison: Comparison, seconds: float) -> list[Path]:
    """The page, all numbers, and the pictures."""
    settings, results = comparison.settings, comparison.results()
    command = command_of(settings)
    stem = f"compare-{settings.suite}"
    report = Report(comparison.tasks, results, command, versions(), f"pictures/{stem}")
    folder = settings.output
    page = settings.page or folder / f"{settings.suite}.md"
    pictures = page.parent / "pictures"
    for place in (folder, pictures):
        place.mkdir(parents=True, exist_ok=True)
    page.write_text(make_page(report), encoding="utf-8")
    numbers = folder / f"{settings.suite}.json"
    content = {
        "command": command,
        "device": "CPU, one thread for each training",
        "versions": versions(),
        "seconds": seconds,
        "results": [result.to_dict() for result in results],
    }
    numbers.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return [page, numbers, *draw_all(report, pictures, stem)]


def main(arguments: Iterable[str] | None = None) -> int:
    settings = parse(arguments)
    console = make_console()
    begin = time.perf_counter()
    comparison = Comparison(settings, console)
    comparison.run()
    seconds = time.perf_counter() - begin
    for path in write(comparison, seconds):
        console.print(f"Wrote {path}")
    console.print(f"Took {seconds / 60:.1f} minutes.")
    return 0
