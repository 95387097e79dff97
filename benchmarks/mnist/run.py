"""One training: it goes on where an earlier call ended, and keeps its clock."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.common.command import prepare, write_numbers
from benchmarks.mnist.arms import ARMS, build
from benchmarks.models.classification import evaluate_classes
from benchmarks.train.trainer import AfterEveryStep
from lightning_compressm import find_ssm_layers, load_compressed

LAST = "last"
CHUNK = 100  # steps between two readings of the clock


@dataclass
class Result:
    """What one training left.

    Attributes:
        arm: Its name.
        seed: Of everything random.
        steps: Optimizer steps of the whole training.
        chunks: (step, states, processor seconds of the last `CHUNK` steps, looks and swaps
            included).
        validation: (step, accuracy).
        history: Of the callback.
        accuracy: Of the last weights on the test set; None before the end.
        best_accuracy: The same of the weights that validated best.
    """

    arm: str
    seed: int
    steps: int
    chunks: list[tuple[int, int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    accuracy: float | None = None
    best_accuracy: float | None = None

    @property
    def states(self) -> int:
        """States in the end."""
        return self.chunks[-1][1]

    @property
    def seconds(self) -> float:
        """Processor seconds of the training."""
        return sum(seconds for _, _, seconds in self.chunks)

    @property
    def analysis(self) -> float:
        """Share of looks and swaps in the time of the training."""
        return sum(float(event["seconds"]) for event in self.history) / self.seconds


def read(path: Path) -> Result | None:
    """A saved result, if there is one."""
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    for name in ("chunks", "validation"):
        data[name] = [tuple(entry) for entry in data[name]]
    return Result(**data)


class _Clock(AfterEveryStep):
    """Reads the processor's clock; a checkpoint keeps what it has read."""

    def __init__(self, result: Result, path: Path) -> None:
        self.result, self.path = result, path
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.process_time()

    def after_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step % CHUNK:
            return
        states = sum(layer.state_dim for layer in find_ssm_layers(module).values())
        now = time.process_time()
        self.result.chunks.append((trainer.global_step, states, now - self._since))
        self._since = time.process_time()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = time.process_time()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        accuracy = float(trainer.callback_metrics["val_acc"])
        self.result.validation.append((trainer.global_step, accuracy))
        write_numbers(self.path, asdict(self.result))
        self._since += time.process_time() - self._paused

    def state_dict(self) -> dict[str, Any]:
        return {"chunks": self.result.chunks, "validation": self.result.validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.result.chunks = [tuple(entry) for entry in state_dict["chunks"]]
        self.result.validation = [tuple(entry) for entry in state_dict["validation"]]


def folder_of(output: Path, name: str, seed: int, steps: int) -> Path:
    """Where a training keeps its files."""
    return output / f"{name}-{seed}-{steps}"


def train(name: str, seed: int, steps: int, root: Path, output: Path) -> Result:
    """Train an arm to the end and test it, unless that was done before."""
    prepare()
    folder = folder_of(output, name, seed, steps)
    path = folder / "result.json"
    done = read(path)
    if done is not None and done.accuracy is not None:
        return done
    arm, result = ARMS[name], Result(name, seed, steps)
    module, data = build(arm, seed, root)
    compressm = arm.callback(steps)
    every = max(1, steps // 10)
    best = ModelCheckpoint(folder, "best", "val_acc", mode="max", enable_version_counter=False)
    last = ModelCheckpoint(
        folder, LAST, every_n_train_steps=max(1, every // 5), enable_version_counter=False
    )
    callbacks = [*([compressm] if compressm else []), _Clock(result, path), best, last]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    resume = folder / f"{LAST}.ckpt"
    trainer.fit(module, data, ckpt_path=resume if resume.exists() else None, weights_only=False)
    sequences, classes = data.tensors("test")
    result.accuracy = evaluate_classes(module, sequences, classes)[0]
    if best.best_model_path:
        load_compressed(module, best.best_model_path)
        result.best_accuracy = evaluate_classes(module, sequences, classes)[0]
    result.history = [] if compressm is None else compressm.history
    write_numbers(path, asdict(result))
    return result
