"""Eigenvalues and well-conditioned eigenvectors of the state matrices of reduced systems."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compressm.errors import IllConditionedError, NonFiniteError

__all__ = ["diagonalise", "inverse", "largest_fit"]

MAX_CONDITION = 1e8
_PREDICTED = 128  # smaller blocks are tried in double precision at once


def diagonalise(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, eigenvectors as columns, and the inverse of these."""
    eigenvalues, vectors = _eigen(matrix)
    return eigenvalues, vectors, inverse(vectors)


def largest_fit(projected: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of about the largest leading block that fits into ``order`` states.

    A conjugate pair takes one state, and so does a real pole.
    """
    size = projected.shape[-1]
    single = projected.float()
    if size >= _PREDICTED and bool(torch.isfinite(single).all()):
        likely, needed = _first_fit(single, order)
        eigenvalues, vectors = _eigen(projected[:likely, :likely])
        # With room for more, single precision may have seen pairs as real.
        fits = _states(eigenvalues) == needed and (likely == size or needed >= order - 1)
        if fits:
            return eigenvalues, vectors
    while True:
        eigenvalues, vectors = _eigen(projected[:size, :size])
        excess = _states(eigenvalues) - order
        if excess <= 0:
            return eigenvalues, vectors
        size -= excess


def _first_fit(projected: Tensor, order: int) -> tuple[int, int]:
    """Size of that block, and the states that it needs, from its eigenvalues alone."""
    size = projected.shape[-1]
    while True:
        needed = _states(torch.linalg.eigvals(projected[:size, :size]))
        if needed <= order:
            return size, needed
        size -= needed - order


def _states(eigenvalues: Tensor) -> int:
    return int((eigenvalues.imag >= 0).sum())


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError("expected a finite reduced state matrix, got NaN or infinity")
    eigenvalues, vectors = torch.linalg.eig(matrix)
    return eigenvalues, vectors


def inverse(vectors: Tensor) -> Tensor:
    """The inverse of a matrix of eigenvectors, if it is well enough conditioned."""
    inverted: Tensor
    inverted, failed = torch.linalg.inv_ex(vectors)
    # The Frobenius norms bound the condition number from above and cost nothing.
    condition = float(torch.linalg.norm(vectors) * torch.linalg.norm(inverted))
    if int(failed) or not condition <= MAX_CONDITION:
        condition = float(torch.linalg.cond(vectors))
    if not condition <= MAX_CONDITION:
        raise IllConditionedError(
            f"expected eigenvectors with a condition number up to {MAX_CONDITION:.0e}, got "
            f"{condition:.3g} for {vectors.shape[-1]} states: the reduced system can't be written "
            "in diagonal form safely; keep the layer, or choose another number of states"
        )
    return inverted
