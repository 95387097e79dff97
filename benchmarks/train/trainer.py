"""What every experiment trains alike: one classifier by one recipe, without files or chatter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.data import DelayDataModule, DigitsDataModule
from benchmarks.data.sequences import SequenceDataModule
from benchmarks.models.classification import ClassifierModule
from benchmarks.models.classifier import Pool, SequenceClassifier

TaskName = Literal["digits", "delay"]


@dataclass(frozen=True)
class Task:
    """A data set, how its answer is read out, and for how long a model is trained on it.

    Attributes:
        data: Makes the data module from a seed for the order of its batches.
        pool: Read the mean over time or the last step.
        steps: Optimizer steps that bring the full model to its plateau.
    """

    data: type[SequenceDataModule]
    pool: Pool
    steps: int


TASKS: dict[TaskName, Task] = {
    "digits": Task(DigitsDataModule, "mean", 2000),
    "delay": Task(DelayDataModule, "last", 800),
}


def build(
    task: Task, seed: int, d_state: int = 128, d_model: int = 16
) -> tuple[ClassifierModule, SequenceDataModule]:
    """A freshly initialised classifier and its data; the seed fixes both and dropout to come."""
    torch.manual_seed(seed)
    data = task.data(seed=seed)
    data.setup()
    model = SequenceClassifier(
        data.d_input, data.n_classes, d_model=d_model, d_state=d_state, pool=task.pool
    )
    return ClassifierModule(model, data.n_classes), data


def make_trainer(
    steps: int,
    callbacks: Sequence[L.Callback] = (),
    *,
    validations: int = 0,
    clip: float | None = None,
) -> L.Trainer:
    """A Trainer on the CPU that runs `steps` optimizer steps and writes no files.

    Args:
        steps: Optimizer steps.
        callbacks: Called in this order.
        validations: Validate about this often during the run; 0 for never.
        clip: Largest norm of the gradient; None for any.
    """
    every = max(1, steps // (25 * validations)) if validations else None
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        callbacks=list(callbacks),
        check_val_every_n_epoch=every or 1,
        limit_val_batches=1.0 if validations else 0,
        gradient_clip_val=clip,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def warm_up(module: L.LightningModule, data: L.LightningDataModule) -> None:
    """Let a throw-away training pay for what happens only once in a process."""
    make_trainer(3).fit(module, data)


def fit_with_bar(
    module: L.LightningModule,
    data: L.LightningDataModule,
    steps: int,
    label: str,
    console: Console,
    clip: float | None = None,
) -> None:
    """Train with a bar that goes when it is done."""
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(label, total=steps)
        callback = StepProgress(lambda step: progress.update(bar, completed=step))
        make_trainer(steps, [callback], clip=clip).fit(module, data)


class AfterEveryStep(L.Callback):
    """Calls `after_step` after every batch."""

    def after_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """What a subclass does; `trainer.global_step` steps are done."""

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.after_step(trainer, pl_module)


class StepProgress(AfterEveryStep):
    """Call a function with the step after every `every` steps: epochs can take minutes."""

    def __init__(self, report: Callable[[int], None], every: int = 10) -> None:
        self.report = report
        self.every = every

    def after_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step % self.every == 0:
            self.report(trainer.global_step)
