"""The results page: what the callback without arguments reaches, and which part does what."""

from __future__ import annotations

from statistics import mean, median

from benchmarks.common.pages import MNIST, part
from benchmarks.common.tables import markdown_table
from benchmarks.compare.methods_page import HEADER, Report, arms_section, row
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
HEADLINE = {name: OTHERS[name] for name in ("full", "small-as-bare", "published-as-bare")}


def make_results_page(report: Report) -> str:
    """The whole page in Markdown."""
    parts = [
        _headline(report),
        f"## Sequential MNIST\n\n{part(MNIST)}\n",
        _where_it_does_not_help(report),
        _how(report),
        _times(report),
        _differences(report),
        "## Tables\n",
        *(_task(report, task) for task in report.tasks),
        arms_section(report.arms),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _headline(report: Report) -> str:
    rows = []
    for task in report.tasks:
        runs = select(report.results, task=task.name, arm=BARE, size=None)
        gaps = [compare(report.results, task, None, o, accuracy, BARE) for o in HEADLINE]
        share = mean(mean(run.states) for run in runs) / task.d_state
        times = median_and_range(values_of(runs, time_to_full))
        rows.append((task.name, f"{share:.2f}", times, *map(points, gaps)))
    header = ("task", "states left", "time / full", *HEADLINE.values())
    return f"""# Results

**CPU, small scale.** What `CompreSSMCallback()` without arguments reaches: share of the states that
is left; training time over that of the full model, median (smallest to largest); points of test
accuracy ahead of the full model, of a small one from scratch and of the published reduction, mean ±
standard error over the seeds. **Bold**: more than two standard errors.

{markdown_table(header, rows)}
![Accuracy against training time]({report.pictures}-frontier.png)

The grey line joins those than which no other is both faster and as accurate.

Where it does not help is said [below](#where-it-does-not-help), and then come
[how it was measured](#how-it-was-measured) and all tables. [](methods.md) has more methods, at
sizes chosen by hand, and recall tasks with Mamba layers.
"""


def _how(report: Report) -> str:
    seeds = ", ".join(map(str, report.seeds))
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return f"""## How it was measured

The part about sequential MNIST says how it was made; everything else on this page was written by

```console
$ {report.command}
```

on small networks and data that need no download, in seconds to a minute for each training.

Seeds {seeds}; one thread for each training; all arms of one task and seed take turns at the
processor by 25 steps. Accuracy: mean ± standard deviation over the seeds, on test sets. Time:
processor seconds of training, looks and swaps included; those of arms that wait for the callback's
size are counted at the pace that they had beside it. The thresholds of `CompreSSMCallback()` were
chosen on these tasks with some of these seeds. Versions: {versions}.
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


def _where_it_does_not_help(report: Report) -> str:
    lines = []
    for task in report.tasks:
        for other, label in OTHERS.items():
            gap = compare(report.results, task, None, other, accuracy, BARE)
            if gap is None or gap.verdict in ("better", "one seed"):
                continue
            if other == "full" and gap.verdict != "worse":
                continue  # as accurate is what it is for
            how = "more" if gap.verdict == "worse" else "as"
            lines.append(f"- `{task.name}`: {label} is {how} accurate ({points(gap)} points).")
        runs = select(report.results, task=task.name, arm=BARE, size=None)
        slow = values_of(runs, time_to_full)
        if slow and median(slow) > 0.9:
            lines.append(f"- `{task.name}`: training takes {median(slow):.2f} of the full time.")
    listed = "\n".join(lines) or "Nowhere on these tasks."
    return (
        "## Where it does not help\n\nBy rule, from the tables: every other way, and every part "
        "left out, than which `CompreSSMCallback()` is not better by more than two standard errors "
        "(the full model only where it is more accurate by as much), and every training of more "
        f"than nine tenths of the full time.\n\n{listed}\n"
    )


def _task(report: Report, task: CompareTask) -> str:
    found = [
        (arm.label, select(report.results, task=task.name, arm=arm.name, size=None))
        for arm in report.arms
    ]
    rows = [row(label, runs) for label, runs in found if runs]
    picture = f"![{task.title}]({report.pictures}-{task.name}.png)\n\n" if report.pictures else ""
    return f"### {task.title}\n\n{picture}{markdown_table(HEADER, rows)}"
