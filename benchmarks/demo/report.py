"""What the demo found: a table for the terminal and for Markdown, a picture, and all numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import lightning
import torch
from rich.console import Console

from benchmarks.common.command import write_numbers
from benchmarks.common.tables import markdown_table, rich_table
from benchmarks.demo.runs import ArmRun, Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADER = ("task", "arm", "test accuracy", "states", "training time / full")
TITLES = {
    "delay": "Delayed recall, 200 steps of noise",
    "digits": "Digits, pixel by pixel, 64 steps",
}
COLORS = {"full": "tab:blue", "compressed": "tab:orange", "small": "tab:green"}
# Eight spectra can be told apart; forty can't.
SPECTRA_SHOWN = 8


def write_report(
    runs: Sequence[ArmRun], settings: Settings, seconds: float, console: Console
) -> list[Path]:
    """Print the table, write `demo.md`, `demo.json` and `demo.png`, and return their paths."""
    rows, note = make_rows(runs), make_note(runs, settings, seconds)
    title = "Three ways to train, on the CPU"
    style = {"title": title, "caption": note, "caption_justify": "left"}
    console.print(rich_table(HEADER, rows, words=len(HEADER), **style))
    markdown, numbers, picture = (settings.output / f"demo.{x}" for x in ("md", "json", "png"))
    write_numbers(numbers, all_numbers(runs, settings, seconds))
    markdown.write_text(f"{markdown_table(HEADER, rows)}\n{note}\n", encoding="utf-8")
    draw(runs, picture)
    return [markdown, numbers, picture]


def by_arm(runs: Iterable[ArmRun]) -> dict[str, list[ArmRun]]:
    """Arm -> its runs in the order of the seeds; arms in the order of their first run."""
    arms: dict[str, list[ArmRun]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    return arms


def by_task(runs: Iterable[ArmRun]) -> dict[str, dict[str, list[ArmRun]]]:
    """Task -> arm -> its runs."""
    tasks: dict[str, list[ArmRun]] = {}
    for run in runs:
        tasks.setdefault(run.task, []).append(run)
    return {task: by_arm(members) for task, members in tasks.items()}


def make_rows(runs: Sequence[ArmRun]) -> list[tuple[str, ...]]:
    """One row for each task and arm: accuracy, states and relative time."""
    return [
        (task, arm, accuracy(members), states(members), relative_time(members, arms["full"]))
        for task, arms in by_task(runs).items()
        for arm, members in arms.items()
    ]


def accuracy(runs: Sequence[ArmRun]) -> str:
    values = [run.accuracy for run in runs]
    return f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else 0:.3f}"


def states(runs: Sequence[ArmRun]) -> str:
    """For each layer `before -> after`; seeds that differ are listed."""
    cells = []
    for layer in runs[0].before:
        before = [run.before[layer] for run in runs]
        after = [run.after[layer] for run in runs]
        change = _listed(before) if before == after else f"{_listed(before)} -> {_listed(after)}"
        cells.append(f"{layer}: {change}")
    return "\n".join(cells)


def _listed(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "/".join(map(str, values))


def ratios(runs: Sequence[ArmRun], full: Sequence[ArmRun], clock: str = "cpu") -> list[float]:
    """Time over that of the full arm, seed by seed."""
    return [getattr(a, clock) / getattr(b, clock) for a, b in zip(runs, full, strict=True)]


def relative_time(runs: Sequence[ArmRun], full: Sequence[ArmRun]) -> str:
    if runs[0].arm == "full":
        return "1"
    values = ratios(runs, full)
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def make_note(runs: Sequence[ArmRun], settings: Settings, seconds: float) -> str:
    """What the figures in the table are."""
    tasks = by_task(runs)
    wall = "; ".join(
        f"{task}: "
        + ", ".join(
            f"{arm} {median(ratios(members, arms['full'], 'wall')):.2f}"
            for arm, members in arms.items()
            if arm != "full"
        )
        for task, arms in tasks.items()
    )
    argument = "" if settings.tolerance is None else f"tolerance={settings.tolerance:g}"
    full = ", ".join(
        f"{task} {settings.steps_of(arms['full'][0].task)} steps in "
        f"{median(run.cpu for run in arms['full']):.1f} s"
        for task, arms in tasks.items()
    )
    return (
        f"CPU, one thread for each seed. Accuracy: mean ± standard deviation over seeds "
        f"{', '.join(map(str, settings.seeds))}. Compressed: CompreSSMCallback({argument}). "
        f"Small: trained from scratch at the final dimension of the compressed run of the same "
        f"seed. Time: processor seconds of training, looks and reductions included; median over "
        f"seeds of the ratio within a seed (smallest to largest), the arms taking turns by the "
        f"epoch; full: {full}. By the clock on the wall the ratios are: {wall}. Everything took "
        f"{seconds:.0f} s."
    )


def all_numbers(runs: Sequence[ArmRun], settings: Settings, seconds: float) -> dict[str, Any]:
    """Everything that was measured, in plain types."""
    return {
        "device": "CPU, one thread",
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
        "settings": asdict(settings),
        "seconds": seconds,
        "runs": [asdict(run) for run in runs],
    }


def draw(runs: Sequence[ArmRun], path: Path) -> None:
    """A row of panels for each task: accuracy against time, state dimensions, spectra."""
    from matplotlib.figure import Figure

    tasks = by_task(runs)
    figure = Figure(figsize=(14, 4 * len(tasks)), layout="constrained")
    panels: list[Callable[[Axes, dict[str, list[ArmRun]]], None]] = [
        draw_accuracy,
        draw_dims,
        draw_spectra,
    ]
    rows = figure.subplots(len(tasks), len(panels), squeeze=False)
    for row, (task, arms) in zip(rows, tasks.items(), strict=True):
        for axes, panel in zip(row, panels, strict=True):
            panel(axes, arms)
        row[0].set_title(f"{TITLES[task]}\n{row[0].get_title()}")
    figure.savefig(path, dpi=150)


def draw_spectra(axes: Axes, arms: dict[str, list[ArmRun]]) -> None:
    """Spectra of the compressed arm: dense in time while it shrinks, sparse afterwards."""
    from matplotlib import colormaps

    run = arms["compressed"][0]
    shown = choose_spectra(run.spectra)
    for place, (step, sigma) in enumerate(shown):
        color = colormaps["viridis"](place / len(shown))
        axes.semilogy(range(1, len(sigma) + 1), sigma, color=color, label=f"{step}")
    axes.set(
        title=f"Hankel spectrum, compressed, seed {run.seed}",
        xlabel="state",
        ylabel="Hankel singular value",
        # States without any energy would squeeze the rest.
        ylim=(1e-4 * max(max(sigma) for _, sigma in shown), None),
    )
    axes.legend(title="after step", fontsize="small")


def choose_spectra(
    spectra: Sequence[tuple[int, list[float]]], limit: int = SPECTRA_SHOWN
) -> list[tuple[int, list[float]]]:
    """Each new size once, then the rest of the run at even distances; at most `limit` in all."""
    sizes = [next(group) for _, group in groupby(spectra, key=lambda pair: len(pair[1]))]
    sizes = sizes[: limit - 1]
    rest = [pair for pair in spectra if pair[0] > sizes[-1][0]]
    room = min(limit - len(sizes), len(rest))
    later = [rest[round((i + 1) * len(rest) / room) - 1] for i in range(room)]
    return [*sizes, *later]


def draw_dims(axes: Axes, arms: dict[str, list[ArmRun]]) -> None:
    for arm, runs in arms.items():
        for run in runs:
            steps, dims = zip(*run.dims, strict=True)
            label = arm if run is runs[0] else None
            axes.step(steps, dims, where="post", color=COLORS[arm], alpha=0.7, label=label)
    axes.set(title="State dimension, each seed", xlabel="step", ylabel="states", ylim=(0, None))
    axes.legend()


def draw_accuracy(axes: Axes, arms: dict[str, list[ArmRun]]) -> None:
    """Each seed against its training time in units of the full run's; the last point is marked."""
    full = {run.seed: run.cpu for run in arms["full"]}
    for arm, runs in arms.items():
        for run in runs:
            seconds, accuracies = zip(*run.curve, strict=True)
            shares = [second / full[run.seed] for second in seconds]
            label = arm if run is runs[0] else None
            axes.plot(shares, accuracies, color=COLORS[arm], alpha=0.6, label=label)
            axes.plot(shares[-1:], accuracies[-1:], "o", color=COLORS[arm])
    axes.set(title="test accuracy, each seed", xlabel="training time / full", ylabel="accuracy")
    axes.legend(loc="lower right")
