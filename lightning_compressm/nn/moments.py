"""Second moments of the states that a diagonal recurrence runs through."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_compressm._precision import wide_dtype
from lightning_compressm.nn._autocast import full_precision
from lightning_compressm.nn.scan import linear_recurrence

__all__ = ["state_moments"]

_BLOCK_BYTES = 32 << 20  # of states at a time: enough for large products, little beside a model


@torch.no_grad()
def state_moments(
    eigenvalues: Tensor, weight: Tensor, signals: Tensor, *, reverse: bool = False
) -> Tensor:
    r"""Return :math:`\sum_k z_k z_k^T` with :math:`z = [\mathrm{Re}\, x; \mathrm{Im}\, x]`.

    The states x follow :math:`x_k = \lambda \odot x_{k-1} + W v_k` from the zero state, or with
    ``reverse`` :math:`x_k = \lambda \odot x_{k+1} + W v_k`: the adjoint of a layer with input
    matrix B and output matrix C, whose output has the gradient v, for eigenvalues
    :math:`\bar\lambda` and
    :math:`W = C^H`. States are computed by :func:`~lightning_compressm.nn.scan.linear_recurrence`,
    in blocks of bounded memory, in the precision of the signals and float32 at least; blocks are
    added up in float64. Autocast changes nothing.

    Args:
        eigenvalues: (N,) complex; (H, N) for a bank of systems, one for each channel.
        weight: W, (N, H) complex; (H, N, 1) for a bank.
        signals: v, (batch, L, H) real, L >= 1.
        reverse: whether time runs backwards.

    Returns:
        (2N, 2N) float64, or (H, 2N, 2N); float32 on devices without float64.

    Raises:
        ValueError: the shapes do not fit together.

    Source:
        Empirical Gramians: Moore (1981), "Principal component analysis in linear systems", IEEE
        Trans. Automatic Control 26(1), sections II and III.

    Example:
        >>> import torch
        >>> half, one = torch.tensor([0.5 + 0j]), torch.ones(1, 1, dtype=torch.complex64)
        >>> state_moments(half, one, torch.tensor([[[1.0], [0.0]]]))
        tensor([[1.2500, 0.0000],
                [0.0000, 0.0000]], dtype=torch.float64)
    """
    _check(eigenvalues, weight, signals)
    real = torch.promote_types(signals.dtype, torch.float32)
    device, states = signals.device, eigenvalues.shape[-1]
    poles = eigenvalues.to(device, wide_dtype(device).to_complex()).flatten()
    columns = torch.view_as_real(weight.to(device, real.to_complex()).resolve_conj())
    total = torch.zeros(
        (*eigenvalues.shape[:-1], 2 * states, 2 * states), dtype=wide_dtype(device), device=device
    )
    with full_precision(device):
        for rows, fits in _row_blocks(signals, poles.numel() * real.itemsize * 2):
            state = None
            for steps in torch.split(rows.flip(1) if reverse else rows, fits, 1):
                run = linear_recurrence(poles, _driven(steps.to(real), columns), state)
                state = run[:, -1]
                total += _products(run, total.shape)
    apart = torch.arange(2 * states, device=device).view(states, 2).mT.flatten()
    return total[..., apart, :][..., apart]


def _row_blocks(signals: Tensor, bytes_per_step: int) -> Iterator[tuple[Tensor, int]]:
    """Some sequences, and how many steps of them fit at a time."""
    length = signals.shape[1]
    count = max(1, _BLOCK_BYTES // (length * bytes_per_step))
    for rows in torch.split(signals, count):
        yield rows, max(1, min(length, _BLOCK_BYTES // (len(rows) * bytes_per_step)))


def _driven(steps: Tensor, columns: Tensor) -> Tensor:
    """``W v_k``, (batch, L, N) complex; for a bank the states of all channels side by side."""
    if columns.ndim == 3:
        driven = steps @ columns.permute(1, 0, 2).flatten(1)
        return torch.view_as_complex(driven.view(*driven.shape[:-1], -1, 2))
    return torch.view_as_complex(steps[..., None, None] * columns[:, :, 0]).flatten(2)


def _products(run: Tensor, shape: torch.Size) -> Tensor:
    """The sum of ``z z^T``, with real and imaginary part of a state side by side."""
    z = torch.view_as_real(run).reshape(-1, *shape[:-1])
    if z.ndim == 2:
        return (z.mT @ z).to(wide_dtype(z.device))
    z = z.transpose(0, 1)
    return (z.mT @ z).to(wide_dtype(z.device))


def _check(eigenvalues: Tensor, weight: Tensor, signals: Tensor) -> None:
    bank = eigenvalues.ndim == 2
    width = signals.shape[-1] if signals.ndim == 3 else 0
    expected = (width, *eigenvalues.shape[1:], 1) if bank else (*eigenvalues.shape, width)
    fits = weight.shape == expected and (not bank or len(eigenvalues) == width)
    if eigenvalues.ndim > 2 or not fits or signals.numel() == 0:
        raise ValueError(
            "expected eigenvalues (N,), weight (N, H) and signals (batch, L, H), or (H, N), "
            f"(H, N, 1) and (batch, L, H) for a bank, none empty, got {tuple(eigenvalues.shape)}, "
            f"{tuple(weight.shape)} and {tuple(signals.shape)}"
        )
