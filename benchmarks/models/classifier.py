"""The residual classifier of the published experiments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.dropout import Dropout
from lightning_compressm.nn import LRU

LayerFactory = Callable[[int, int], nn.Module]
Pool = Literal["mean", "last"]
# Up to so many channels, half a row of the gate is too short for vector instructions.
_NARROW = 16


class ResidualBlock(nn.Module):
    """BatchNorm, state-space layer, GELU, dropout, gated linear unit, dropout, residual.

    Args:
        d_model: Number of channels H.
        d_state: Number of states N.
        layer: Called with (d_model, d_state); maps (batch, length, d_model) to the same shape.
        dropout: Probability of dropping an activation, in [0, 1).
    """

    def __init__(self, d_model: int, d_state: int, layer: LayerFactory, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(d_model, affine=False)
        self.layer = layer(d_model, d_state)
        # Both halves of the gate in one product: faster than two.
        self.gate = nn.Linear(d_model, 2 * d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # As (batch * length, channels) there is nothing to transpose.
        rows = x.flatten(0, 1)
        hidden = self.layer(self.norm(rows).view_as(x)).flatten(0, 1)
        update = self._narrow(hidden) if x.shape[-1] <= _NARROW else self._wide(hidden)
        return (rows + update).view_as(x)

    def _wide(self, hidden: Tensor) -> Tensor:
        hidden = self.dropout(F.gelu(hidden))
        update: Tensor = self.dropout(F.glu(self.gate(hidden), dim=-1))
        return update

    def _narrow(self, hidden: Tensor) -> Tensor:
        """The same with channels first, where both halves of the gate are contiguous."""
        hidden = self.dropout(F.gelu(hidden.t().contiguous()))
        gate = torch.addmm(self.gate.bias.unsqueeze(1), self.gate.weight, hidden)
        update: Tensor = self.dropout(F.glu(gate, dim=0))
        return update.t()


class SequenceClassifier(nn.Module):
    """Encoder, residual blocks, pooling over time, linear head.

    Args:
        d_input: Channels of the input, which a linear map encodes; None for tokens.
        n_classes: Number of classes.
        d_model: Channels H inside.
        d_state: States N of every layer.
        n_blocks: Number of residual blocks.
        layer: Makes a state-space layer from (d_model, d_state).
        dropout: Probability of dropping an activation, in [0, 1).
        pool: Classify the mean over time or the last step.
        n_tokens: Size of the vocabulary, which an embedding encodes; None for channels.

    Raises:
        ValueError: `pool` is unknown, or not exactly one of `d_input` and `n_tokens` is given.

    Example:
        >>> model = SequenceClassifier(d_input=1, n_classes=10, d_model=8, d_state=16)
        >>> model(torch.zeros(2, 64, 1)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        d_input: int | None,
        n_classes: int,
        d_model: int = 16,
        d_state: int = 128,
        n_blocks: int = 1,
        layer: LayerFactory = LRU,
        dropout: float = 0.1,
        pool: Pool = "mean",
        n_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if pool not in ("mean", "last"):
            raise ValueError(f"pool must be 'mean' or 'last', got {pool!r}")
        self.pool = pool
        self.encoder = _make_encoder(d_input, n_tokens, d_model)
        self.blocks = nn.ModuleList(
            ResidualBlock(d_model, d_state, layer, dropout) for _ in range(n_blocks)
        )
        self.head = self.make_head(d_model, n_classes)

    def make_head(self, d_model: int, n_classes: int) -> nn.Module:
        """What maps features to logits."""
        return nn.Linear(d_model, n_classes)

    def features(self, x: Tensor) -> Tensor:
        """Map sequences (batch, length, d_input) or tokens (batch, length) to (batch, d_model)."""
        x = self.encoder(x)
        for block in self.blocks:
            x = block(x)
        return x.mean(1) if self.pool == "mean" else x[:, -1]

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences (batch, length, d_input) or tokens (batch, length) to logits."""
        return self.head(self.features(x))

    def ssm_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the state-space layers, which are trained gently."""
        for block in self.blocks:
            assert isinstance(block, ResidualBlock)
            yield from block.layer.parameters()


def _make_encoder(d_input: int | None, n_tokens: int | None, d_model: int) -> nn.Module:
    if (d_input is None) == (n_tokens is None):
        raise ValueError(
            "expected either d_input (channels) or n_tokens (a vocabulary), got "
            f"d_input={d_input} and n_tokens={n_tokens}"
        )
    return nn.Linear(d_input, d_model) if d_input else nn.Embedding(n_tokens or 0, d_model)


class PairClassifier(SequenceClassifier):
    """One encoder for two sequences, and a head of three layers on both results.

    Takes the arguments of `SequenceClassifier`.

    Source:
        Tay et al. (2020), arXiv 2011.04006, section 2.2.3; the head is that of the published
        CompreSSM experiments: 2H, H, H/2, classes.

    Example:
        >>> model = PairClassifier(d_input=None, n_tokens=256, n_classes=2, d_model=8, d_state=16)
        >>> model(torch.zeros(3, 2, 64, dtype=torch.long)).shape
        torch.Size([3, 2])
    """

    def make_head(self, d_model: int, n_classes: int) -> nn.Module:
        """Features of both sequences, side by side, to logits."""
        return nn.Sequential(
            nn.Linear(2 * d_model, d_model),
            nn.ReLU(),
            nn.Linear(d_model, d_model // 2),
            nn.ReLU(),
            nn.Linear(d_model // 2, n_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map pairs (batch, 2, length, d_input) or (batch, 2, length) to (batch, n_classes)."""
        # All sequences in one pass: BatchNorm sees both sides.
        return self.head(self.features(x.flatten(0, 1)).unflatten(0, (-1, 2)).flatten(1))
