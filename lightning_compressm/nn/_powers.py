"""Powers of eigenvalues in real arithmetic, so that it can be compiled and exported."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["powers_by_doubling"]


def powers_by_doubling(re: Tensor, im: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Powers 0 to count - 1 along a new last dimension, and power ``count``, by doubling."""
    re, im = re.unsqueeze(-1), im.unsqueeze(-1)
    base_re, base_im = re, im
    powers_re, powers_im = torch.ones_like(re), torch.zeros_like(im)
    known = 1
    while known < count:
        next_re = base_re * powers_re - base_im * powers_im
        next_im = base_re * powers_im + base_im * powers_re
        powers_re, powers_im = (
            torch.cat((powers_re, next_re), -1),
            torch.cat((powers_im, next_im), -1),
        )
        known *= 2
        base_re, base_im = base_re.square() - base_im.square(), 2 * base_re * base_im
    powers_re, powers_im = powers_re[..., :count], powers_im[..., :count]
    last_re, last_im = powers_re[..., -1:], powers_im[..., -1:]
    top_re, top_im = re * last_re - im * last_im, re * last_im + im * last_re
    return powers_re, powers_im, top_re.squeeze(-1), top_im.squeeze(-1)
