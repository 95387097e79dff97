"""How much faster a training step gets when an LRU has fewer states.

Run it as `python -m benchmarks.step_ratio`.

Both sizes run the same code. Times are taken in turn (large, small, large, small, ...), so that a
busy machine disturbs both alike, and only ratios are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from lightning_compressm.nn import LRU

CLASSES = 10


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


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, list[float]]:
    """Return the ratio large / small of every repeat, by clock."""
    inputs = torch.randn(arguments.batch, arguments.length, 1)
    targets = torch.randint(CLASSES, (arguments.batch,))
    large, small = (Trainee(arguments.width, n) for n in (arguments.large, arguments.small))
    # Small steps are short, so more of them make one repeat: the clocks tick coarsely.
    counts = {large: arguments.steps, small: 4 * arguments.steps}
    for trainee in counts:
        trainee.timed(inputs, targets, 2)
    ratios: dict[str, list[float]] = {"cpu": [], "wall": []}
    for _ in track(range(arguments.repeats), "measuring", console=console, transient=True):
        slow, fast = (trainee.timed(inputs, targets, n) for trainee, n in counts.items())
        ratios["cpu"].append(slow.cpu / fast.cpu)
        ratios["wall"].append(slow.wall / fast.wall)
    return ratios


def table(ratios: dict[str, list[float]], title: str) -> Table:
    """Lay the ratios out with median and spread."""
    result = Table(title=title)
    for heading in ("clock", "median", "min", "quartiles", "max"):
        result.add_column(heading, justify="left" if heading == "clock" else "right")
    for clock, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        numbers = (f"{middle:.1f}x", f"{min(values):.1f}x", f"{low:.1f}-{high:.1f}x")
        result.add_row(clock, *numbers, f"{max(values):.1f}x")
    return result


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--large", type=int, default=256, help="states before (%(default)s)")
    parser.add_argument("--small", type=int, default=16, help="states after (%(default)s)")
    parser.add_argument("--batch", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--length", type=int, default=784, help="steps (%(default)s)")
    parser.add_argument("--width", type=int, default=8, help="inputs H (%(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="at least 2 (%(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="in one repeat (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--target", type=float, help="fail if the median CPU ratio is lower")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 2:
        parser.error("--repeats must be at least 2: one repeat has no spread")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    console = Console()
    ratios = measure(arguments, console)
    shape = f"B={arguments.batch} L={arguments.length} H={arguments.width}"
    title = f"Training step, N={arguments.large} against N={arguments.small}, {shape}"
    console.print(table(ratios, f"{title}, {arguments.threads} thread(s)"))
    missed = arguments.target is not None and statistics.median(ratios["cpu"]) < arguments.target
    if missed:
        console.print(f"below the target of {arguments.target:g}x")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
