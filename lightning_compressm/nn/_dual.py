"""The chunked scan of Mamba-2 in plain PyTorch: matrix products within chunks, a loop over them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compressm.nn._autocast import full_precision

__all__ = ["state_space_dual"]

# Work within a chunk grows with its length and not with the number of states; work between chunks
# shrinks with the length and grows with the states. Measured on a CPU with 8 to 128 states.
_CHUNK = 64
_SHORT_CHUNK = 32
_FEW_STATES = 32


def state_space_dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Run :math:`x_t = e^{\Delta_t A} x_{t-1} + \Delta_t u_t B_t^\top`, :math:`y_t = x_t C_t`.

    Computed in float32, or in float64 if any argument is, under autocast as well. Decays within
    a chunk are exponentials of differences of running sums, never quotients, so nothing overflows
    for A <= 0.

    Args:
        x: the inputs u, (batch, L, H, P).
        dt: (batch, L, H), the step sizes before bias, softplus and limits.
        A: (H,).
        B: (batch, L, G, N), one for each group of H / G heads.
        C: like ``B``.
        D: (H,) or (H, P), the skip connection.
        z: like ``x``, the gate before SiLU.
        dt_bias: (H,).
        dt_softplus: pass ``dt`` (with its bias) through softplus.
        dt_limit: clamp the step sizes to this range.
        initial_states: (batch, H, P, N).
        seq_idx: (batch, L), integers; the state starts from zero wherever the number changes.
        chunk_size: of this implementation; the result does not depend on it. None means a length
            that suits the number of states.

    Returns:
        Outputs like ``x``, in its dtype, and the final states (batch, H, P, N).

    Source:
        Dao & Gu (2024), "Transformers are SSMs", arXiv 2405.21060, section 6.
    """
    if chunk_size is None:
        few = B.shape[-1] <= _FEW_STATES and B.device.type == "cpu"
        chunk_size = _SHORT_CHUNK if few else _CHUNK
    floats = [t for t in (x, dt, A, B, C, D, z, dt_bias, initial_states) if t is not None]
    wide = torch.float64 in [t.dtype for t in floats]
    dtype = torch.float64 if wide else torch.float32
    with full_precision(x.device):
        u, step = x.to(dtype), dt.to(dtype)
        if dt_bias is not None:
            step = step + dt_bias.to(dtype)
        if dt_softplus:
            step = F.softplus(step)
        if dt_limit != (0.0, math.inf):
            step = step.clamp(*dt_limit)
        start = None if initial_states is None else initial_states.to(dtype)
        drive, log_decay = u * step.unsqueeze(-1), step * A.to(dtype)
        y, last = _scan(drive, log_decay, B.to(dtype), C.to(dtype), start, seq_idx, chunk_size)
        if D is not None:
            y = y + u * (D if D.ndim == 2 else D.unsqueeze(-1)).to(dtype)
        if z is not None:
            y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), last


def _scan(
    drive: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    start: Tensor | None,
    seq_idx: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = drive.shape
    groups, states = B.shape[2:]
    chunk = min(chunk, length)
    count = -(-length // chunk)
    split = (groups, heads // groups)

    def cut(tensor: Tensor, *tail: int) -> Tensor:
        """Bring (batch, L, ...) to (batch, chunks, *tail[:-1], Q, tail[-1]), padded with zeros."""
        padded = F.pad(tensor.flatten(2), (0, 0, 0, count * chunk - length))
        return padded.view(batch, count, chunk, *tail).movedim(2, -2)

    inputs = cut(drive, *split, width)
    b, c = (cut(t, groups, 1, states) for t in (B, C))
    total = cut(log_decay.unsqueeze(-1), *split, 1).squeeze(-1).cumsum(-1)
    mask = torch.ones(chunk, chunk, dtype=torch.bool, device=drive.device).tril()
    into, out, across = total, total[..., -1:] - total, total[..., -1]
    if seq_idx is not None:
        tail = seq_idx[:, -1:].expand(-1, count * chunk - length)
        n = torch.cat([seq_idx, tail], 1).view(batch, count, 1, 1, chunk)
        mask = mask & (n.unsqueeze(-1) == n.unsqueeze(-2))
        before = torch.cat([n[:, :1, ..., 0], n[:, :-1, ..., -1]], 1)
        into = into.masked_fill(n != before.unsqueeze(-1), -math.inf)
        out = out.masked_fill(n != n[..., -1:], -math.inf)
        across = across.masked_fill(n[..., -1] != before, -math.inf)

    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~mask, -math.inf).exp()
    y = ((c @ b.mT) * decay) @ inputs
    ends = (inputs * out.exp().unsqueeze(-1)).mT @ b
    state = drive.new_zeros(batch, *split, width, states)
    if start is not None:
        state = start.reshape(state.shape)
    before_chunk = []
    for decay_across, end in zip(across.exp().unbind(1), ends.unbind(1), strict=True):
        before_chunk.append(state)
        state = decay_across[..., None, None] * state + end
    y = y + (c @ torch.stack(before_chunk, 1).mT) * into.exp().unsqueeze(-1)
    y = y.movedim(-2, 2).reshape(batch, count * chunk, heads, width)[:, :length]
    return y, state.reshape(batch, heads, width, states)
