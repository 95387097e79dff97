"""Refit the read-out of a selective recurrence to the states that are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_compressm.control.calibration import SelectiveSignals, state_chunks

__all__ = ["refit_readout"]

RIDGE = 1e-3
MAX_UNKNOWNS = 4096


def refit_readout(
    batches: Sequence[SelectiveSignals],
    keep: Tensor,
    *,
    ridge: float = RIDGE,
    add_up: Callable[[Tensor], Tensor] = lambda total: total,
) -> Tensor:
    r"""What to add to the read-out of the kept states, so that they stand in for the lost ones.

    Finds the ``delta`` of shape (r, N) for each group that minimises the gate-weighted error

    .. math:: \sum w^2 \Bigl( \sum_{n \notin S} C_n h_n - \sum_{i \in S} (\Delta C)_i h_i \Bigr)^2

    over the calibration data, by ridge least squares in closed form; the new read-out is ``C_S +
    delta C``. Where ``r N`` exceeds 4096, ``delta`` is restricted to the leading principal
    directions of C. If the lost states are not read out, ``delta`` is exactly zero.

    Args:
        batches: signals of the calibration batches, with all N states.
        keep: indices of the kept states, (G, r), int64.
        ridge: penalty on ``delta``, relative to the diagonal of the normal equations, > 0.
        add_up: adds a tensor up over processes.

    Returns:
        ``delta``, shape (G, r, N), float64.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 4, 1, 1)
        >>> twice = one.expand(1, 4, 1, 2)
        >>> signals = SelectiveSignals(one, -one[0, :1], twice, twice, one, one)
        >>> delta = refit_readout([signals], torch.tensor([[0]]), ridge=1e-9)
        >>> delta.round(decimals=3)
        tensor([[[0.5000, 0.5000]]], dtype=torch.float64)
    """
    doubles = [signals.double() for signals in batches]
    keep = keep.to(doubles[0].x.device)
    basis = _readout_directions(doubles, keep.shape[1], add_up)
    groups, r = keep.shape
    size = r * basis.shape[-1]
    normal, target = basis.new_zeros(groups, size, size), basis.new_zeros(groups, size)
    for signals in doubles:
        for steps, states in state_chunks(signals):
            _accumulate(normal, target, signals, steps, states, keep, basis)
    normal, target = add_up(normal), add_up(target)
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    damping = ridge * diagonal + torch.finfo(normal.dtype).tiny
    # A direction without any data gets a one on its diagonal, and with it a zero in the solution.
    damping = torch.where(diagonal > 0, damping, 1.0)
    solution: Tensor = torch.linalg.solve(normal + torch.diag_embed(damping), target.unsqueeze(-1))
    delta: Tensor = solution.view(groups, r, -1) @ basis.mT
    return delta


def _readout_directions(
    batches: Sequence[SelectiveSignals], r: int, add_up: Callable[[Tensor], Tensor]
) -> Tensor:
    """Orthonormal directions in which C is combined, (G, N, k); all of them where that is cheap."""
    groups, n = batches[0].C.shape[2:]
    k = max(1, min(n, MAX_UNKNOWNS // r))
    if k == n:
        return torch.eye(n, dtype=torch.float64, device=batches[0].C.device).expand(groups, n, n)
    rows = torch.cat([s.C.movedim(2, 0).reshape(groups, -1, n) for s in batches], 1)
    vectors: Tensor = torch.linalg.eigh(add_up(rows.mT @ rows)).eigenvectors
    leading: Tensor = vectors[..., -k:]
    return leading


def _accumulate(
    normal: Tensor,
    target: Tensor,
    signals: SelectiveSignals,
    steps: slice,
    states: Tensor,
    keep: Tensor,
    basis: Tensor,
) -> None:
    """Add some steps to the normal equations; features h_i C_m, with C shared by the channels."""
    groups, r = keep.shape
    weight = signals.weight[:, steps]
    for g in range(groups):
        c = signals.C[:, steps, g].reshape(-1, states.shape[-1])
        h = (states[:, :, g] * weight[:, :, g, :, None]).flatten(0, 1)
        lost = torch.ones(h.shape[-1], dtype=torch.bool, device=h.device)
        lost[keep[g]] = False
        missing = (h[..., lost] * c[:, None, lost]).sum(-1)
        kept, read = h[..., keep[g]], c @ basis[g]
        k = read.shape[-1]
        pairs = (kept.mT @ kept).flatten(1)
        products = (read.unsqueeze(2) * read.unsqueeze(1)).flatten(1)
        block = (pairs.mT @ products).view(r, r, k, k)
        normal[g] += block.permute(0, 2, 1, 3).reshape(r * k, r * k)
        along = (kept * missing.unsqueeze(-1)).sum(1)
        target[g] += (along.mT @ read).flatten()
