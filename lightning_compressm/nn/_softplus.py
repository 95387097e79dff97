"""The softplus of step sizes: torch's takes longer on a CPU than a scan over a dozen states."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compressm.nn._plain import wants_plain_operations

__all__ = ["softplus"]


def softplus(values: Tensor) -> Tensor:
    """Return log(1 + exp(x)) to the precision of the dtype, also where it is tiny.

    Args:
        values: any shape, float32 or float64.

    Returns:
        Like ``values``.

    Source:
        The logarithm of 1 + e is that of the rounded sum, plus its rounding error over the sum.
    """
    if values.device.type != "cpu" or wants_plain_operations():
        return F.softplus(values)
    result: Tensor = _Softplus.apply(values)
    return result


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        small = values.abs().neg_().exp_()
        rounded = 1 + small
        error = small.sub_(rounded - 1).div_(rounded)
        result: Tensor = rounded.log_().add_(error).add_(values.clamp(min=0))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        result: Tensor = grad * values.sigmoid()
        return result
