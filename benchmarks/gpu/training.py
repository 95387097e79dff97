"""One training of sequential MNIST on the device, beside others that go on at the same time."""

from __future__ import annotations

import logging
import statistics
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.images import MNISTFiles, NoiseImages
from benchmarks.gpu.measuring import wait
from benchmarks.mnist.arms import ARMS, PUBLISHED, Arm, build
from benchmarks.models.classification import ClassifierModule, evaluate_classes
from lightning_compressm import find_ssm_layers

CHUNK = 100  # steps between two readings of the clock
STARTED = 90  # seconds in which all processes have to be there
PROBE = 60  # steps that are timed before the length of the run is settled
FEWEST = 200
# Of the time that is left after the probe; the rest is for the tests of the weights.
USED = 0.85


@dataclass(frozen=True)
class Place:
    """Where and for how long a training runs.

    Attributes:
        device: Of the model.
        deadline: As `time.time` counts.
        data: Folder with MNIST/raw; None for images of noise.
        steps: Of the run; None for as many as the time allows.
    """

    device: str
    deadline: float
    data: Path | None
    steps: int | None = None


class Lean(ClassifierModule):
    """Trains without metrics, which take a tenth of the step of a small model."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        sequences, classes = batch
        return F.cross_entropy(self.model(sequences), classes)

    def on_train_epoch_end(self) -> None:
        """There is nothing to log."""


class Clock(L.Callback):
    """Reads the wall every `every` steps, and ends the run at the deadline."""

    def __init__(self, place: Place, every: int, note: Any = None) -> None:
        self.place, self.every, self.note = place, every, note
        self.readings: list[tuple[int, int, float]] = []
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any
    ) -> None:
        if trainer.global_step % self.every:
            return
        wait(torch.device(self.place.device))
        now = time.perf_counter()
        states = sum(layer.state_dim for layer in find_ssm_layers(pl_module).values())
        self.readings.append((trainer.global_step, states, (now - self._since) / self.every))
        if self.note is not None:
            self.note(self.readings)
        if time.time() > self.place.deadline:
            trainer.should_stop = True
        self._since = time.perf_counter()


def train(name: str, place: Place, rates: Any, index: int, barrier: Any, found: Any) -> None:
    """A process: probe the speed beside the others, agree on a number of steps, train, test.

    Args:
        name: Of the arm.
        place: Where and for how long.
        rates: Shared, seconds of a step of every process.
        index: Of this process in it.
        barrier: Of all processes.
        found: Shared by all; what is known of this arm, by its name.
    """
    try:
        _train(ARMS[name], place, rates, index, barrier, found)
    except Exception:
        found[name] = {**found.get(name, {}), "failed": traceback.format_exc()}
        barrier.abort()
        raise


def _train(arm: Arm, place: Place, rates: Any, index: int, barrier: Any, found: Any) -> None:
    _quiet()
    barrier.wait(STARTED)
    probe = min(PROBE, place.steps or PROBE)
    clock = Clock(place, max(1, probe // 3))
    fit(arm, place, probe, [clock])
    rates[index] = statistics.median(seconds for _, _, seconds in clock.readings[-2:])
    barrier.wait(STARTED)
    steps = place.steps or affordable(max(rates), place.deadline - time.time())

    def note(readings: list[tuple[int, int, float]]) -> None:
        found[arm.name] = {"planned": steps, "readings": list(readings)}

    compressm = arm.callback(steps)
    clock = Clock(place, min(CHUNK, max(1, steps // 10)), note)
    module, data = fit(arm, place, steps, [clock] if compressm is None else [compressm, clock])
    sequences, classes = (t.to(place.device) for t in data.tensors("test"))
    accuracy, loss = evaluate_classes(module.to(place.device), sequences, classes)
    history = [] if compressm is None else compressm.history
    found[arm.name] = found[arm.name] | {
        "accuracy": accuracy, "loss": loss, "history": history, "step s in the probe": rates[index],
    }  # fmt: skip


def affordable(seconds: float, left: float) -> int:
    """Whole hundreds of steps that fit; never more than were published."""
    steps = int(USED * left / seconds) // CHUNK * CHUNK
    return min(max(steps, FEWEST), PUBLISHED.full.steps)


def fit(
    arm: Arm, place: Place, steps: int, callbacks: list[L.Callback]
) -> tuple[ClassifierModule, Any]:
    """Train an arm from the start, by the published recipe."""
    make = NoiseImages if place.data is None else MNISTFiles
    published, data = build(arm, 0, place.data or Path(), make)
    module = Lean(published.model, PUBLISHED.classes, lr=PUBLISHED.full.lr, **PUBLISHED.recipe)
    trainer = L.Trainer(
        accelerator="gpu" if place.device == "cuda" else "cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(module, data)
    return module, data


def _quiet() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for remark in (".*does not have many workers.*", ".*treespec, LeafSpec.*"):
        warnings.filterwarnings("ignore", remark)
