"""Long convolutions by FFT, and the product that makes their kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_compressm.nn._autocast import full_precision
from lightning_compressm.nn._plain import wants_plain_operations

__all__ = ["batched_product", "causal_convolution"]


# torch.compile can't generate code for the complex numbers in here.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def causal_convolution(inputs: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution of (batch, L, H) with (H, L)."""
    batch, length, _ = inputs.shape
    if batch == 0:
        return inputs * kernel.sum(1)  # FFT libraries refuse empty batches
    size = _fast_size(2 * length - 1)
    spectrum = torch.fft.rfft(inputs.mT.contiguous(), size) * torch.fft.rfft(kernel, size)
    outputs: Tensor = torch.fft.irfft(spectrum, size)[..., :length].mT
    return outputs


def _fast_size(least: int) -> int:
    """The smallest even product of 2, 3 and 5 that is not below ``least``."""
    best = 1 << max(1, (least - 1).bit_length())
    for odd in (3, 5, 9, 15, 25, 27, 45, 75):
        size = odd * (1 << max(1, (-(-least // odd) - 1).bit_length()))
        best = min(best, size)
    return best


def batched_product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right``, whose backward pass autocast leaves alone, too."""
    if wants_plain_operations():
        return left @ right
    product: Tensor = _Product.apply(left, right)
    return product


class _Product(torch.autograd.Function):
    """A batched matrix product whose backward pass autocast leaves alone, too."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return left @ right

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step gets here too
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        with full_precision(grad.device):
            return grad @ right.mT, left.mT @ grad
