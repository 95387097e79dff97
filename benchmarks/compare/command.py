"""Compare all ways to a small model: same tasks, same recipe, same seeds, side by side.

`python -m benchmarks.compare --suite smoke` shows in minutes that everything runs, `--suite cpu` is
the real thing. What is there already is not run again, so an interrupted comparison goes on, and a
new arm is all that a second call trains.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common.command import make_console, parse, write_numbers
from benchmarks.common.pages import MNIST, part, read_part, with_part
from benchmarks.compare.comparison import Comparison, Settings
from benchmarks.compare.frontier import draw_frontier
from benchmarks.compare.methods_page import Report
from benchmarks.compare.pictures import draw_all
from benchmarks.compare.store import versions
from benchmarks.compare.suites import SUITES


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
    page = settings.page or settings.output / f"{settings.suite}.md"
    pictures = page.parent / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    made = comparison.suite.page(report)
    if part(MNIST) in made and page.exists():  # that part is another command's
        made = with_part(made, MNIST, read_part(page.read_text(encoding="utf-8"), MNIST))
    page.write_text(made, encoding="utf-8")
    content = {
        "command": command,
        "device": "CPU, one thread for each training",
        "versions": versions(),
        "seconds": seconds,
        "results": [result.to_dict() for result in results],
    }
    numbers = write_numbers(settings.output / f"{settings.suite}.json", content)
    drawn = draw_all(report, pictures, stem)
    overview = f"{stem}-frontier.png"
    if overview in made:
        drawn.insert(0, draw_frontier(report, pictures / overview))
    return [page, numbers, *drawn]


def main(arguments: Iterable[str] | None = None) -> int:
    suites = "; ".join(f"{suite.name}: {suite.about}" for suite in SUITES.values())
    settings = parse(Settings, "compare", __doc__, arguments, epilog=suites)
    console = make_console()
    begin = time.perf_counter()
    comparison = Comparison(settings, console)
    comparison.run()
    seconds = time.perf_counter() - begin
    for path in write(comparison, seconds):
        console.print(f"Wrote {path}")
    console.print(f"Took {seconds / 60:.1f} minutes.")
    return 0
