"""The functions of causal-conv1d in plain PyTorch, for any device.

Arguments have the names, the order and the shapes that the package documents, so that calls meant
for a kernel can come here. What can't be done is refused, never ignored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compressm.compat._refusals import refuse_given

__all__ = ["causal_conv", "causal_conv1d_fn", "causal_conv1d_update"]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Depthwise convolution that looks back only; x (batch, dim, L), weight (dim, width)."""
    refuse_given(
        "causal_conv1d_fn",
        initial_states=initial_states,
        return_final_states=return_final_states,
        final_states_out=final_states_out,
    )
    return causal_conv(x, weight, bias, activation, seq_idx)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """One step, (batch, dim), or several, (batch, dim, L), of the convolution; moves its state."""
    refuse_given(
        "causal_conv1d_update", cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices
    )
    steps = x.unsqueeze(-1) if x.ndim == 2 else x
    seen = torch.cat([conv_state, steps.to(conv_state.dtype)], dim=-1)
    conv_state.copy_(seen[..., -conv_state.shape[-1] :])
    y = causal_conv(seen.to(x.dtype), weight, bias, activation)[..., -steps.shape[-1] :]
    return y.squeeze(-1) if x.ndim == 2 else y


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    width, length = weight.shape[1], x.shape[-1]
    if seq_idx is None:
        padded = F.pad(x, (width - 1, 0))
        y = F.conv1d(padded, weight.unsqueeze(1).to(x.dtype), groups=len(weight))
    else:
        y = x * weight[:, -1:]
        for back in range(1, min(width, length)):
            same = (seq_idx[:, back:] == seq_idx[:, :-back]).unsqueeze(1)
            y[..., back:] += weight[:, -1 - back, None] * x[..., :-back] * same
    if bias is not None:
        y = y + bias.to(y.dtype).unsqueeze(-1)
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be 'silu', 'swish' or None, got {activation!r}")
    return (y if activation is None else F.silu(y)).to(x.dtype)
