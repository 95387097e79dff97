"""How a classifier is trained, and how it is tested."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from benchmarks.models.classifier import SequenceClassifier
from benchmarks.models.schedule import planned_steps, with_warmup_cosine

Schedule = Literal["warmup_cosine", "constant"]
STAGES = ("train", "val", "test")


@torch.no_grad()
def evaluate_classes(
    model: nn.Module, sequences: Tensor, classes: Tensor, batch_size: int = 250
) -> tuple[float, float]:
    """Accuracy and cross-entropy over all sequences; leaves the model in evaluation mode."""
    model.eval()
    logits = torch.cat([model(batch) for batch in sequences.split(batch_size)])
    accuracy = (logits.argmax(1) == classes).double().mean().item()
    return accuracy, F.cross_entropy(logits, classes).item()


class ClassifierModule(L.LightningModule):
    """Train a classifier with AdamW, linear warm-up and cosine, step by step.

    Args:
        model: Maps sequences, tokens or pairs of either to logits (batch, n_classes).
        n_classes: Number of classes.
        lr: Peak learning rate.
        ssm_lr_factor: The state-space layers learn with this times `lr`.
        weight_decay: For all parameters but those of the state-space layers.
        warmup: Share of the steps in which the learning rate rises, in [0, 1].
        schedule: Of the learning rate; "constant" leaves it at `lr`, without warm-up.

    Raises:
        ValueError: From `setup`: the data module has another number of classes.
    """

    def __init__(
        self,
        model: SequenceClassifier,
        n_classes: int,
        lr: float = 1e-2,
        ssm_lr_factor: float = 0.25,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        schedule: Schedule = "warmup_cosine",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="model")
        self.model = model
        self.n_classes = n_classes
        self.schedule = schedule
        self.lr = lr
        self.ssm_lr_factor = ssm_lr_factor
        self.weight_decay = weight_decay
        self.warmup = warmup
        for stage in STAGES:
            accuracy = MulticlassAccuracy(n_classes, average="micro", validate_args=False)
            self.add_module(f"{stage}_acc", accuracy)
            self.add_module(f"{stage}_loss", MeanMetric(nan_strategy="disable"))

    def setup(self, stage: str) -> None:
        """Model and data come from one file, and are written down twice there."""
        data = getattr(self.trainer, "datamodule", None)
        got = getattr(data, "n_classes", self.n_classes)
        if got != self.n_classes:
            raise ValueError(
                f"{type(data).__name__} has {got} classes, the model {self.n_classes}: give both "
                "the same n_classes"
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step("train", *batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step("val", *batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step("test", *batch)

    # Logging once an epoch instead of every step saves a small model a fifth of its time.
    def on_train_epoch_end(self) -> None:
        self._log("train")

    def on_validation_epoch_end(self) -> None:
        self._log("val")

    def on_test_epoch_end(self) -> None:
        self._log("test")

    def _step(self, stage: str, sequences: Tensor, classes: Tensor) -> Tensor:
        logits = self.model(sequences)
        loss = F.cross_entropy(logits, classes)
        accuracy, mean_loss = self._metrics(stage)
        accuracy.update(logits.detach(), classes)
        mean_loss.update(loss.detach(), weight=len(classes))
        return loss

    def _log(self, stage: str) -> None:
        accuracy, mean_loss = self._metrics(stage)
        metrics: dict[str, Metric | Tensor | int | float] = {
            f"{stage}_acc": accuracy,
            f"{stage}_loss": mean_loss,
        }
        self.log_dict(metrics, prog_bar=stage != "test")

    def _metrics(self, stage: str) -> tuple[Metric, Metric]:
        accuracy, mean_loss = getattr(self, f"{stage}_acc"), getattr(self, f"{stage}_loss")
        return accuracy, mean_loss

    def configure_optimizers(self) -> Any:
        ssm = list(self.model.ssm_parameters())
        ids = {id(p) for p in ssm}
        rest = [p for p in self.model.parameters() if id(p) not in ids]
        groups = [
            {"params": rest, "lr": self.lr, "weight_decay": self.weight_decay},
            {"params": ssm, "lr": self.ssm_lr_factor * self.lr, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, fused=True)
        if self.schedule == "constant":
            return optimizer
        return with_warmup_cosine(optimizer, planned_steps(self.trainer), self.warmup)
