"""The gradient of eigenvalues, from states and adjoints of a whole scan."""

from __future__ import annotations

from torch import Tensor

__all__ = ["shifted_product"]


def shifted_product(adjoint: Tensor, states: Tensor) -> Tensor:
    r"""Return :math:`\sum_{m, k \ge 1} g_{m,k} x_{m,k-1}`, shape (N,), for (M, L, N) operands."""
    return (adjoint[:, 1:] * states[:, :-1]).sum((0, 1))
