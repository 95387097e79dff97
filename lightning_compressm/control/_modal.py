"""From balanced coordinates of one system to a diagonal reduced system of a fixed order."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_compressm.control.hankel import Balancing, scaled_projections
from lightning_compressm.control.system import DiagonalLTI
from lightning_compressm.errors import IllConditionedError, NonFiniteError

__all__ = ["ModalForm", "identity", "modal_form"]

MAX_CONDITION = 1e8
_PREDICTED = 128  # smaller blocks are tried in double precision at once
_ROOT_HALF = math.sqrt(0.5)
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, eq=False)
class ModalForm:
    """A diagonal system of r states with its widely linear maps from and to N old states.

    ``x' = left @ x + left_conj @ conj(x)`` and ``x ~ right @ x' + right_conj @ conj(x')``.
    ``kept`` holds the indices of the balanced states it spans, ``rank`` how many of its states are
    genuine (the rest is padding).
    """

    eigenvalues: Tensor
    B: Tensor
    C: Tensor
    left: Tensor
    left_conj: Tensor
    right: Tensor
    right_conj: Tensor
    kept: Tensor
    rank: int

    def upper(self) -> ModalForm:
        """Conjugate the states with ``Im(lambda) < 0``; the real output stays as it is."""
        low = self.eigenvalues.imag < 0
        row, column = low.unsqueeze(-1), low.unsqueeze(-2)
        return replace(
            self,
            eigenvalues=torch.where(low, self.eigenvalues.conj(), self.eigenvalues),
            B=torch.where(row, self.B.conj(), self.B),
            C=torch.where(column, self.C.conj(), self.C),
            left=torch.where(row, self.left_conj.conj(), self.left),
            left_conj=torch.where(row, self.left.conj(), self.left_conj),
            right=torch.where(column, self.right_conj, self.right),
            right_conj=torch.where(column, self.right, self.right_conj),
        )

    def canonical(self) -> ModalForm:
        """Fix what eigenvectors leave open, so that rounding can't flip a state or swap two.

        States are sorted by radius, and each is turned until its input row has a real, positive
        component along a fixed direction. A real row stays real.
        """
        order = self.eigenvalues.abs().argsort(descending=True, stable=True)
        along = self.B[order] @ _directions(1, self.B)[0].real.to(self.B.dtype)
        size = along.abs()
        phase = torch.where(size > 0, along / size.clamp(min=torch.finfo(size.dtype).tiny), 1)
        row = phase.conj().unsqueeze(-1)
        return replace(
            self,
            eigenvalues=self.eigenvalues[order],
            B=row * self.B[order],
            C=self.C[:, order] * phase,
            left=row * self.left[order],
            left_conj=row * self.left_conj[order],
            right=self.right[:, order] * phase,
            right_conj=self.right_conj[:, order] * phase.conj(),
        )

    def padded(self, order: int, original: DiagonalLTI) -> ModalForm:
        """Add states that the output does not see (``C = 0``), but that training can take up."""
        extra = order - self.rank
        if extra <= 0:
            return self
        eigenvalues, b = _spare_states(original, extra)

        def rows(matrix: Tensor) -> Tensor:
            return torch.cat([matrix, matrix.new_zeros(extra, matrix.shape[1])])

        def columns(matrix: Tensor) -> Tensor:
            return torch.cat([matrix, matrix.new_zeros(len(matrix), extra)], 1)

        return replace(
            self,
            eigenvalues=torch.cat([self.eigenvalues, eigenvalues]),
            B=torch.cat([self.B, b]),
            C=columns(self.C),
            left=rows(self.left),
            left_conj=rows(self.left_conj),
            right=columns(self.right),
            right_conj=columns(self.right_conj),
        )


def identity(system: DiagonalLTI, balance: str) -> ModalForm:
    """All states of one system, exactly as they are (folded unless the balance is complex)."""
    n, device = system.order, system.B.device
    eye = torch.eye(n, dtype=torch.complex128, device=device)
    zero = torch.zeros_like(eye)
    kept = torch.arange(2 * n if balance == "real" else n, device=device)
    form = ModalForm(system.eigenvalues, system.B, system.C, eye, zero, eye, zero, kept, n)
    return form if balance == "complex" else form.upper()


def modal_form(balancing: Balancing, kept: Tensor, order: int) -> ModalForm:
    """Truncate one balanced system to the states ``kept`` and diagonalise it again.

    Args:
        balancing: One system (no batch dimensions).
        kept: Indices of balanced states, the most important one first.
        order: Largest number of complex states that the result may have.

    Raises:
        IllConditionedError: If the eigenvectors are too close to dependent.
        NonFiniteError: If NaN or infinity comes out.
    """
    if len(kept) == 0:
        return _empty(balancing.system, kept)
    form = (_real_form if balancing.balance == "real" else _complex_form)(balancing, kept, order)
    parts = (form.eigenvalues, form.B, form.C, form.left, form.left_conj, form.right)
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise NonFiniteError(
            f"expected finite matrices, got NaN or infinity in the reduction to order {order}; "
            "keep the layer as it is, or ask for fewer states"
        )
    return form


def _empty(system: DiagonalLTI, kept: Tensor) -> ModalForm:
    row, column = system.B.new_zeros(0, system.order), system.B.new_zeros(system.order, 0)
    nothing = (system.eigenvalues[:0], system.B[:0], system.C[:, :0])
    return ModalForm(*nothing, row, row, column, column, kept, 0)


def _projections(balancing: Balancing, kept: Tensor) -> tuple[Tensor, Tensor]:
    return scaled_projections(
        balancing.controllability,
        balancing.observability,
        balancing.left[:, kept],
        balancing.sigma[kept],
        balancing.right[:, kept],
    )


def _complex_form(balancing: Balancing, kept: Tensor, order: int) -> ModalForm:
    system = balancing.system
    folded = system.folded() if balancing.balance == "folded" else system
    t_l, t_r = _projections(balancing, kept)
    eigenvalues, vectors, inverse = _diagonalise((t_l * folded.eigenvalues) @ t_r)
    left, right = inverse @ t_l, t_r @ vectors
    reduced = (eigenvalues, left @ folded.B, folded.C @ right)
    if balancing.balance == "complex":
        zero_l, zero_r = torch.zeros_like(left), torch.zeros_like(right)
        return ModalForm(*reduced, left, zero_l, right, zero_r, kept, len(kept))
    low = system.eigenvalues.imag < 0
    tall = low.unsqueeze(-1)
    lefts = torch.where(low, 0, left), torch.where(low, left, 0)
    rights = torch.where(tall, 0, right), torch.where(tall, right.conj(), 0)
    return ModalForm(*reduced, *lefts, *rights, kept, len(kept))


def _real_form(balancing: Balancing, kept: Tensor, order: int) -> ModalForm:
    system, n = balancing.system, balancing.system.order
    t_l, t_r = _projections(balancing, kept)
    re, im = system.eigenvalues.real.unsqueeze(-1), system.eigenvalues.imag.unsqueeze(-1)
    upper, lower = t_r[:n], t_r[n:]
    projected = t_l @ torch.cat([re * upper - im * lower, im * upper + re * lower])
    eigenvalues, vectors = _largest_fit(projected, order)
    size, keep = len(eigenvalues), eigenvalues.imag >= 0
    eigenvalues, basis = eigenvalues[keep], _real_basis(eigenvalues[keep], vectors[:, keep])
    is_real = eigenvalues.imag == 0
    rows = _inverse(basis) @ t_l[:size]
    columns = t_r[:, :size] @ basis

    def as_rows(real: Tensor) -> Tensor:
        return _combined(real, is_real, -_ROOT_HALF, 1.0)

    def as_columns(real: Tensor) -> Tensor:
        # A real mode appears once: half of it goes to the state, half to its conjugate.
        return _combined(real.mT, is_real, _ROOT_HALF, 0.5).mT

    tall, wide = as_rows(rows), as_columns(columns)
    left, left_conj = (tall[:, :n] - 1j * tall[:, n:]) / 2, (tall[:, :n] + 1j * tall[:, n:]) / 2
    right, right_conj = wide[:n] + 1j * wide[n:], (wide[:n] - 1j * wide[n:]).conj()
    b = as_rows(rows @ torch.cat([system.B.real, system.B.imag]))
    c = 2 * as_columns(torch.cat([system.C.real, -system.C.imag], -1) @ columns)
    maps = (left, left_conj, right, right_conj)
    return ModalForm(eigenvalues, b, c, *maps, kept[:size], len(eigenvalues))


def _real_basis(eigenvalues: Tensor, vectors: Tensor) -> Tensor:
    """Real and imaginary parts of the vectors of the upper half-plane, as columns.

    Those of pairs are longer by sqrt(2): then the condition is that of all complex vectors.
    """
    pairs = eigenvalues.imag > 0
    real, imag = vectors.real, vectors[:, pairs].imag
    return torch.cat([torch.where(pairs, real / _ROOT_HALF, real), imag / _ROOT_HALF], -1)


def _combined(rows: Tensor, is_real: Tensor, factor: float, alone: float) -> Tensor:
    """Complex rows of real and imaginary parts in that basis; those of real modes stay real."""
    real, imag = rows[: len(is_real)], torch.zeros_like(rows[: len(is_real)])
    imag[~is_real] = factor * rows[len(is_real) :]
    alone_or_pair = torch.where(is_real.unsqueeze(-1), alone * real, _ROOT_HALF * real)
    return torch.complex(alone_or_pair, imag)


def _largest_fit(projected: Tensor, order: int) -> tuple[Tensor, Tensor]:
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


def _diagonalise(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    eigenvalues, vectors = _eigen(matrix)
    return eigenvalues, vectors, _inverse(vectors)


def _inverse(vectors: Tensor) -> Tensor:
    """The inverse of a matrix of eigenvectors, if it is well enough conditioned."""
    inverse: Tensor
    inverse, failed = torch.linalg.inv_ex(vectors)
    # The Frobenius norms bound the condition number from above and cost nothing.
    condition = float(torch.linalg.norm(vectors) * torch.linalg.norm(inverse))
    if int(failed) or not condition <= MAX_CONDITION:
        condition = float(torch.linalg.cond(vectors))
    if not condition <= MAX_CONDITION:
        raise IllConditionedError(
            f"expected eigenvectors with a condition number up to {MAX_CONDITION:.0e}, got "
            f"{condition:.3g} for {vectors.shape[-1]} states: the reduced system can't be written "
            "in diagonal form safely; keep the layer, or choose another number of states"
        )
    return inverse


def _spare_states(original: DiagonalLTI, count: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues spread over those of the original, and inputs that give unit state variance."""
    by_radius = original.eigenvalues[original.eigenvalues.abs().argsort()]
    quantiles = (torch.arange(count, device=by_radius.device) + 0.5) / count * len(by_radius)
    eigenvalues = by_radius[quantiles.long()]
    b = _directions(count, original.B)
    size = (1 - eigenvalues.abs().square()).sqrt().unsqueeze(-1)
    return eigenvalues, b * size / torch.linalg.vector_norm(b, dim=-1, keepdim=True)


def _directions(count: int, b: Tensor) -> Tensor:
    """``count`` fixed rows in general position like the rows of ``b``, real if ``b`` is real."""
    entries = torch.arange(1, count * b.shape[1] + 1, device=b.device)
    phase = 2 * math.pi * (entries.double() * _GOLDEN).frac()
    rows = torch.polar(torch.ones_like(phase), phase).view(count, b.shape[1])
    return rows if bool(b.imag.any()) else rows.real.to(rows.dtype)
