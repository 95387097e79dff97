"""The scans of mamba-ssm and the blocks around them in plain PyTorch, for any device.

Arguments have the names, the order and the shapes that the package documents, so that calls meant
for a kernel can come here. What can't be done is refused, never ignored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compressm.compat._convolutions import causal_conv
from lightning_compressm.compat._norms import rmsnorm_fn
from lightning_compressm.compat._refusals import refuse_given
from lightning_compressm.nn._dual import state_space_dual
from lightning_compressm.nn.selective_scan import selective_scan

__all__ = [
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "selective_scan_fn",
    "selective_state_update",
]

_NO_LIMIT = (0.0, math.inf)


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
    x = causal_conv(x, conv1d_weight.squeeze(1), conv1d_bias, "silu")
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
    refuse_given("mamba_chunk_scan_combined", return_varlen_states=return_varlen_states)
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
    mixed = causal_conv(
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
    refuse_given("selective_state_update", state_batch_indices=state_batch_indices)
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
