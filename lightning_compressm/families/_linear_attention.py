"""What families of linear attention have in common; their states are key channels of heads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["with_biases"]


def with_biases(module: nn.Module, rows: Mapping[str, Tensor]) -> dict[str, tuple[int, Tensor]]:
    """Entries along dimension 0 of the weights, and of the biases, of those parts that exist.

    Args:
        module: the layer.
        rows: name of a part -> indices along dimension 0.

    Example:
        >>> sorted(with_biases(nn.Sequential(nn.Linear(2, 2)), {"0": torch.tensor([1])}))
        ['0.bias', '0.weight']
    """
    parts = {name: getattr(module, name, None) for name in rows}
    return {
        f"{name}.{kind}": (0, rows[name])
        for name, part in parts.items()
        for kind in ("weight", "bias")
        if torch.is_tensor(getattr(part, kind, None))
    }
