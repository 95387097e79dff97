"""What the callback costs a training step that it does not reduce anything in.

Run it as `python -m benchmarks.overhead`.

Every run is a real Trainer on one process. The first half of its steps lies inside the window, the
second half after it; the one look in between finds nothing worth removing, so that all steps are
alike. The callback's hooks and the steps are timed side by side, in every step, so that a busy
machine slows both down; a share is the median of the hooks' times over the median of the steps'.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common.command import check_least, make_console, one_of, parse, prepare
from benchmarks.common.tables import rich_table
from benchmarks.models.classifier import LayerFactory, SequenceClassifier
from benchmarks.train.trainer import make_trainer
from lightning_compressm import CompreSSMCallback
from lightning_compressm.nn import LRU
from lightning_compressm.nn._mamba import MambaBlock

CLASSES = 10
EPOCH = 10  # steps
PHASES = ("in the window", "after it")


@dataclass(frozen=True)
class Size:
    """A model and its batches."""

    layer: LayerFactory
    blocks: int
    d_model: int
    d_state: int
    batch: int
    length: int

    def __str__(self) -> str:
        return (
            f"{self.blocks} x {self.layer.__name__}, H={self.d_model} N={self.d_state} "
            f"B={self.batch} L={self.length}"
        )


SIZES = {
    "tiny": Size(LRU, 1, 4, 16, 8, 32),
    "medium": Size(LRU, 4, 32, 64, 16, 128),
    "mamba": Size(MambaBlock, 2, 16, 16, 8, 64),
}


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        sizes: Models to measure.
        seeds: How many.
        steps: Of each run.
        threads: Of the processor.
        target: Fail if the median share at medium size is higher, in percent.
    """

    sizes: tuple[str, ...] = one_of(tuple(SIZES), SIZES)
    seeds: int = 5
    steps: int = 200
    threads: int = 1
    target: float | None = None

    def __post_init__(self) -> None:
        check_least("--steps", 8 * EPOCH, [self.steps], ": each half needs steps to be timed")


