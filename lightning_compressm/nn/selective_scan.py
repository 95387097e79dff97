"""The selective scan of Mamba in plain PyTorch, with exact and memory-bounded gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compressm.nn._autocast import full_precision
from lightning_compressm.nn._selective import selective_recurrence
from lightning_compressm.nn._softplus import softplus

__all__ = ["selective_scan"]


def selective_scan(
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
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Run Mamba's recurrence along a sequence, on any device and without its CUDA kernels.

    .. math::
        x_t = e^{\Delta_t A} \odot x_{t-1} + \Delta_t B_t u_t, \qquad
        y_t = (C_t x_t + D u_t) \, \mathrm{silu}(z_t)

    Layout and meaning are those of ``mamba_ssm``'s function. Steps are taken one by one within
    chunks; the backward pass computes the states of each chunk again, so that of L states only
    every 32nd is kept. Everything is computed in float32, or in float64 if any argument is,
    under autocast as well. Gradients flow to all tensors (through the last state too), once:
    differentiating a gradient raises ``RuntimeError`` unless ``torch.func`` took it. While it is
    exported or traced, and under the transforms of ``torch.func``, it runs in plain operations,
    with all states in memory.

    Args:
        u: (batch, dim, L), floating point, L >= 1.
        delta: (batch, dim, L), the step sizes before bias and softplus.
        A: (dim, N), real; negative for a stable recurrence.
        B: (batch, N, L); (batch, G, N, L) in G groups of dim / G channels; or (dim, N), constant.
        C: like ``B``; the two may differ in form.
        D: (dim,), the skip connection; None means none.
        z: (batch, dim, L), the gate before SiLU; None means none.
        delta_bias: (dim,), added to ``delta``.
        delta_softplus: pass ``delta`` (with its bias) through softplus.
        initial_state: (batch, dim, N), the state before the first step; None means zero.
        return_last_state: return the state after the last step as well.

    Returns:
        Outputs (batch, dim, L) in the dtype of ``u``; with ``return_last_state`` also the last
        state, (batch, dim, N), in the dtype of the computation.

    Raises:
        TypeError: an argument is complex or an integer.
        ValueError: the shapes do not fit together, or L is 0.

    Source:
        Gu & Dao (2023), "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        arXiv 2312.00752, section 3 and algorithm 2.

    Example:
        >>> import torch
        >>> u, B = torch.ones(1, 1, 3), torch.ones(1, 1, 3)
        >>> A = torch.tensor([[0.5]]).log()
        >>> selective_scan(u, u, A, B, C=B).flatten()
        tensor([1.0000, 1.5000, 1.7500])
        >>> y, last = selective_scan(u, u, A, B, B, return_last_state=True)
        >>> last.shape
        torch.Size([1, 1, 1])
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    dtype_out = u.dtype
    groups = max([t.shape[1] for t in (B, C) if t.ndim == 4], default=1)
    if B.ndim == 2 or C.ndim == 2:
        groups = u.shape[1]
    used = [t for t in (u, delta, A, B, C, D, z, delta_bias, initial_state) if t is not None]
    dtype = torch.float64 if torch.float64 in [t.dtype for t in used] else torch.float32
    with full_precision(u.device):
        batch, dim, _ = u.shape
        split, states = (groups, dim // groups), A.shape[1]
        # With time first and channels last, every pass from here on is over contiguous memory.
        inputs, dt = (_time_first(t.to(dtype), split) for t in (u, delta))
        if delta_bias is not None:
            dt = dt + delta_bias.to(dtype).view(split)
        if delta_softplus:
            dt = softplus(dt)
        if initial_state is None:
            initial_state = inputs.new_zeros(batch, dim, states)
        y, last = selective_recurrence(
            inputs,
            dt,
            torch.unflatten(A.to(dtype), 0, split).mT.contiguous(),
            _per_group(B.to(dtype), groups),
            _per_group(C.to(dtype), groups),
            torch.unflatten(initial_state.to(dtype), 1, split).mT.contiguous(),
        )
        if D is not None:
            y = y + inputs * D.to(dtype).view(split)
        if z is not None:
            y = y * F.silu(_time_first(z.to(dtype), split))
        y = y.flatten(2).permute(1, 2, 0)
    y = y.to(dtype_out)
    return (y, last.mT.flatten(1, 2)) if return_last_state else y


def _time_first(sequence: Tensor, split: tuple[int, int]) -> Tensor:
    ordered = sequence.permute(2, 0, 1).contiguous()
    return ordered.view(*ordered.shape[:2], *split)


def _per_group(matrix: Tensor, groups: int) -> Tensor:
    """Bring B or C to (L, batch, groups, N), or (1, 1, groups, N) if it is constant."""
    if matrix.ndim == 2:
        return matrix.contiguous().view(1, 1, *matrix.shape)
    if matrix.ndim == 3:
        matrix = matrix.unsqueeze(1)
    matrix = matrix.permute(3, 0, 1, 2)
    return matrix.repeat_interleave(groups // matrix.shape[2], 2).contiguous()


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    if u.ndim != 3 or u.shape[-1] == 0:
        raise ValueError(
            f"u must have shape (batch, dim, L) with at least one step (L >= 1), "
            f"got {tuple(u.shape)}"
        )
    batch, dim, length = u.shape
    if A.ndim != 2 or A.shape[0] != dim or A.shape[1] == 0:
        raise ValueError(
            f"A must have shape (dim, N) with dim = {dim}, that of u {tuple(u.shape)}, and "
            f"N >= 1, got {tuple(A.shape)}"
        )
    states = A.shape[1]
    exact = {
        "delta": (delta, "(batch, dim, L)", (batch, dim, length)),
        "D": (D, "(dim,)", (dim,)),
        "z": (z, "(batch, dim, L)", (batch, dim, length)),
        "delta_bias": (delta_bias, "(dim,)", (dim,)),
        "initial_state": (initial_state, "(batch, dim, N)", (batch, dim, states)),
    }
    for name, (tensor, words, shape) in exact.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {words} = {shape} to fit u {tuple(u.shape)} and "
                f"A {tuple(A.shape)}, got {tuple(tensor.shape)}"
            )
    for name, tensor in {"B": B, "C": C}.items():
        groups = tensor.shape[1] if tensor.ndim == 4 else 1
        # By number of dimensions: no two shapes of another length are compared, which would make
        # exporters ask for batches that differ from `dim`.
        allowed = {2: (dim, states), 3: (batch, states, length), 4: (batch, groups, states, length)}
        if tensor.shape != allowed.get(tensor.ndim) or groups == 0 or dim % groups:
            raise ValueError(
                f"{name} must have shape (batch, N, L) = {allowed[3]}, (batch, G, N, L) where G "
                f"divides dim = {dim}, or (dim, N) = {allowed[2]}, got {tuple(tensor.shape)}"
            )
    if B.ndim == C.ndim == 4 and B.shape != C.shape:
        raise ValueError(
            f"B and C must have the same number of groups, got {tuple(B.shape)} and "
            f"{tuple(C.shape)}; repeat the one with fewer groups"
        )
    named = {"u": u, "delta": delta, "A": A, "B": B, "C": C, **{n: t[0] for n, t in exact.items()}}
    for name, value in named.items():
        if value is not None and not value.is_floating_point():
            raise TypeError(
                f"{name} must be a real floating point tensor, got {value.dtype}; complex "
                "A, B and C are not supported: use lightning_compressm.nn.linear_recurrence"
            )
