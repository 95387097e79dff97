"""The callback's share of a step that reduces nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from benchmarks.common.tables import rich_table
from benchmarks.overhead.models import EPOCH, SIZES, Size, train
from lightning_compressm import CompreSSMCallback

PHASES = ("in the window", "after it")


class Timed(CompreSSMCallback):
    """The callback with a clock on everything that it does in a step, listening to layers included.

    Attributes:
        hooks: phase -> seconds of each step spent in the callback.
        steps: phase -> seconds of each step, to the beginning of the next one.
        epochs: phase -> seconds spent in the callback between two epochs.
        listened: phase -> for each step, the number of layers that were listened to.
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
        self.listened: dict[str, list[int]] = {phase: [] for phase in PHASES}
        self._listening = 0
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
        added = [found for found in _forward_hooks(pl_module) if id(found[-1]) not in before]
        for module, key, hook in added:
            module._forward_pre_hooks[key] = self._clocked(hook)
        self._listening = len(added)

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
            self.listened[phase].append(self._listening)

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
    callback = Timed(steps)
    train(size, seed, steps, callback)
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
