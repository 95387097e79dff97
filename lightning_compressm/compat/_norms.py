"""The norms of mamba-ssm in plain PyTorch, for any device.

Arguments have the names, the order and the shapes that the package documents, so that calls meant
for a kernel can come here. What can't be done is refused, never ignored.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compressm.compat._refusals import refuse_given

__all__ = ["layer_norm_fn", "rms_norm_fn", "rmsnorm_fn"]


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMS norm over groups of channels, gated by ``silu(z)`` before or after."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if z is not None and not norm_before_gate:
        y = y * F.silu(z.to(wide))
    y = _normalised(y.reshape(*y.shape[:-1], -1, group_size or y.shape[-1]), eps, True).flatten(-2)
    y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    if z is not None and norm_before_gate:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Dropout, add the residual, normalise; with ``prenorm`` the sum is returned as well."""
    mask = return_dropout_mask
    refuse_given("layer_norm_fn", x1=x1, weight1=weight1, bias1=bias1, return_dropout_mask=mask)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide)
    if rowscale is not None:
        total = total * rowscale.to(wide).unsqueeze(-1)
    if dropout_p > 0:
        total = F.dropout(total, dropout_p)
    kept = torch.promote_types(x.dtype, torch.float32) if residual_in_fp32 else x.dtype
    if residual is not None:
        total, kept = total + residual.to(wide), residual.dtype
    y = _normalised(total, eps, is_rms_norm) * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    y = y.to(x.dtype)
    return (y, total.to(kept)) if prenorm else y


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """:func:`layer_norm_fn` with an RMS norm."""
    first = (x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale)
    return layer_norm_fn(*first, prenorm, residual_in_fp32, True, return_dropout_mask)


def _normalised(x: Tensor, eps: float, is_rms_norm: bool) -> Tensor:
    centred = x if is_rms_norm else x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
