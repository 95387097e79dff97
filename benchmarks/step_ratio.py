"""How much faster a training step gets when an LRU has fewer states.

Run it as `python -m benchmarks.step_ratio`.

Both sizes run the same code. Times are taken in turn (large, small, large, small, ...), so that a
busy machine disturbs both alike, and only ratios are printed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common.command import check_least, make_console, parse, prepare
from benchmarks.common.tables import rich_table
from lightning_compressm.nn import LRU

CLASSES = 10


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        large: States before.
        small: States after.
        batch: Sequences in a batch.
        length: Steps of a sequence.
        width: Inputs H.
        repeats: Pairs of measurements, at least 2.
        steps: Of training in one measurement.
        threads: Of the processor.
        target: Fail if the median CPU ratio is lower.
    """

    large: int = 256
    small: int = 16
    batch: int = 50
    length: int = 784
    width: int = 8
    repeats: int = 9
    steps: int = 3
    threads: int = 1
    target: float | None = None

    def __post_init__(self) -> None:
        check_least("--repeats", 2, [self.repeats], ": one repeat has no spread")


class LRUBlock(nn.Module):
    """Encoder 1 -> H, LRU, GELU, linear, mean over time, linear head: (B, L, 1) -> logits."""

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, d_model)
        self.recurrence = LRU(d_model, d_state)
        self.mixer = nn.Linear(d_model, d_model)
        self.head = nn.Linear(d_model, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.recurrence(self.encoder(inputs)))
        logits: Tensor = self.head(self.mixer(hidden).mean(1))
        return logits


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step: on the clock, and of the processor in all threads."""

    wall: float
    cpu: float


class Trainee:
    """A block with its optimizer; each call of `step` trains on the same batch."""

    def __init__(self, d_model: int, d_state: int) -> None:
        torch.manual_seed(0)
        self.model = LRUBlock(d_model, d_state)
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(inputs), targets).backward()
        self.optimizer.step()

    def timed(self, inputs: Tensor, targets: Tensor, steps: int) -> StepTime:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step(inputs, targets)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return StepTime(wall / steps, cpu / steps)


def measure(settings: Settings, console: Console) -> dict[str, list[float]]:
    """Return the ratio large / small of every repeat, by clock."""
    inputs = torch.randn(settings.batch, settings.length, 1)
    targets = torch.randint(CLASSES, (settings.batch,))
    large, small = (Trainee(settings.width, n) for n in (settings.large, settings.small))
    # Small steps are short, so more of them make one repeat: the clocks tick coarsely.
    counts = {large: settings.steps, small: 4 * settings.steps}
    for trainee in counts:
        trainee.timed(inputs, targets, 2)
    ratios: dict[str, list[float]] = {"cpu": [], "wall": []}
    for _ in track(range(settings.repeats), "measuring", console=console, transient=True):
        slow, fast = (trainee.timed(inputs, targets, n) for trainee, n in counts.items())
        ratios["cpu"].append(slow.cpu / fast.cpu)
        ratios["wall"].append(slow.wall / fast.wall)
    return ratios


def table(ratios: dict[str, list[float]], title: str) -> Table:
    """Lay the ratios out with median and spread."""
    rows = []
    for clock, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        numbers = (f"{middle:.1f}x", f"{min(values):.1f}x", f"{low:.1f}-{high:.1f}x")
        rows.append((clock, *numbers, f"{max(values):.1f}x"))
    header = ("clock", "median", "min", "quartiles", "max")
    return rich_table(header, rows, words=1, title=title)


def main(arguments: Iterable[str] | None = None) -> int:
    settings = parse(Settings, "step_ratio", __doc__, arguments)
    prepare(settings.threads)
    console = make_console()
    ratios = measure(settings, console)
    shape = f"B={settings.batch} L={settings.length} H={settings.width}"
    title = f"Training step, N={settings.large} against N={settings.small}, {shape}"
    console.print(table(ratios, f"{title}, {settings.threads} thread(s)"))
    missed = settings.target is not None and statistics.median(ratios["cpu"]) < settings.target
    if missed:
        console.print(f"below the target of {settings.target:g}x")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
