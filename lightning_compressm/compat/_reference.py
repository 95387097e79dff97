"""What the kernels of mamba-ssm and causal-conv1d compute, in plain PyTorch, for any device.

Arguments have the names, the order and the shapes that those packages document, so that calls
meant for a kernel can come here. What can't be done is refused, never ignored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compressm.nn._dual import state_space_dual
from lightning_compressm.nn.selective_scan import selective_scan

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "layer_norm_fn",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "rms_norm_fn",
    "rmsnorm_fn",
    "selective_scan_fn",
    "selective_state_update",
]

_NO_LIMIT = (0.0, math.inf)


def _refuse(function: str, **arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None and value is not False]
    if given:
        raise NotImplementedError(
            f"on a CPU {function} works without {', '.join(given)}, which "
            f"{'was' if len(given) == 1 else 'were'} given; leave that out, or use a CUDA device"
        )


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """Mamba's scan; the last state can be differentiated, which the kernel's can't."""
    softplus = bool(delta_softplus)
    return selective_scan(
        u, delta, A, B, C, D, z, delta_bias, softplus, return_last_state=return_last_state
    )


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor | None:
    """Mamba's block from the input projection to the output, (batch, 2 dim, L) -> (batch, L, out).

    With norms on B, C or Delta the answer is None, which makes transformers take its own, unfused
    path: the kernel normalises Delta elsewhere than that path, so training and evaluation of
    FalconMamba would differ.
    """
    if any(weight is not None for weight in (b_rms_weight, c_rms_weight, dt_rms_weight)):
        return None
    x, z = xz.chunk(2, dim=1)
    x = _causal_conv(x, conv1d_weight.squeeze(1), conv1d_bias, "silu")
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    projected = F.linear(x.transpose(1, 2), x_proj_weight)
    rows = [rank, *(0 if given is not None else states for given in (B, C))]
    delta, rows_b, rows_c = torch.split(projected, rows, dim=-1)
    delta = F.linear(delta, delta_proj_weight).transpose(1, 2)
    B = _projected(rows_b, B_proj_bias) if B is None else B
    C = _projected(rows_c, C_proj_bias) if C is None else C
    y = selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _projected(rows: Tensor, bias: Tensor | None) -> Tensor:
    return (rows if bias is None else rows + bias.to(rows.dtype)).transpose(1, 2)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    """Mamba-2's scan; the size of a chunk suits a GPU and is not used here."""
    _refuse("mamba_chunk_scan_combined", return_varlen_states=return_varlen_states)
    y, last = state_space_dual(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_states, seq_idx
    )
    # As the kernel's is: callers take views of it.
    y = y.contiguous()
    return (y, last) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Any:
    """Mamba-2's block from the input projection on; a part outside the SSM is a gated MLP."""
    heads = len(D)
    if D.ndim == 2:
        headdim = D.shape[1]
    if headdim is None:
        raise ValueError("headdim must be given where D has one entry for each head")
    dim, channels = heads * headdim, len(conv1d_weight)
    mlp = (zxbcdt.shape[-1] - dim - channels - heads) // 2
    gate, value, z, mixed, dt = torch.split(zxbcdt, [mlp, mlp, dim, channels, heads], dim=-1)
    mixed = _causal_conv(
        mixed.transpose(1, 2), conv1d_weight, conv1d_bias, activation, seq_idx
    ).transpose(1, 2)
    inner = (channels - dim) // 2
    x, B, C = torch.split(mixed, [dim, inner, inner], dim=-1)
    per_head = (*x.shape[:2], heads, headdim)
    per_group = (*x.shape[:2], ngroups, -1)
    y, last = state_space_dual(
        x.reshape(per_head),
        dt,
        A,
        B.reshape(per_group),
        C.reshape(per_group),
        D,
        None if rmsnorm_weight is not None else z.reshape(per_head),
        dt_bias,
        True,
        dt_limit,
        initial_states,
        seq_idx,
    )
    y = y.flatten(2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, dim // ngroups, norm_before_gate)
    if mlp:
        y = torch.cat([F.silu(gate) * value, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, last) if return_final_states else y


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of Mamba or, with heads, of Mamba-2; overwrites ``state``, (batch, [H], dim, N)."""
    _refuse("selective_state_update", state_batch_indices=state_batch_indices)
    wide = torch.promote_types(x.dtype, torch.float32)
    if dt_bias is not None:
        dt = dt + dt_bias
    step = dt.to(wide)
    if dt_softplus:
        step = F.softplus(step)
    b, c = (_for_each_channel(matrix.to(wide), state) for matrix in (B, C))
    drive = (step * x.to(wide)).unsqueeze(-1) * b
    new = state.to(wide) * (step.unsqueeze(-1) * A.to(wide)).exp() + drive
    state.copy_(new)
    y = (new * c).sum(-1)
    if D is not None:
        y = y + x * D
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype)


def _for_each_channel(matrix: Tensor, state: Tensor) -> Tensor:
    """(batch, N) or (batch, G, N) so that it multiplies (batch, dim, N) or (batch, H, dim, N)."""
    if state.ndim == 3:
        return matrix.reshape(len(matrix), 1, -1)
    groups = matrix.unsqueeze(1) if matrix.ndim == 2 else matrix
    return groups.repeat_interleave(state.shape[1] // groups.shape[1], 1).unsqueeze(2)


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
    _refuse("layer_norm_fn", x1=x1, weight1=weight1, bias1=bias1, return_dropout_mask=mask)
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
    _refuse(
        "causal_conv1d_fn",
        initial_states=initial_states,
        return_final_states=return_final_states,
        final_states_out=final_states_out,
    )
    return _causal_conv(x, weight, bias, activation, seq_idx)


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
    _refuse(
        "causal_conv1d_update", cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices
    )
    steps = x.unsqueeze(-1) if x.ndim == 2 else x
    seen = torch.cat([conv_state, steps.to(conv_state.dtype)], dim=-1)
    conv_state.copy_(seen[..., -conv_state.shape[-1] :])
    y = _causal_conv(seen.to(x.dtype), weight, bias, activation)[..., -steps.shape[-1] :]
    return y.squeeze(-1) if x.ndim == 2 else y


def _causal_conv(
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
