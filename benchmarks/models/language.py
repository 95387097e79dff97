"""A small language model with mamba-ssm's own layers, and how it is trained to name tokens."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from benchmarks.data.mqar import IGNORED
from benchmarks.models.schedule import planned_steps, with_warmup_cosine
from lightning_compressm.compat import enable_mamba_ssm_cpu

Kind = Literal["mamba1", "mamba2"]


def make_mixer(kind: Kind, d_model: int, d_state: int, head_dim: int = 32) -> nn.Module:
    """A layer of mamba-ssm, which maps (batch, length, d_model) to the same shape.

    Args:
        kind: Mamba or Mamba2.
        d_model: Channels outside; there are twice as many inside.
        d_state: States for each inner channel.
        head_dim: Channels of a head; Mamba-2 only.
    """
    enable_mamba_ssm_cpu()
    from mamba_ssm import Mamba, Mamba2

    if kind == "mamba1":
        return Mamba(d_model, d_state=d_state)
    return Mamba2(d_model, d_state=d_state, headdim=head_dim)


class MixerBlock(nn.Module):
    """RMSNorm, mixer, residual."""

    def __init__(self, d_model: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model)
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class LanguageModel(nn.Module):
    """Embedding, residual blocks, RMSNorm, linear head.

    Args:
        n_tokens: Size of the vocabulary.
        kind: Of the layers.
        d_model: Channels H.
        d_state: States N of every layer.
        n_blocks: Number of residual blocks.
        head_dim: Channels of a head; Mamba-2 only.

    Example:
        >>> from importlib.util import find_spec
        >>> if find_spec("mamba_ssm"):
        ...     model = LanguageModel(n_tokens=8, kind="mamba1", d_model=4, d_state=2)
        ...     assert model(torch.zeros(3, 5, dtype=torch.long)).shape == (3, 5, 8)
    """

    def __init__(
        self,
        n_tokens: int,
        kind: Kind,
        d_model: int = 64,
        d_state: int = 64,
        n_blocks: int = 2,
        head_dim: int = 32,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, d_model)
        self.blocks = nn.ModuleList(
            MixerBlock(d_model, make_mixer(kind, d_model, d_state, head_dim))
            for _ in range(n_blocks)
        )
        self.norm = nn.RMSNorm(d_model)
        self.head = nn.Linear(d_model, n_tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length) to logits (batch, length, n_tokens)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def recall_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the places where something is asked."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def evaluate_recall(
    model: nn.Module, tokens: Tensor, targets: Tensor, batch_size: int = 250
) -> tuple[float, float]:
    """Accuracy and cross-entropy over all queries."""
    model.eval()
    logits = torch.cat([model(batch) for batch in tokens.split(batch_size)])
    asked = targets != IGNORED
    accuracy = (logits[asked].argmax(-1) == targets[asked]).double().mean().item()
    return accuracy, recall_loss(logits, targets).item()


class RecallModule(L.LightningModule):
    """Train on recall, or on the next token, with AdamW, linear warm-up and cosine.

    Validation and test log accuracy and loss, both over the places where something is asked.

    Args:
        model: Maps tokens (batch, length) to logits (batch, length, n_tokens).
        lr: Peak learning rate.
        weight_decay: For matrices but the embedding and `A_log`.
        warmup: Share of the steps in which the learning rate rises, in [0, 1].
    """

    def __init__(
        self, model: LanguageModel, lr: float, weight_decay: float = 0.01, warmup: float = 0.1
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="model")
        self.model = model
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup = warmup
        # "disable" lets a loss that is no number be seen, and costs no synchronisation.
        for stage in ("val", "test"):
            self.add_module(f"{stage}_acc", MeanMetric(nan_strategy="disable"))
            self.add_module(f"{stage}_loss", MeanMetric(nan_strategy="disable"))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens, targets = batch
        loss = recall_loss(self.model(tokens), targets)
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._measure("val", *batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._measure("test", *batch)

    def _measure(self, stage: str, tokens: Tensor, targets: Tensor) -> None:
        logits = self.model(tokens)
        asked = targets != IGNORED
        right = (logits.argmax(-1) == targets)[asked]
        values = {"acc": right.float().mean(), "loss": recall_loss(logits, targets)}
        for name, value in values.items():
            metric: MeanMetric = getattr(self, f"{stage}_{name}")
            metric.update(value, weight=asked.sum())
            self.log(f"{stage}_{name}", metric, prog_bar=stage == "val")

    def configure_optimizers(self) -> Any:
        decayed: list[nn.Parameter] = []
        free: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            exempt = parameter.ndim < 2 or "A_log" in name or "embedding" in name
            (free if exempt else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": free, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        return with_warmup_cosine(optimizer, planned_steps(self.trainer), self.warmup)
