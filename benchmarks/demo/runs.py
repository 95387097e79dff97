"""The three arms of the demo: trained side by side, and what is kept of each."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.common.command import check_least, one_of
from benchmarks.models.classification import evaluate_classes
from benchmarks.train.interleave import TimedTurns, Turns, run_together
from benchmarks.train.trainer import TASKS, TaskName, build, make_trainer
from lightning_compressm import CompreSSMCallback, find_ssm_layers, hankel_spectra
from lightning_compressm.callbacks.schedule import BY_LOSS

STATE_DIM = 128
# So many times during a training its accuracy is measured, which counts in no time.
READINGS = 20
ARMS = ("full", "compressed", "small")
# Two epochs: one look of the callback, and one epoch at the new size.
MIN_STEPS = 50


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        tasks: Delayed recall, where memory counts, and digits, where a small model does as well.
        seeds: Each fixes initialisation, order of the batches and dropout.
        steps: Optimizer steps of every training; the task's own if not given.
        tolerance: Share of the Hankel energy that each look of the callback may discard; None for
            the callback's own default.
        output: Folder of the results.
        workers: Processes, one task and seed each; one for each core if not given.
    """

    tasks: tuple[TaskName, ...] = one_of(("delay", "digits"), TASKS)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    tolerance: float | None = None
    output: Path = Path("results")
    workers: int = max(1, os.cpu_count() or 1)

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_least("--steps", MIN_STEPS, [self.steps])
        check_least("--workers", 1, [self.workers])

    def steps_of(self, task: TaskName) -> int:
        """Optimizer steps of a training."""
        return self.steps or TASKS[task].steps


@dataclass
class ArmRun:
    """One training of one arm.

    Attributes:
        task: What is learnt.
        arm: One of `ARMS`.
        seed: As in `Settings`.
        before: State dimension by layer at the start.
        after: The same at the end.
        accuracy: On the test set, in [0, 1].
        wall: Seconds of training by the clock.
        cpu: Seconds of training by the processor.
        dims: (step, total state dimension) before each epoch and at the end.
        spectra: (step, spectrum of the first layer) at the same steps; compressed only.
        curve: (processor seconds of training, accuracy on the test set) now and then.
        looks: The callback's history; compressed only.
    """

    task: TaskName
    arm: str
    seed: int
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    accuracy: float = float("nan")
    wall: float = 0.0
    cpu: float = 0.0
    dims: list[tuple[int, int]] = field(default_factory=list)
    spectra: list[tuple[int, list[float]]] = field(default_factory=list)
    curve: list[tuple[float, float]] = field(default_factory=list)
    looks: list[dict[str, Any]] = field(default_factory=list)


class Watcher(TimedTurns):
    """Time an arm, follow its state dimension and spectra, and move the progress bar."""

    def __init__(self, turns: Turns, run: ArmRun, report: Callable[[int], None]) -> None:
        super().__init__(turns, run.arm)
        self.run = run
        self.report = report
        self.settled: Future[int] = Future()
        self._next = 0.0  # step after which the accuracy is measured again

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The callback before this one has just carried out what it decided at the epoch's end.
        self.watch.stop()
        self._look(trainer, pl_module)
        if trainer.global_step >= BY_LOSS[1] * trainer.max_steps:
            self._settle()
        self.watch.start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._look(trainer, pl_module)
        self._settle()  # at the latest: a short run may end within the epoch of the last look
        self.run.after = state_dims(pl_module)
        self.run.wall, self.run.cpu = self.watch.wall, self.watch.cpu

    def _settle(self) -> None:
        if not self.settled.done():
            self.settled.set_result(self.run.dims[-1][1])

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        dims = state_dims(pl_module)
        self.run.before = self.run.before or dims
        step, total = trainer.global_step, sum(dims.values())
        self.run.dims.append((step, total))
        if self.run.arm == "compressed":
            # Time-limited, as the callback sees the layer.
            length = _test_set(trainer)[0].shape[1]
            spectrum = next(iter(hankel_spectra(pl_module, horizon=length).values()))
            self.run.spectra.append((step, spectrum.tolist()))
        self._read_accuracy(trainer, pl_module)
        self.report(step)

    def _read_accuracy(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if step < min(self._next, trainer.max_steps):
            return
        self._next = step + trainer.max_steps / READINGS
        state = torch.get_rng_state()
        accuracy, _ = evaluate_classes(pl_module, *_test_set(trainer))
        torch.set_rng_state(state)
        pl_module.train()
        self.run.curve.append((self.watch.cpu, accuracy))


def _test_set(trainer: L.Trainer) -> tuple[torch.Tensor, torch.Tensor]:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    sequences, classes = data.tensors("test")
    return sequences, classes


def state_dims(module: L.LightningModule) -> dict[str, int]:
    return {name: layer.state_dim for name, layer in find_ssm_layers(module).items()}


def run_seed(
    task: TaskName,
    seed: int,
    settings: Settings,
    report: Callable[[str, int], None] = lambda *_: None,
) -> list[ArmRun]:
    """Train the three arms of one seed in turns.

    Args:
        task: What is learnt.
        seed: Fixes initialisation, order of the batches and dropout.
        settings: Steps and tolerance.
        report: Called with arm and step after every epoch.
    """
    turns = Turns()
    runs = {arm: ArmRun(task, arm, seed) for arm in ARMS}
    watchers = {arm: Watcher(turns, runs[arm], lambda *a, arm=arm: report(arm, *a)) for arm in ARMS}
    settled = watchers["compressed"].settled
    # Who goes first changes from seed to seed.
    starters = ["full", "compressed"][:: 1 if seed % 2 else -1]

    def train(arm: str) -> None:
        if arm == "small":
            d_state = settled.result()
            turns.join(arm)
        else:
            d_state = STATE_DIM
        try:
            turns.wait(arm)
            train_arm(watchers[arm], d_state, settings)
        except BaseException as error:
            # The small arm must not wait for a size that will never be known.
            if arm == "compressed" and not settled.done():
                settled.set_exception(error)
            raise
        finally:
            turns.leave(arm)

    for arm in starters:
        turns.join(arm)
    run_together(turns, [partial(train, arm) for arm in (*starters, "small")])
    return list(runs.values())


def train_arm(watcher: Watcher, d_state: int, settings: Settings) -> None:
    """Train and test one arm; the results are left in `watcher.run`."""
    run = watcher.run
    module, data = build(TASKS[run.task], run.seed, d_state)
    callbacks: list[L.Callback] = [watcher]
    if run.arm == "compressed":
        compressm = CompreSSMCallback(settings.tolerance, verbose=False)
        callbacks.insert(0, compressm)
    trainer = make_trainer(settings.steps_of(run.task), callbacks)
    trainer.fit(module, data)
    (scalars,) = trainer.test(module, data, verbose=False)
    run.accuracy = float(scalars["test_acc"])
    if run.arm == "compressed":
        run.looks = compressm.history
