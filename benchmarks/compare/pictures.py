"""Pictures of a comparison, one file for each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING

from benchmarks.compare.methods_page import Report
from benchmarks.compare.statistics import accuracy, select, time_to_full, values_of
from benchmarks.compare.tasks import CompareTask
from benchmarks.compare.unit import FULL, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SPECTRA_SHOWN = (0.0, 0.02, 0.1, 0.3, 1.0)


def draw_all(report: Report, folder: Path, stem: str) -> list[Path]:
    """Draw every task that has results; returns the files."""
    return [
        draw_task(report, task, folder / f"{stem}-{task.name}.png")
        for task in report.tasks
        if any(r.task == task.name for r in report.results)
    ]


def draw_task(report: Report, task: CompareTask, path: Path) -> Path:
    """Accuracy against states and time; spectra and dominant subspace over training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    panels = figure.subplots(1, 4)
    draw_against_states(panels[0], report, task)
    draw_against_time(panels[1], report, task)
    full = [r for r in select(report.results, task=task.name, arm=FULL, size=None) if r.curves]
    if full:
        draw_spectra(panels[2], full[0])
        draw_overlap(panels[3], full)
    else:
        for axes in panels[2:]:
            axes.set_axis_off()
    figure.suptitle(f"{task.title} (CPU, {len(report.seeds)} seeds)")
    panels[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
    return path


def draw_against_states(axes: Axes, report: Report, task: CompareTask) -> None:
    """One line for each arm; seeds as dots."""
    for number, arm in enumerate(report.arms):
        sizes = (None,) if arm.own_size else task.sizes
        groups = [select(report.results, task=task.name, arm=arm.name, size=s) for s in sizes]
        points = [(_mean_states(runs), mean(values_of(runs, accuracy))) for runs in groups if runs]
        if not points:
            continue
        color, marker = style(number)
        states, accuracies = zip(*sorted(points), strict=True)
        axes.plot(states, accuracies, label=arm.label, color=color, marker=marker)
        for runs in groups:
            each = [mean(r.states) for r in runs]
            axes.scatter(each, values_of(runs, accuracy), s=6, alpha=0.5, color=color)
    axes.set(xlabel="states of a layer", ylabel="test accuracy", xscale="log")


def draw_against_time(axes: Axes, report: Report, task: CompareTask) -> None:
    """One point for each arm and size."""
    for number, arm in enumerate(report.arms):
        for size in (None,) if arm.own_size else task.sizes:
            runs = select(report.results, task=task.name, arm=arm.name, size=size)
            times = values_of(runs, time_to_full)
            if times:
                color, marker = style(number)
                point = (median(times), mean(values_of(runs, accuracy)))
                axes.scatter(*point, color=color, marker=marker)
                axes.annotate(str(size or "own"), point)
    axes.axvline(1, color="grey", linewidth=0.5)
    axes.set(xlabel="training time / full", ylabel="test accuracy")


def style(number: int) -> tuple[str, str]:
    """Colour and marker of one arm among many."""
    return f"C{number % 10}", "os^"[number // 10 % 3]


def draw_spectra(axes: Axes, run: Result) -> None:
    """The full model's spectra, first layer."""
    shares, spectra = run.curves["shares"], run.curves["spectra"]
    shown = [(s, v) for s, v in zip(shares, spectra, strict=True) if s in _SPECTRA_SHOWN]
    for place, (share, sigma) in enumerate(shown):
        color = (0.1, 0.2 + 0.15 * place, 0.9 - 0.17 * place)
        axes.semilogy(range(1, len(sigma) + 1), sigma, color=color, label=f"{share:.0%}")
    largest = max(max(sigma) for _, sigma in shown)
    axes.set(
        xlabel="state",
        ylabel="Hankel energy",
        title=f"spectra, full, seed {run.seed}",
        ylim=(1e-5 * largest, None),
    )
    axes.legend(title="of training", fontsize="small")


def draw_overlap(axes: Axes, runs: Sequence[Result]) -> None:
    """How much of the finally dominant subspace is dominant already."""
    shares = runs[0].curves["shares"]
    for number, size in enumerate(runs[0].curves["overlap"]):
        for run in runs:
            label = f"{size} states" if run is runs[0] else None
            axes.plot(shares, run.curves["overlap"][size], color=f"C{number}", label=label)
    axes.axvline(0.1, color="grey", linewidth=0.5)
    axes.set(xlabel="share of the training", title="overlap with the final dominant subspace")
    axes.legend(fontsize="small")


def _mean_states(runs: Sequence[Result]) -> float:
    return mean(mean(r.states) for r in runs)