class Timed(CompreSSMCallback):
    """The callback with a clock on everything that it does in a step, listening to layers included.

    Attributes:
        hooks: phase -> seconds of each step spent in the callback.
        steps: phase -> seconds of each step, to the beginning of the next one.
        epochs: phase -> seconds spent in the callback between two epochs.
    """

    def __init__(self, steps: int) -> None:
        self.half = steps // 2
        # A look is due at the window's end, where no layer can lose 99% of its states for nothing.
        super().__init__(
            0.0,
            window=(0, self.half),
            every_n_steps=10 * steps,
            min_reduction=0.99,
            verbose=False,
        )
        self.hooks: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.steps: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.epochs: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self._since = 0.0
        self._spent = 0.0
        self._between = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._note(trainer.global_step, now - self._since if batch_idx else None)
        self._since, self._spent = now, 0.0
        before = {id(hook) for _, _, hook in _forward_hooks(pl_module)}
        start = time.perf_counter()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._spent += time.perf_counter() - start
        for module, key, hook in _forward_hooks(pl_module):
            if id(hook) not in before:
                module._forward_pre_hooks[key] = self._clocked(hook)

    def on_train_batch_end(self, *arguments: Any) -> None:
        start = time.perf_counter()
        super().on_train_batch_end(*arguments)
        self._spent += time.perf_counter() - start

    def on_train_epoch_start(self, *arguments: Any) -> None:
        start = time.perf_counter()
        super().on_train_epoch_start(*arguments)
        self._between += time.perf_counter() - start

    def on_train_epoch_end(self, *arguments: Any) -> None:
        start = time.perf_counter()
        super().on_train_epoch_end(*arguments)
        self._between += time.perf_counter() - start

    def _note(self, done: int, seconds: float | None) -> None:
        """Book the step that has just ended; `None` for one with an epoch's end behind it."""
        warm = done > EPOCH and abs(done - self.half) > EPOCH
        phase = PHASES[done > self.half]
        if seconds is None:
            if warm:
                self.epochs[phase].append(self._between)
            self._between = 0.0
        elif warm:
            self.hooks[phase].append(self._spent)
            self.steps[phase].append(seconds)

    def _clocked(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = hook(*arguments)
            self._spent += time.perf_counter() - start
            return result

        return clocked


def _forward_hooks(module: nn.Module) -> list[tuple[nn.Module, int, Callable[..., Any]]]:
    return [
        (part, key, hook)
        for part in module.modules()
        for key, hook in part._forward_pre_hooks.items()
    ]


class Classifier(L.LightningModule):
    """Trains one model on random batches."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.model = SequenceClassifier(
            1,
            CLASSES,
            d_model=size.d_model,
            d_state=size.d_state,
            n_blocks=size.blocks,
            layer=size.layer,
        )

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.model(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@dataclass
class Costs:
    """Of one model in one phase, seconds for each seed: of a step, of the hooks in it, and of the
    hooks between two epochs, which also log metrics.
    """

    step: list[float] = field(default_factory=list)
    hooks: list[float] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)

    @property
    def shares(self) -> list[float]:
        """The hooks' share of a step."""
        return [hooks / step for hooks, step in zip(self.hooks, self.step, strict=True)]


def measure(
    sizes: Sequence[str], seeds: int, steps: int, console: Console
) -> dict[tuple[str, str], Costs]:
    """Train every model with every seed, one model after the other within a seed."""
    costs = {(size, phase): Costs() for size in sizes for phase in PHASES}
    runs = [(seed, size) for seed in range(seeds) for size in sizes]
    for seed, size in track(runs, "measuring", console=console, transient=True):
        callback = run(SIZES[size], seed, steps)
        for phase in PHASES:
            cost = costs[size, phase]
            cost.step.append(statistics.median(callback.steps[phase]))
            cost.hooks.append(statistics.median(callback.hooks[phase]))
            cost.epochs.append(statistics.median(callback.epochs[phase]))
    return costs


def run(size: Size, seed: int, steps: int) -> Timed:
    """One training; the callback holds the times."""
    torch.manual_seed(seed)
    count = EPOCH * size.batch
    data = TensorDataset(torch.randn(count, size.length, 1), torch.randint(CLASSES, (count,)))
    callback = Timed(steps)
    trainer = make_trainer(steps, [callback])
    trainer.fit(Classifier(size), DataLoader(data, batch_size=size.batch))
    if [event["action"] for event in callback.history] != ["skip"] * size.blocks:
        raise AssertionError(f"expected one look that changes nothing, got {callback.history}")
    return callback


def table(costs: dict[tuple[str, str], Costs]) -> Table:
    """One line for each model and phase, medians and spread over the seeds."""
    sizes = "; ".join(f"{name}: {SIZES[name]}" for name in dict(costs.keys()))
    header = ("model", "steps", "a step", "hooks", "median share", "lowest to highest", "epoch")
    rows = [
        (
            size,
            phase,
            f"{1e3 * statistics.median(cost.step):.2f} ms",
            f"{1e6 * statistics.median(cost.hooks):.0f} us",
            f"{statistics.median(cost.shares):.3%}",
            f"{min(cost.shares):.3%} to {max(cost.shares):.3%}",
            f"{1e3 * statistics.median(cost.epochs):.1f} ms",
        )
        for (size, phase), cost in costs.items()
    ]
    title = "The callback's share of a training step"
    return rich_table(header, rows, words=2, title=title, caption=sizes)


def main(arguments: Iterable[str] | None = None) -> int:
    settings = parse(Settings, "overhead", __doc__, arguments)
    prepare(settings.threads)
    console = make_console()
    costs = measure(settings.sizes, settings.seeds, settings.steps, console)
    console.print(table(costs))
    worst = max(
        (statistics.median(c.shares) for (size, _), c in costs.items() if size == "medium"),
        default=0.0,
    )
    missed = settings.target is not None and 100 * worst > settings.target
    if missed:
        console.print(f"above the target of {settings.target:g}%")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
