"""The page about the callback without arguments: what it reaches, and which part does what."""

from __future__ import annotations

from statistics import mean

from benchmarks.common.tables import markdown_table
from benchmarks.compare.page import HEADER, Report, arms_section, row
from benchmarks.compare.statistics import (
    accuracy,
    analysis_share,
    median_and_range,
    select,
    time_to_full,
    time_to_small,
    values_of,
)
from benchmarks.compare.tasks import CompareTask
from benchmarks.compare.verdicts import compare, points

BARE = "bare"
OTHERS = {
    "full": "full",
    "small-as-bare": "small, as many states",
    "published-as-bare": "as published, as many states",
    "defaults": "CompreSSMCallback(0.05)",
    "bare-steps-as-they-are": "steps as they are",
    "bare-own-gramians": "own Gramians only",
}


def make_bare_page(report: Report) -> str:
    """The whole page in Markdown."""
    parts = [
        _introduction(report),
        _times(report),
        _differences(report),
        "## Tables\n",
        *(_task(report, task) for task in report.tasks),
        arms_section(report.arms),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _introduction(report: Report) -> str:
    seeds = ", ".join(map(str, report.seeds))
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return f"""# The callback without arguments, measured

**CPU, small scale.** Everything on this page was written by

```console
$ {report.command}
```

on the tasks of [](results.md), where the recipe and the terms are described. Seeds {seeds}.
Versions: {versions}. The thresholds of `CompreSSMCallback()` were chosen on these tasks with some
of these seeds.
"""


def _times(report: Report) -> str:
    rows = []
    for task in report.tasks:
        runs = select(report.results, task=task.name, arm=BARE, size=None)
        share = mean(mean(run.states) for run in runs) / task.d_state
        rows.append(
            (
                task.name,
                f"{share:.2f}",
                f"{max(max(run.states) for run in runs) / task.d_state:.2f}",
                median_and_range(values_of(runs, time_to_full)),
                median_and_range(values_of(runs, time_to_small)),
                f"{mean(values_of(runs, analysis_share)):.1%}",
            )
        )
    header = ("task", "states left, mean", "largest", "time / full", "time / small", "looks, swaps")
    return (
        "## Size and time\n\nShare of the states that is left, mean over layers and seeds and the "
        "largest of all; training time over that of the full model and of a small one from scratch "
        "with as many states, median (smallest to largest); share of the training time that looks "
        "and swaps take.\n\n" + markdown_table(header, rows)
    )


def _differences(report: Report) -> str:
    rows = []
    for task in report.tasks:
        gaps = [compare(report.results, task, None, o, accuracy, BARE) for o in OTHERS]
        rows.append((task.name, *map(points, gaps)))
    return (
        "## Accuracy against the others\n\nPoints of test accuracy, `CompreSSMCallback()` minus "
        "the other, mean over the seeds ± standard error. **Bold**: more than two standard "
        "errors. The last two columns are the callback without one of its parts.\n\n"
        + markdown_table(("task", *OTHERS.values()), rows)
    )


def _task(report: Report, task: CompareTask) -> str:
    found = [
        (arm.label, select(report.results, task=task.name, arm=arm.name, size=None))
        for arm in report.arms
    ]
    rows = [row(label, runs) for label, runs in found if runs]
    picture = f"![{task.title}]({report.pictures}-{task.name}.png)\n\n" if report.pictures else ""
    return f"### {task.title}\n\n{picture}{markdown_table(HEADER, rows)}"
