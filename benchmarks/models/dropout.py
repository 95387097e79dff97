"""Dropout with masks that are drawn several times faster on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Dropout"]


class Dropout(nn.Dropout):
    """What `nn.Dropout` computes, on a CPU with integers of 32 bits in place of Bernoulli draws.

    An activation is dropped with probability `p`, rounded to a multiple of 2^-32, independently of
    all others. The integers come from torch's generator; one seed gives other masks than it gives
    with `nn.Dropout`.

    Args:
        p: Probability of dropping an activation, in [0, 1].

    Example:
        >>> _ = torch.manual_seed(0)
        >>> dropped = Dropout(0.5)(torch.ones(1000))
        >>> sorted(set(dropped.tolist()))
        [0.0, 2.0]
    """

    def forward(self, input: Tensor) -> Tensor:
        on_cpu = input.device.type == "cpu"
        if not (self.training and on_cpu and 0 < self.p < 1) or self.inplace:
            output: Tensor = super().forward(input)
            return output
        return input * _mask(input, self.p)


def _mask(like: Tensor, p: float) -> Tensor:
    """Zero with probability p, else 1 / (1 - p)."""
    # Each draw of 64 bits serves two activations.
    draws = torch.empty(-(-like.numel() // 2), dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int32)[: like.numel()]
    # Compared in place: integers become floats much faster than booleans do.
    kept = bits.ge_(min(round(p * 2**32), 2**32 - 1) - 2**31)
    return kept.to(like.dtype).mul_(1 / (1 - p)).view(like.shape)
