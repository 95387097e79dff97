"""Hankel singular values in arbitrary precision: the truth for ill-conditioned systems."""

import mpmath
import torch
from torch import Tensor

from lightning_compressm.control import DiagonalLTI


def exact_singular_values(system: DiagonalLTI, digits: int = 120) -> Tensor:
    """Those of the complex system, from the very float64 numbers that it holds."""
    full = system.double()
    n = full.order
    with mpmath.workdps(digits):
        poles = [mpmath.mpc(complex(x)) for x in full.eigenvalues]
        b, c = mpmath.matrix(full.B.tolist()), mpmath.matrix(full.C.tolist())
        p, q = b * b.H, c.H * c
        for i in range(n):
            for j in range(n):
                p[i, j] /= 1 - poles[i] * mpmath.conj(poles[j])
                q[i, j] /= 1 - mpmath.conj(poles[i]) * poles[j]
        lower = _cholesky(p)
        squares = mpmath.eighe(lower.H * q * lower, eigvals_only=True)
        values = [float(mpmath.sqrt(abs(x))) for x in squares]
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


def real_system_as_complex(system: DiagonalLTI) -> DiagonalLTI:
    """The real map with state ``[x; conj x]``, diagonal with 2N states."""
    full = system.double()
    return DiagonalLTI(
        torch.cat([full.eigenvalues, full.eigenvalues.conj()]),
        torch.cat([full.B, full.B.conj()]),
        torch.cat([full.C, full.C.conj()], -1) / 2,
        real_output=False,
    )


def _cholesky(matrix: mpmath.matrix) -> mpmath.matrix:
    n = matrix.rows
    lower = mpmath.matrix(n, n)
    for j in range(n):
        done = mpmath.fsum(abs(lower[j, k]) ** 2 for k in range(j))
        lower[j, j] = mpmath.sqrt(mpmath.re(matrix[j, j]) - done)
        for i in range(j + 1, n):
            done = mpmath.fsum(lower[i, k] * mpmath.conj(lower[j, k]) for k in range(j))
            lower[i, j] = (matrix[i, j] - done) / lower[j, j]
    return lower
