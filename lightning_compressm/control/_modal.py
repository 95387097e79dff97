"""Diagonal reduced systems, and how they come from balanced coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_compressm.control._eigen import diagonalise, inverse, largest_fit
from lightning_compressm.control.basis import ChangeOfBasis
from lightning_compressm.control.system import DiagonalLTI

__all__ = ["ModalForm", "all_states", "complex_modes", "no_states", "real_modes", "spare_states"]

_ROOT_HALF = math.sqrt(0.5)
_MARGINAL = 1e-6  # in place of 1 - |lambda|^2 on the unit circle, where there is no variance
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, eq=False)
class ModalForm:
    """A diagonal system of r states, and where they come from.

    Attributes:
        system: Reduced system, complex128.
        basis: The maps between its r states and the N old ones.
        kept: Indices of the balanced states that it spans.
        energy: Share of the Hankel energy that it keeps, if these don't tell.
    """

    system: DiagonalLTI
    basis: ChangeOfBasis
    kept: Tensor
    energy: Tensor | None = None

    def conjugated(self, states: Tensor) -> ModalForm:
        """Conjugate the states in a mask (r,); real outputs stay as they are."""
        return replace(
            self, system=self.system.conjugated(states), basis=self.basis.conjugated(states)
        )

    def upper(self) -> ModalForm:
        """Conjugate the states with ``Im(lambda) < 0``."""
        return self.conjugated(self.system.eigenvalues.imag < 0)

    def canonical(self) -> ModalForm:
        """Fix what eigenvectors leave open, so that rounding can't flip a state or swap two.

        States are sorted by radius, and each is turned until its input row has a real, positive
        component along a fixed direction. A real row stays real.
        """
        s = self.system
        order = s.eigenvalues.abs().argsort(descending=True, stable=True)
        B, C = s.B[order], s.C[:, order]
        along = B @ _directions(1, B)[0].real.to(B.dtype)
        size = along.abs()
        phase = torch.where(size > 0, along / size.clamp(min=torch.finfo(size.dtype).tiny), 1)
        turned = replace(
            s, eigenvalues=s.eigenvalues[order], B=phase.conj().unsqueeze(-1) * B, C=C * phase
        )
        return replace(self, system=turned, basis=self.basis.ordered(order).turned(phase))

    def joined(self, spare: DiagonalLTI) -> ModalForm:
        """Add states that no old one has a part in."""
        s = self.system
        longer = replace(
            s,
            eigenvalues=torch.cat([s.eigenvalues, spare.eigenvalues]),
            B=torch.cat([s.B, spare.B]),
            C=torch.cat([s.C, spare.C], -1),
        )
        return replace(self, system=longer, basis=self.basis.padded(spare.order))


def all_states(system: DiagonalLTI, kept: Tensor) -> ModalForm:
    """All states of one system, exactly as they are."""
    eye = torch.eye(system.order, dtype=torch.complex128, device=system.B.device)
    return ModalForm(system, ChangeOfBasis.linear(eye, eye), kept)


def no_states(system: DiagonalLTI, kept: Tensor, order: int) -> ModalForm:
    """Padding alone, for a system whose inputs never reach its outputs."""
    left, right = system.B.new_zeros(order, system.order), system.B.new_zeros(system.order, order)
    return ModalForm(spare_states(system, order), ChangeOfBasis.linear(left, right), kept)


def complex_modes(system: DiagonalLTI, t_l: Tensor, t_r: Tensor, kept: Tensor) -> ModalForm:
    """Diagonalise the complex system in the balanced states ``kept``.

    Args:
        system: One system (no batch dimensions).
        t_l: From its states to the balanced ones, ``(len(kept), N)``.
        t_r: From these to its states, ``(N, len(kept))``.
        kept: Indices of balanced states, the most important one first.
    """
    eigenvalues, vectors, inverted = diagonalise((t_l * system.eigenvalues) @ t_r)
    left, right = inverted @ t_l, t_r @ vectors
    reduced = DiagonalLTI(eigenvalues, left @ system.B, system.C @ right, system.real_output)
    return ModalForm(reduced, ChangeOfBasis.linear(left, right), kept)


def real_modes(
    system: DiagonalLTI, t_l: Tensor, t_r: Tensor, kept: Tensor, order: int
) -> ModalForm:
    """Diagonalise the real system in as many of the balanced states as fit into ``order`` modes.

    Args:
        system: One system (no batch dimensions).
        t_l: From ``[Re x; Im x]`` to the balanced states, ``(len(kept), 2N)``.
        t_r: From these to ``[Re x; Im x]``, ``(2N, len(kept))``.
        kept: Indices of balanced states, the most important one first.
        order: Largest number of complex states that the result may have.
    """
    n = system.order
    re, im = system.eigenvalues.real.unsqueeze(-1), system.eigenvalues.imag.unsqueeze(-1)
    upper, lower = t_r[:n], t_r[n:]
    projected = t_l @ torch.cat([re * upper - im * lower, im * upper + re * lower])
    eigenvalues, vectors = largest_fit(projected, order)
    size, keep = len(eigenvalues), eigenvalues.imag >= 0
    eigenvalues, modes = eigenvalues[keep], _real_parts(eigenvalues[keep], vectors[:, keep])
    is_real = eigenvalues.imag == 0
    rows = inverse(modes) @ t_l[:size]
    columns = t_r[:, :size] @ modes

    def as_rows(real: Tensor) -> Tensor:
        return _combined(real, is_real, -_ROOT_HALF, 1.0)

    def as_columns(real: Tensor) -> Tensor:
        # A real mode appears once: half of it goes to the state, half to its conjugate.
        return _combined(real.mT, is_real, _ROOT_HALF, 0.5).mT

    tall, wide = as_rows(rows), as_columns(columns)
    basis = ChangeOfBasis(
        left=(tall[:, :n] - 1j * tall[:, n:]) / 2,
        left_conj=(tall[:, :n] + 1j * tall[:, n:]) / 2,
        right=wide[:n] + 1j * wide[n:],
        right_conj=(wide[:n] - 1j * wide[n:]).conj(),
    )
    B = as_rows(rows @ torch.cat([system.B.real, system.B.imag]))
    C = 2 * as_columns(torch.cat([system.C.real, -system.C.imag], -1) @ columns)
    return ModalForm(DiagonalLTI(eigenvalues, B, C, system.real_output), basis, kept[:size])


def _real_parts(eigenvalues: Tensor, vectors: Tensor) -> Tensor:
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


def spare_states(original: DiagonalLTI, count: int) -> DiagonalLTI:
    """States that the output does not see (``C = 0``), but that training can take up.

    Their eigenvalues are spread over those of the original; inputs give unit state variance.
    """
    by_radius = original.eigenvalues[original.eigenvalues.abs().argsort()]
    quantiles = (torch.arange(count, device=by_radius.device) + 0.5) / count * len(by_radius)
    eigenvalues = by_radius[quantiles.long()]
    rows = _directions(count, original.B)
    variance = 1 - eigenvalues.abs().square()
    size = torch.where(variance > 0, variance, _MARGINAL).sqrt().unsqueeze(-1)
    return DiagonalLTI(
        eigenvalues,
        rows * size / torch.linalg.vector_norm(rows, dim=-1, keepdim=True),
        original.C.new_zeros(original.n_outputs, count),
        original.real_output,
    )


def _directions(count: int, b: Tensor) -> Tensor:
    """``count`` fixed rows in general position like the rows of ``b``, real if ``b`` is real."""
    entries = torch.arange(1, count * b.shape[1] + 1, device=b.device)
    phase = 2 * math.pi * (entries.double() * _GOLDEN).frac()
    rows = torch.polar(torch.ones_like(phase), phase).view(count, b.shape[1])
    return rows if bool(b.imag.any()) else rows.real.to(rows.dtype)
