"""Banks of dense real systems in diagonal form, also where the state matrix is far from normal.

The eigenvectors of HiPPO-LegS are dependent in double precision: so each system is balanced first,
and states below a share of its largest Hankel singular value go. What is left is diagonalised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compressm.errors import IllConditionedError

__all__ = ["diagonal_form"]

# Shares below which states may go, while eigenvectors lose more digits than the states hold.
_SHARES = (1e-14, 1e-10, 1e-8, 1e-7, 1e-6)
_SAFE, _USABLE = 1e8, 1e12
_SQUARINGS = 60
_SPARE = 0.5  # the eigenvalue of states that nothing reads


def diagonal_form(A: Tensor, B: Tensor, C: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and weights with ``C A^k B = Re(sum of weights * eigenvalues ** k)``.

    Gradients of the matrices reach both.

    Args:
        A: stable, (H, K, K), float64.
        B: (H, K, 1).
        C: (H, outputs, K).
        states: at least so many come back.

    Returns:
        (H, M) and (H, outputs, M), complex128, one state for a conjugate pair or for a real pole; M
        is ``states``, or more if real poles need it.

    Raises:
        IllConditionedError: if the eigenvectors are too close to dependent all the same.
    """
    parts = [_diagonal(*system) for system in zip(A, B, C, *_balancing(A, B, C), strict=True)]
    size = max(states, *(len(eigenvalues) for eigenvalues, _ in parts))
    eigenvalues = [_padded(values, size, _SPARE) for values, _ in parts]
    return torch.stack(eigenvalues), torch.stack([_padded(w, size, 0.0) for _, w in parts])


def _padded(values: Tensor, size: int, value: float) -> Tensor:
    spare = values.new_full((*values.shape[:-1], size - values.shape[-1]), value)
    return torch.cat((values, spare), -1)


@torch.no_grad()
def _balancing(A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns that balance each system, not yet scaled, and its HSVs."""
    reached, seen = _factor(A, B), _factor(A.mT, C.mT)
    left, sigma, right = torch.linalg.svd(seen.mT @ reached, full_matrices=False)
    return left.mT @ seen.mT, reached @ right.mT, sigma


def _factor(A: Tensor, B: Tensor) -> Tensor:
    """``L`` with ``L L^T = sum of A^k B B^T A^kT``, by doubling the number of summands."""
    factor, power = B, A
    for _ in range(_SQUARINGS):
        factor = torch.cat((factor, power @ factor), -1)
        if factor.shape[-1] > factor.shape[-2]:
            factor = torch.linalg.qr(factor.mT, mode="r").R.mT
        power = power @ power
        if float(power.abs().max()) < torch.finfo(power.dtype).eps ** 2:
            break
    return factor


def _diagonal(
    A: Tensor, B: Tensor, C: Tensor, left: Tensor, right: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """One system's eigenvalues and weights."""
    for share in _SHARES:
        kept = int((sigma > share * sigma[0]).sum())
        if kept == 0:  # it is not reached, or not read
            nothing = torch.zeros(len(C), 0, dtype=torch.complex128, device=A.device)
            return nothing[0], nothing
        root = sigma[:kept].sqrt()
        rows, columns = left[:kept] / root.unsqueeze(-1), right[:, :kept] / root
        eigenvalues, vectors = torch.linalg.eig(rows @ A @ columns)
        condition = float(torch.linalg.cond(vectors.detach()))
        rounding = condition * torch.finfo(A.dtype).eps
        if condition <= _SAFE or rounding <= share:
            break
    if condition > _USABLE:
        raise IllConditionedError(
            f"expected eigenvectors with a condition number up to {_USABLE:.0e}, got "
            f"{condition:.3g} for {kept} states; put this layer into `ignore`"
        )
    driven = torch.linalg.solve(vectors, (rows @ B).to(vectors.dtype)).squeeze(-1)
    weights = ((C @ columns).to(vectors.dtype) @ vectors) * driven
    upper = eigenvalues.imag >= 0
    twice = torch.where(eigenvalues.imag > 0, 2.0, 1.0)
    return eigenvalues[upper], (weights * twice)[:, upper]
