"""The page of all methods: every figure on it comes from the results it is given."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks.arms import Arm, all_arms
from benchmarks.common.tables import markdown_table
from benchmarks.compare import verdicts
from benchmarks.compare.statistics import (
    accuracy,
    after_cut,
    analysis_share,
    mean_and_spread,
    median_and_range,
    select,
    time_to_full,
    time_to_small,
    values_of,
)
from benchmarks.compare.tasks import CompareTask
from benchmarks.compare.unit import Result

HEADER = (
    "arm",
    "states of each layer",
    "test accuracy",
    "right after the cut",
    "test loss",
    "time / full",
    "time / small",
    "analysis",
)


@dataclass(frozen=True)
class Report:
    """What the page is about.

    Attributes:
        tasks: In this order.
        results: Of all tasks, arms and seeds.
        command: That made them.
        versions: Of the packages.
        pictures: Where they lie, relative to the page, up to the task's name; None for none.
    """

    tasks: Sequence[CompareTask]
    results: Sequence[Result]
    command: str
    versions: dict[str, str]
    pictures: str | None = None

    @property
    def seeds(self) -> list[int]:
        return sorted({r.seed for r in self.results})

    @functools.cached_property
    def arms(self) -> list[Arm]:
        """Those with results."""
        there = {r.arm for r in self.results}
        return [arm for name, arm in all_arms().items() if name in there]


def make_methods_page(report: Report) -> str:
    """The whole page in Markdown."""
    parts = [
        _introduction(report),
        "## Tables\n",
        *(_task_section(report, task) for task in report.tasks),
        verdicts.claims(report.tasks, report.results),
        verdicts.differences(report.tasks, report.results),
        _choices(report),
        verdicts.later(report.tasks, report.results),
        verdicts.settling(report.tasks, report.results),
        verdicts.where_it_does_not_help(report.tasks, report.results),
        arms_section(report.arms),
    ]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _introduction(report: Report) -> str:
    seeds = ", ".join(map(str, report.seeds))
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return f"""# All methods at the same sizes

**CPU, small scale.** Everything on this page was written by

```console
$ {report.command}
```

which trains small networks for seconds to a minute each, on data that need no download. It shows
how the methods compare when all else is equal; it does not reproduce the published experiments,
whose configurations are in `benchmarks/configs`.

Seeds {seeds}; one thread for each training; all arms of one task and seed take turns at the
processor by 25 steps. Accuracy: mean ± standard deviation over the seeds, on test sets. No
checkpoint is chosen within a run, but the package's defaults and the weight of HSV regularisation
were chosen by test accuracy on some of these tasks ([defaults](defaults.md)). Right after the cut:
test accuracy before any further training. Time: processor
seconds of training, reductions and cuts included, and the full model's where an arm starts from it;
median over seeds of the ratio within one seed (smallest to largest). Analysis: share of an arm's
training time spent in looks and reductions. Versions: {versions}.
"""


def _task_section(report: Report, task: CompareTask) -> str:
    lines = [f"### {task.title}\n", f"`{task.name}`: {_recipe(task)}\n"]
    if report.pictures:
        lines.append(f"![{task.title}]({report.pictures}-{task.name}.png)\n")
    free = [r for arm in report.arms if arm.own_size for r in _rows_of(report, task, arm, None)]
    lines.append(markdown_table(HEADER, free))
    for size in task.sizes:
        arms = [arm for arm in report.arms if not arm.own_size]
        rows = [row for arm in arms for row in _rows_of(report, task, arm, size)]
        lines += [f"To {size} states:\n", markdown_table(HEADER, rows)]
    return "\n".join(lines)


def _recipe(task: CompareTask) -> str:
    what = "LRU" if task.kind == "linear" else "Selective"
    return (
        f"{what} layers with {task.d_state} states at full size, {task.steps} steps; in-training "
        f"arms reduce after step {task.look} unless their name says otherwise."
    )


def _rows_of(
    report: Report, task: CompareTask, arm: Arm, size: int | None
) -> list[tuple[str, ...]]:
    runs = select(report.results, task=task.name, arm=arm.name, size=size)
    return [row(arm.label, runs)] if runs else []


def row(label: str, runs: Sequence[Result]) -> tuple[str, ...]:
    """One line of a table."""
    share = mean(values_of(runs, analysis_share))
    return (
        label,
        states(runs),
        mean_and_spread(values_of(runs, accuracy)),
        mean_and_spread(values_of(runs, after_cut)),
        mean_and_spread([r.loss for r in runs]),
        median_and_range(values_of(runs, time_to_full)),
        median_and_range(values_of(runs, time_to_small)),
        f"{share:.1%}" if share else "",
    )


def states(runs: Iterable[Result]) -> str:
    """States of each layer; the range over seeds where they differ."""
    layers = zip(*(r.states for r in runs), strict=True)
    ranges = [(min(layer), max(layer)) for layer in layers]
    texts = [str(low) if low == high else f"{low}–{high}" for low, high in ranges]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def _choices(report: Report) -> str:
    """Only where variants of ours are compared."""
    if not any(arm.choice for arm in report.arms):
        return ""
    return verdicts.against_ours(report.tasks, report.results)


def arms_section(arms: Iterable[Arm]) -> str:
    rows = [(arm.label, f"`{arm.name}`", arm.about) for arm in arms]
    table = markdown_table(("arm", "name", "what it does"), rows)
    return (
        f"## The arms\n\n{table}\nEach is one file in `benchmarks/arms`; a file more is an arm "
        "more in all of this.\n"
    )
