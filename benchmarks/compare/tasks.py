"""The tasks on which arms are compared: small enough for a CPU, with structure over many steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from benchmarks.data import (
    DelayDataModule,
    DigitsDataModule,
    GeneratedListOpsDataModule,
    GeneratedPathfinderDataModule,
    MQARDataModule,
)
from benchmarks.data.sequences import InMemoryDataModule
from benchmarks.models.classification import ClassifierModule, evaluate_classes
from benchmarks.models.classifier import Pool, SequenceClassifier
from benchmarks.models.language import Kind, LanguageModel, RecallModule, evaluate_recall

LayerKind = Literal["linear", "selective"]
# The share of the steps after which all arms that reduce in training do so, as published.
WINDOW_END = 0.1
# Of generated tasks: a thousand sequences leave an accuracy uncertain by a point and a half.
TEST_SIZE = 4000


@dataclass(frozen=True)
class CompareTask:
    """Data, network and recipe, the same for all arms.

    Attributes:
        name: Key in files and on the command line.
        title: For people.
        kind: Of the state-space layers.
        make_data: Makes the data module from a seed for the order of its batches.
        make_module: Makes the network with so many states.
        steps: Optimizer steps of every training.
        d_state: States of every layer at full size.
        sizes: States of every layer that arms end with.
        clip: Largest norm of the gradient; None for any.
        calibration_batches: So many training batches are seen by analyses that want to see data.
    """

    name: str
    title: str
    kind: LayerKind
    make_data: Callable[[int], InMemoryDataModule]
    make_module: Callable[[InMemoryDataModule, int], L.LightningModule]
    steps: int
    d_state: int
    sizes: tuple[int, ...]
    clip: float | None = None
    calibration_batches: int = 8

    @property
    def look(self) -> int:
        """The step after which reductions come."""
        return self.step_at(WINDOW_END)

    def step_at(self, share: float) -> int:
        """The step after which so much of the training is over, at least 1."""
        return max(1, round(share * self.steps))

    def build(
        self, seed: int, d_state: int | None = None
    ) -> tuple[L.LightningModule, InMemoryDataModule]:
        """A freshly initialised network and its data; the seed fixes both and dropout to come."""
        torch.manual_seed(seed)
        data = self.make_data(seed)
        data.prepare_data()
        data.setup()
        return self.make_module(data, d_state or self.d_state), data

    def shortened(self, steps: int, size: int) -> CompareTask:
        """The same with few steps and one size, to see that everything runs."""
        return replace(self, steps=steps, sizes=(size,))


def calibration(task: CompareTask, data: InMemoryDataModule) -> list[Tensor]:
    """Training batches for analyses that want to see data."""
    tokens, _ = data.tensors("train")
    return list(tokens[: task.calibration_batches * data.batch_size].split(data.batch_size))


def evaluate(module: L.LightningModule, data: InMemoryDataModule) -> tuple[float, float]:
    """Accuracy and cross-entropy on the test set; the network's mode stays what it was."""
    sequences, targets = data.tensors("test")
    modes = {part: part.training for part in module.modules()}
    try:
        if isinstance(module, RecallModule):
            return evaluate_recall(module.model, sequences, targets)
        return evaluate_classes(module, sequences, targets)
    finally:
        for part, training in modes.items():
            part.training = training


def _classifier(
    pool: Pool = "mean", blocks: int = 1, lr: float = 1e-2
) -> Callable[[Any, int], L.LightningModule]:
    def make(data: Any, d_state: int) -> L.LightningModule:
        n_tokens = getattr(data, "n_tokens", None)
        model = SequenceClassifier(
            None if n_tokens else data.d_input,
            data.n_classes,
            d_model=16,
            d_state=d_state,
            n_blocks=blocks,
            pool=pool,
            n_tokens=n_tokens,
        )
        return ClassifierModule(model, data.n_classes, lr=lr)

    return make


def _recaller(kind: Kind, lr: float) -> Callable[[Any, int], L.LightningModule]:
    def make(data: Any, d_state: int) -> L.LightningModule:
        model = LanguageModel(data.n_tokens, kind, d_model=32, d_state=d_state)
        return RecallModule(model, lr=lr)

    return make


def _listops(seed: int) -> InMemoryDataModule:
    return GeneratedListOpsDataModule(
        seed=seed, test_size=TEST_SIZE, max_length=32, max_depth=3, min_length=4
    )


def _pathfinder(seed: int) -> InMemoryDataModule:
    return GeneratedPathfinderDataModule(
        seed=seed, test_size=TEST_SIZE, size=12, dashes=3, distractors=1
    )


def _recall(seed: int) -> InMemoryDataModule:
    return MQARDataModule(seed=seed, n_tokens=32, pairs=8, length=24)


TASKS = {
    task.name: task
    for task in (
        CompareTask(
            "digits", "Digits, pixel by pixel, 64 steps, mean over time", "linear",
            lambda seed: DigitsDataModule(seed=seed), _classifier(), 2000, 128, (8, 4),
        ),
        CompareTask(
            "delay", "Delayed recall: ten patterns, 200 steps of noise, last step", "linear",
            lambda seed: DelayDataModule(seed=seed), _classifier("last"), 800, 128, (16, 8),
        ),
        CompareTask(
            "pathfinder", "Pathfinder, 12 x 12 pixels, 144 steps, two blocks", "linear",
            _pathfinder, _classifier(blocks=2), 1000, 64, (4,),
        ),
        CompareTask(
            "listops", "ListOps, up to 32 tokens, two blocks", "linear",
            _listops, _classifier(blocks=2), 1500, 64, (4,),
        ),
        CompareTask(
            "recall-mamba", "Associative recall, 8 pairs in 24 steps, two Mamba layers",
            "selective", _recall, _recaller("mamba1", 5e-3), 1500, 32, (4,), clip=1.0,
        ),
        CompareTask(
            "recall-mamba2", "The same, two Mamba-2 layers", "selective",
            _recall, _recaller("mamba2", 3e-3), 1000, 32, (8, 4), clip=1.0,
        ),
    )
}  # fmt: skip
