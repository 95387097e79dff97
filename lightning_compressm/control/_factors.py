"""Square factors of Gramians, accurate also where the Gramian is singular in double precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compressm.control._kernel import one_minus_product, unit_gap

__all__ = ["Gramian"]

MIN_PIVOT = 1e-4  # below, rounding of the Gramian shows in its factor beyond the eighth digit


@dataclass(frozen=True, eq=False)
class Gramian:
    """A Gramian and what it was built from.

    Attributes:
        matrix: Hermitian or symmetric, shape ``(..., M, M)``.
        eigenvalues: ``lambda`` for controllability, its conjugate for observability, ``(..., N)``.
        rows: ``B``, or ``C^H``, shape ``(..., N, H)``.
        horizon: Number of steps, or None.
    """

    matrix: Tensor
    eigenvalues: Tensor
    rows: Tensor
    horizon: int | None

    def factor(self) -> Tensor:
        """Return ``L`` with ``matrix = L L^H``, by Cholesky's method where that succeeds.

        The Gramian is first scaled to a unit diagonal, as it may be graded over many decades.
        States with a zero diagonal (not reached, or not seen at all) get zero rows.
        """
        scale = self.matrix.diagonal(dim1=-2, dim2=-1).real.clamp(min=0).sqrt()
        used = scale > 0
        inverse = torch.where(used, 1 / scale, 0)
        unit = self.matrix * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
        unit = unit + torch.diag_embed((~used).to(unit.dtype))
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(unit)
        bad = failed > 0
        if self.horizon is None:
            bad = bad | (lower.diagonal(dim1=-2, dim2=-1).real.amin(-1) < MIN_PIVOT)
        lower = lower * scale.unsqueeze(-1)
        if bool(bad.any()):
            lower[bad] = self._singular_factor(bad, unit[bad], scale[bad])
        return lower

    def _singular_factor(self, bad: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
        if self.horizon is not None:
            return _spectral_factor(unit) * scale.unsqueeze(-1)
        eigenvalues, rows = self.eigenvalues[bad], self.rows[bad]
        if self.matrix.is_complex():
            return _schur_factor(eigenvalues, rows)
        return _real_schur_factor(eigenvalues, rows)


def _spectral_factor(unit: Tensor) -> Tensor:
    """Factor of a semi-definite matrix; eigenvalues that are rounding are set to zero."""
    values, vectors = torch.linalg.eigh(unit)
    cut = unit.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:]
    factor: Tensor = vectors * torch.where(values > cut, values, 0).sqrt().unsqueeze(-2)
    return factor


def _schur_factor(eigenvalues: Tensor, rows: Tensor) -> Tensor:
    """Pivoted factor of ``(b_i b_j^H) / (1 - lambda_i conj(lambda_j))`` that never forms it.

    Eliminating a state multiplies the part of every ``b_i`` along its own by a Blaschke factor
    (generalised Schur algorithm; Kailath and Sayed, SIAM Review 37, 1995). So small pivots keep
    their relative accuracy, where a formed Gramian only knows them up to rounding of the large.
    """
    n = eigenvalues.shape[-1]
    gap = unit_gap(eigenvalues).unsqueeze(-1)
    denominators = one_minus_product(eigenvalues, eigenvalues, gap.squeeze(-1))
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    scale = norm / gap.sqrt()
    rows = torch.where(norm > 0, rows / norm, 0) * gap.sqrt()
    columns = []
    for _ in range(n):
        diagonal = rows.abs().square().sum(-1, keepdim=True) / gap
        pivot = diagonal.argmax(-2, keepdim=True)
        largest = diagonal.gather(-2, pivot)
        live = largest > (n * torch.finfo(gap.dtype).eps) ** 2
        row = rows.gather(-2, pivot.expand_as(rows[..., :1, :]))
        length = torch.linalg.vector_norm(row, dim=-1, keepdim=True)
        unit = torch.where(live, row / length, 0)
        along = rows @ unit.mH
        denominator = denominators.gather(-1, pivot.expand_as(along))
        column = along / denominator * torch.where(live, length / largest.sqrt(), 0)
        columns.append(column)
        blaschke = (eigenvalues.unsqueeze(-1) - _entry(eigenvalues, pivot)) / denominator
        rows = rows - (along * (1 - blaschke)) * unit
        rows = rows.scatter(-2, pivot.expand_as(row), 0)
    factor: Tensor = torch.cat(columns, -1) * scale
    return factor


def _entry(vector: Tensor, index: Tensor) -> Tensor:
    return vector.unsqueeze(-1).gather(-2, index)


def _real_schur_factor(eigenvalues: Tensor, rows: Tensor) -> Tensor:
    """The same for the state ``[Re x; Im x]``: factor for ``[x; conj x]``, then make it real."""
    n = eigenvalues.shape[-1]
    both = _schur_factor(
        torch.cat([eigenvalues, eigenvalues.conj()], -1), torch.cat([rows, rows.conj()], -2)
    )
    plain, conjugated = both[..., :n, :], both[..., n:, :]
    stacked = torch.cat([plain + conjugated, -1j * (plain - conjugated)], -2) / 2
    wide = torch.cat([stacked.real, stacked.imag], -1)
    triangle: Tensor = torch.linalg.qr(wide.mT, mode="r").R
    return triangle.mT
