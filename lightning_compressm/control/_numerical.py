"""The part of a large matrix that its singular values in double precision depend on."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compressm.control import _factors

__all__ = ["filled", "numerical_part"]

_PAYS = 0.9  # largest share of rows and columns with which leaving out the rest is worth it


def numerical_part(product: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows and columns of one large matrix without which no singular value changes, or None.

    By Weyl's inequality values change by no more than the norm of what is left out: by less than
    the rounding of the largest one. None stands for all, if leaving out so few would not pay.
    """
    size = product.shape[-1]
    if product.ndim > 2 or size < _factors.LARGE:
        return None
    energies = product.real.square() + (product.imag.square() if product.is_complex() else 0)
    rows, columns = _needed(energies.sum(1)), _needed(energies.sum(0))
    if max(len(rows), len(columns)) > _PAYS * size:
        return None
    return rows, columns


def _needed(energies: Tensor) -> Tensor:
    """Indices but for those of the smallest energies that add up to nothing."""
    ascending, order = energies.sort()
    least = torch.finfo(energies.dtype).eps ** 2 * energies.sum() / (2 * len(energies))
    return order[ascending.cumsum(0) > least].sort().values


def filled(sigma: Tensor, size: int) -> Tensor:
    """As many values as there are states: those below rounding are zero."""
    missing = size - sigma.shape[-1]
    return torch.cat([sigma, sigma.new_zeros(*sigma.shape[:-1], missing)], -1)
