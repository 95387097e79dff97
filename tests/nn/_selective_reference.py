"""The selective recurrences as plain loops over time, written from the equations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def each_channel(matrix: Tensor, batch: int, dim: int, length: int) -> Tensor:
    """B or C in any of its forms as (batch, dim, N, L)."""
    if matrix.ndim == 2:
        return matrix[None, :, :, None].expand(batch, -1, -1, length)
    if matrix.ndim == 3:
        matrix = matrix.unsqueeze(1)
    return matrix.repeat_interleave(dim // matrix.shape[1], 1)


def naive_selective(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The equations, one step after the other, in the widest dtype of the arguments."""
    batch, dim, length = u.shape
    B, C = (each_channel(t, batch, dim, length) for t in (B, C))
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    x = u.new_zeros(batch, dim, A.shape[1]) if initial_state is None else initial_state
    outputs = []
    for now, step, b, c in zip(*(t.unbind(-1) for t in (u, dt, B, C)), strict=True):
        x = torch.exp(step[..., None] * A) * x + (step * now)[..., None] * b
        outputs.append((x * c).sum(-1))
    y = torch.stack(outputs, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * z * torch.sigmoid(z)), x


def naive_dual(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        drive = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + drive
        outputs.append((state * C[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1), state
