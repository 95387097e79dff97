"""The models that are trained, and their training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.models.classifier import LayerFactory, SequenceClassifier
from benchmarks.train.trainer import make_trainer
from lightning_compressm import CompreSSMCallback
from lightning_compressm.nn import LRU
from lightning_compressm.nn._mamba import MambaBlock

CLASSES = 10
EPOCH = 10  # steps


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


def train(size: Size, seed: int, steps: int, callback: CompreSSMCallback) -> None:
    torch.manual_seed(seed)
    count = EPOCH * size.batch
    data = TensorDataset(torch.randn(count, size.length, 1), torch.randint(CLASSES, (count,)))
    trainer = make_trainer(steps, [callback])
    trainer.fit(Classifier(size), DataLoader(data, batch_size=size.batch))
