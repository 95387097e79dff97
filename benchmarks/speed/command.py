"""Every figure about speed and memory, as ratios that were measured side by side.

`python -m benchmarks.speed` measures training steps against the number of states, the layers
against other implementations, the analysis against textbook methods, and the memory of each form.
What is compared runs in turn (a, b, c, a, b, c, ...), so that a busy machine disturbs all alike; a
ratio is taken within a round, and shown as median with the smallest and largest one.

`--suite quick` is a look at smaller sizes, without targets. The published layer needs JAX:
`--jax-python PATH` names another Python that has it. Results go to `results/speed.json` and
`results/speed.png`; only the JSON has seconds, which say nothing on another machine.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common.command import check_least, make_console, one_of, parse, write_numbers
from benchmarks.speed import analysis, layers, memory, penalty, selective, step
from benchmarks.speed.picture import draw
from benchmarks.speed.results import Section, missed
from benchmarks.speed.suites import SUITES, Suite
from benchmarks.speed.timing import Report, limited

WIDTH = 120  # of the tables where there is no terminal
PARTS = ("step", "layer", "selective", "analysis", "penalty", "memory")
Part = Callable[[Suite, int, Report], list[Section]]


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        suite: Name of the sizes.
        threads: Everything is measured with each of these numbers of threads.
        parts: What to measure; all if not given.
        out: Results go to this path with .json and .png added.
        jax_python: A Python that can import jax; this one if not given.
        targets: Fail if a target is missed.
    """

    suite: str = one_of("full", SUITES)
    threads: tuple[int, ...] = (1,)
    parts: tuple[str, ...] = one_of(PARTS, PARTS)
    out: Path = Path("results/speed")
    jax_python: Path | None = None
    targets: bool = False

    def __post_init__(self) -> None:
        check_least("--threads", 1, self.threads)
        object.__setattr__(self, "parts", tuple(dict.fromkeys(self.parts)))  # each of them once
        if self.targets and self.suite != "full":
            raise ValueError("--targets belong to the sizes of --suite full; leave one out")
        with_targets = ("step", "layer", "selective", "analysis")
        if self.targets and set(with_targets) - set(self.parts):
            raise ValueError(f"--targets are about --parts {' '.join(with_targets)}; measure all")


def run(suite: Suite, settings: Settings, console: Console) -> list[Section]:
    """Measure everything; print each table, and save it, as soon as it is there."""
    start = elapsed()

    def against_peers(suite: Suite, threads: int, report: Report) -> list[Section]:
        return layers.run(suite, threads, report, settings.jax_python)

    parts: dict[str, Part] = {
        "step": step.run,
        "layer": against_peers,
        "selective": selective.run,
        "analysis": analysis.run,
        "penalty": penalty.run,
        "memory": lambda suite, _, report: memory.run(suite, report),
    }
    jobs = [
        (name, parts[name], threads)
        for threads in settings.threads
        for name in settings.parts
        if name != "memory" or threads == settings.threads[0]  # bytes do not depend on threads
    ]
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    found: list[Section] = []
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(jobs))
        for name, part, threads in jobs:

            def report(what: str, head: str = f"{name}, {threads} thread(s)") -> None:
                progress.update(bar, description=f"{head}: {what}")

            report("starting")
            with limited(threads):
                sections = part(suite, threads, report)
            for section in sections:
                show(section, progress.console)
            found += sections
            # At once: minutes of measurements should not be lost with what comes after them.
            save(found, settings, start)
            progress.advance(bar)
    return found


def show(section: Section, console: Console) -> None:
    """Print a table and the notes under it."""
    console.rule(section.heading, align="left")
    for table in section.tables():
        console.print(table)
    for note in section.notes:
        console.print(note, style="dim")
    console.print()


def elapsed() -> dict[str, float]:
    """Seconds on the clock, and of the processor here and in processes that have ended."""
    times = os.times()
    processor = times.user + times.system + times.children_user + times.children_system
    return {"wall": time.perf_counter(), "processor": processor}


def minutes(seconds: dict[str, float]) -> str:
    wall, processor = (seconds[clock] / 60 for clock in ("wall", "processor"))
    return f"took {wall:.1f} minutes, {processor:.1f} of them computing"


def save(sections: Sequence[Section], settings: Settings, start: dict[str, float]) -> Path:
    """Write everything that was measured so far as JSON."""
    seconds = {clock: end - start[clock] for clock, end in elapsed().items()}
    content = {
        "suite": settings.suite,
        "device": "CPU",
        "threads": list(settings.threads),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seconds": seconds,
        "targets_missed": missed(sections),
        "sections": [section.to_dict() for section in sections],
    }
    return write_numbers(ending(settings.out, ".json"), content)


def ending(path: Path, suffix: str) -> Path:
    """Add a suffix to the name; `with_suffix` would replace what follows its last dot."""
    return path.with_name(path.name + suffix)


def main(arguments: Iterable[str] | None = None) -> int:
    settings = parse(Settings, "speed", __doc__, arguments)
    console = make_console(WIDTH)
    start = elapsed()
    sections = run(SUITES[settings.suite], settings, console)
    seconds = {clock: end - start[clock] for clock, end in elapsed().items()}
    numbers, picture = save(sections, settings, start), ending(settings.out, ".png")
    draw(sections, picture)
    console.print(f"Wrote {numbers} and {picture}; {minutes(seconds)}")
    short = missed(sections)
    for line in short:
        console.print(f"target missed: {line}", style="red")
    return int(settings.targets and bool(short))
