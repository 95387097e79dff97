"""Square factors of Gramians, accurate also where the Gramian is singular in double precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compressm.control._kernel import one_minus_product, unit_gap

__all__ = ["LARGE", "Gramian"]

MIN_PIVOT = 1e-4  # below, rounding of the Gramian shows in its factor beyond the eighth digit
LARGE = 1024  # rows of a Gramian from which on what pays for large ones only is done
_APART = 1e-3  # least pivot of the conjugate, so that twelve digits of its phase are right
_STEPS = 32  # between two looks at whether anything is left to eliminate


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

    @classmethod
    def of(cls, matrix: Tensor) -> Gramian:
        """A semi-definite matrix that no eigenvalues and rows are known to give."""
        return cls(matrix, matrix[..., 0], matrix, horizon=1)

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
        if unit.shape[-1] >= LARGE:
            factors = [_paired_factor(*one) for one in zip(eigenvalues, rows, strict=True)]
            found = [factor for factor in factors if factor is not None]
            if len(found) == len(factors):
                return torch.stack(found)
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


def _paired_factor(eigenvalues: Tensor, rows: Tensor) -> Tensor | None:
    """The same for one large system: a state and its conjugate at a time, so that all stays real.

    With Blaschke factors that are 1 at ``z = 1``, the rows that a pair leaves behind are conjugate
    again. So only those of the states themselves are kept, and no QR decomposition is needed. What
    is below rounding is left out: the last columns are zero then. There is no such factor (None)
    where a state is all but its own conjugate, as poles with next to no phase are.
    """
    n = eigenvalues.shape[-1]
    gap = unit_gap(eigenvalues)
    norm = torch.linalg.vector_norm(rows, dim=-1)
    rows = torch.where(norm > 0, 1 / norm, 0).unsqueeze(-1) * rows * gap.sqrt().unsqueeze(-1)
    plain = one_minus_product(eigenvalues.conj(), eigenvalues.conj(), gap)
    crossed = one_minus_product(eigenvalues, eigenvalues.conj(), gap)
    phases = (1 - eigenvalues.conj()) / (1 - eigenvalues)
    least = 2 * n * torch.finfo(gap.dtype).eps
    columns, apart = [], torch.ones_like(gap[:1], dtype=torch.bool)
    for step in range(n):
        pivot = (torch.view_as_real(rows).square().sum((-2, -1)) / gap).argmax().view(1)
        row, pole, width, phase = (x[pivot] for x in (rows, eigenvalues, gap.sqrt(), phases))
        first, alpha = _direction(row, width, least)
        if step % _STEPS == 0 and not bool((alpha > 0) & apart):
            break
        # What is left of the conjugate of the pivot, when that has been eliminated.
        beside = crossed[pivot, pivot].conj()
        own = row.conj() @ first.mH
        blaschke = (pole.conj() - pole) / beside * phase
        second, gamma = _direction(row.conj() - own * (1 - blaschke) * first, width, least)
        apart = apart & ((gamma == 0) | (gamma > _APART * alpha.square()))
        turn = _to_real(alpha, own[0] / beside * width, gamma)

        denominators = torch.stack([plain[pivot], crossed[pivot]], -1)[0]
        poles, turns = torch.cat([pole, pole.conj()]), torch.cat([phase, phase.conj()])
        lost = 1 - (eigenvalues.unsqueeze(-1) - poles) / denominators * turns
        pair = torch.cat([first, second])
        along = rows @ pair.mH
        along[:, 1:] -= along[:, :1] * lost[:, :1] * (first @ second.mH)
        columns.append(along / denominators * width @ turn)
        rows = torch.addmm(rows, along * lost, pair, alpha=-1).index_fill(0, pivot, 0)
    if not bool(apart):
        return None
    factor = gap.new_zeros(2 * n, 2 * n)
    if columns:
        states = torch.cat(columns, -1) * (norm / gap.sqrt()).unsqueeze(-1)
        factor[:, : states.shape[-1]] = torch.cat([states.real, states.imag])
    return factor


def _direction(row: Tensor, width: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """A row's direction and its pivot; both are zero where that is rounding."""
    length = torch.linalg.vector_norm(row, dim=-1)
    live = length > least * width
    return torch.where(live, row / length, 0), torch.where(live, length / width, 0)


def _to_real(alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """The unitary W that makes a pair's columns ``[[alpha, 0], [beta, gamma]] W`` conjugate rows.

    Alpha and gamma are real. Of the real and the imaginary part, the larger comes first.
    """
    upper = beta.real >= 0
    sign = torch.where(upper, 1, -1)
    part, other = alpha + sign * beta, sign * gamma
    length = (part.abs().square() + other.square()).sqrt()
    columns = [torch.cat([part.conj(), other]), 1j * torch.cat([other, -part])]
    unitary = torch.stack(columns, -1) * torch.where(upper, 1, 1j) / length
    return torch.where(alpha > 0, unitary, torch.zeros_like(unitary))
